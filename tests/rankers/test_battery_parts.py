"""What every ranker says of its parts must be so: its modalities, its parameters, and what it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from recllm.errors import DataError
from recllm.rankers import ranker_class
from recllm.rankers.batches import Epochs, history_batch
from recllm.rankers.features import Features
from recllm.rankers.layers import FrozenFeatures
from recllm.rankers.ranker import PairRanker, Ranker, SequenceRanker
from recllm.rankers.training_data import TrainingData
from tests.rankers.small_rankers import (
    DATA,
    HINTS,
    VARIANTS,
    every,
    every_modality,
    loss_of,
    made,
    near,
    scores,
    shake,
    small,
    training_batches,
)


def deprived(name: str, modality: str) -> Ranker:
    """The ranker, fed zeros: its projection of the modality is zero; for pairs, where graphs are made of the
    features, no item has any."""
    if isinstance(made(name), PairRanker):
        nothing = DATA.features[modality]
        nothing = Features(np.zeros_like(nothing.vectors), np.zeros_like(nothing.present), "nothing")
        model = small(name, replace(DATA, features={**DATA.features, modality: nothing}))
        model.begin_epoch(np.random.default_rng(3))
        return shake(model).eval()
    model = copy.deepcopy(made(name))
    projections = [
        part
        for path, part in model.named_modules()
        if any(isinstance(child, FrozenFeatures) for child in part.children())
        and any(f"{path}.".startswith(f"{own}.") for own in model.modality_parts[modality])
    ]
    assert projections
    with torch.no_grad():
        for part in projections:
            for parameter in part.parameters():
                parameter.zero_()
        if name == "mmsr":  # its graphs have nodes of the modality
            model.get_submodule(modality).codes.zero_()
        if model.modalities and hasattr(model, "known"):  # profiles are of items with content
            (other,) = (each for each in model.modalities if each != modality)
            model.known = model.get_submodule(other).features.present[:, 0] > 0
    return model


@every_modality
def test_without_a_modality_is_as_if_it_was_fed_zeros(name, modality):
    model, other = made(name), deprived(name, modality)
    plain, without = scores(model), scores(model, without=(modality,))
    assert near(without, scores(other))
    assert (without - plain).abs().max() > 1e-3
    if name == "hm4sr":  # whose contrast of placeholders is left out with the modality
        other._absent = [modality]
    changes = []
    for number in range(3):  # of one batch, the losses may happen to be equal
        batch = next(training_batches(model, number=number))
        assert near(loss_of(model, batch, without=(modality,)), loss_of(other, batch))
        changes.append((loss_of(model, batch) - loss_of(other, batch)).abs())
    assert max(changes) > 1e-4


@every
def test_parts_of_modalities_are_apart_and_their_own(name):
    model = made(name)
    everything = dict(model.named_parameters())
    parts = {modality: dict(model.parameters_of(modality)) for modality in model.modalities}
    assert set(model.modality_parts) == set(model.modalities)
    for part in parts.values():
        assert part
        assert all(everything[parameter] is value for parameter, value in part.items())
    names = [parameter for part in parts.values() for parameter in part]
    assert len(names) == len(set(names))
    if not model.modalities:
        assert torch.equal(scores(model, without=("image", "text")), scores(model))


def test_a_part_that_is_not_there_is_told():
    model = copy.deepcopy(made("vbpr"))
    with pytest.raises(KeyError):
        model.parameters_of("sound")
    model.modality_parts = {"text": ("tex",)}
    with pytest.raises(LookupError, match="VBPR declares 'tex'"):
        model.parameters_of("text")


def gradients(model: Ranker, **options: object) -> dict[str, float]:
    """The largest gradient of each parameter over an epoch; -1 where none came."""
    model = copy.deepcopy(model).train()
    largest = dict.fromkeys(dict(model.named_parameters()), -1.0)
    for batch in training_batches(model, 48):
        model.zero_grad()
        loss_of(model, batch, **options).backward()
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                assert value.grad.isfinite().all(), parameter
                largest[parameter] = max(largest[parameter], value.grad.abs().max().item())
    return largest


@every
def test_every_parameter_is_trained_or_declared_frozen(name):
    model = made(name)
    found = gradients(model)
    assert set(model.frozen) <= set(found)
    idle = {parameter for parameter, largest in found.items() if largest < 1e-9}
    assert idle == set(model.frozen)


@every_modality
def test_parts_of_a_modality_are_trained_by_it_alone(name, modality):
    model = made(name)
    found, without = gradients(model), gradients(model, without=(modality,))
    for parameter, _ in model.parameters_of(modality):
        assert found[parameter] > 1e-9, parameter
        assert without[parameter] <= 0, parameter


@every
def test_nothing_is_invented_for_an_item_without_the_modality(name):
    """What stands in the row of an item that has no image or text is never looked at."""
    model = made(name)
    random = np.random.default_rng(0)
    odd = {}
    for modality, each in DATA.features.items():
        vectors = each.vectors.copy()
        vectors[~each.present] = 5 * random.standard_normal(each.vectors.shape[1])
        odd[modality] = Features(vectors, each.present, each.source)
    other = small(name, replace(DATA, features=odd))
    other.begin_epoch(np.random.default_rng(3))
    assert torch.equal(scores(shake(other).eval()), scores(model))


@every
def test_says_what_it_misses(name):
    cls = ranker_class(VARIANTS[name][0])
    needs: dict[str, Callable[[], TrainingData]] = {
        "times": lambda: replace(DATA, train=replace(DATA.train, days=None)),
        "categories": lambda: replace(DATA, categories=None),
        "prices": lambda: replace(DATA, prices=None),
    }
    for need in cls.needs:
        with pytest.raises(DataError, match=HINTS[need]):
            small(name, needs[need]())
    modalities = made(name).modalities
    if not modalities:
        scores(small(name, replace(DATA, features={}, categories=None, prices=None)))
        return
    with pytest.raises(DataError, match="|".join(HINTS[modality] for modality in modalities)):
        small(name, replace(DATA, features={}))
    for modality in modalities:
        rest = {other: each for other, each in DATA.features.items() if other != modality}
        try:
            model = small(name, replace(DATA, features=rest))
        except DataError as missing:
            assert HINTS[modality] in str(missing)
        else:  # a ranker that does with one of the two
            assert model.modalities == tuple(other for other in modalities if other != modality)
            assert model.modality_parts.keys() == {*model.modalities}
            model.begin_epoch(np.random.default_rng(0))
            assert scores(model.eval()).isfinite().all()
            for batch in training_batches(model, 32):
                assert loss_of(model.train(), batch).isfinite()


@every
def test_does_without_what_it_does_not_declare_to_need(name):
    model = made(name)
    bare = replace(
        DATA,
        train=DATA.train if "times" in model.needs else replace(DATA.train, days=None),
        categories=DATA.categories if "categories" in model.needs else None,
        prices=DATA.prices if "prices" in model.needs else None,
        features={modality: DATA.features[modality] for modality in model.modalities},
    )
    other = small(name, bare)
    other.begin_epoch(np.random.default_rng(0))
    batch = None
    if isinstance(other, SequenceRanker):
        batch = history_batch(bare, bare.train, DATA.train.users, other.config.length, "cpu")
        assert (batch.days is None) == ("times" not in model.needs)
    assert scores(other.eval(), batch).isfinite().all()
    drawn = 0 if model.losses[0] == "ce" else 2
    for batch, _ in Epochs(bare, model.examples, batch_size=64, length=16, negatives=drawn).epoch(0):
        assert loss_of(other.train(), batch).isfinite()
