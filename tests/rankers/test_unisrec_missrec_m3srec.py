"""UniSRec, MISSRec, M3SRec, and STOSA with multimodal experts, against their equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.rankers.batches import Batch, Epochs
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.models.m3srec import ExpertMixture, Fusion, M3SRec, M3SRecConfig, attended
from recllm.rankers.models.missrec import MISSRec, MISSRecConfig, distinct
from recllm.rankers.models.stosa_m3 import STOSAM3, ModalityExperts, STOSAM3Config
from recllm.rankers.models.unisrec import UniSRec, UniSRecConfig, WhiteningMixture
from recllm.rankers.training_data import Histories, TrainingData

ITEMS, NO_TEXT, NO_IMAGE = 24, 3, 5  # codes of an item without text, and of one without image


def features(width: int, missing: int, seed: int) -> Features:
    vectors = np.random.default_rng(seed).normal(size=(ITEMS, width)).astype(np.float32)
    present = np.ones(ITEMS, dtype=bool)
    vectors[missing], present[missing] = 0, False
    return Features(vectors, present, "drawn")


def tiny() -> TrainingData:
    random = np.random.default_rng(7)
    lengths = random.integers(3, 9, 12)
    items = np.concatenate([random.permutation(ITEMS)[:length] + 1 for length in lengths])
    train = Histories(np.arange(12), np.concatenate([[0], lengths.cumsum()]), items)
    given = {"text": features(6, NO_TEXT, 1), "image": features(5, NO_IMAGE, 2)}
    return TrainingData(12, ITEMS, train, given)


DATA = tiny()


def rows(*sequences: list[int], wider: int = 0) -> Batch:
    items = torch.zeros(len(sequences), max(map(len, sequences)) + wider, dtype=torch.int64)
    for row, sequence in zip(items, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return Batch(torch.arange(len(sequences)), items)


def shaken(model: torch.nn.Module, size: float = 0.3) -> torch.nn.Module:
    """Moves every parameter, so that none hides behind its first value."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)
        for part in model.modules():
            if isinstance(part, torch.nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx] = 0
    return model


def softmax(x: np.ndarray) -> np.ndarray:
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def numpy_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


# ---- UniSRec ----------------------------------------------------------------------------------------------


def test_adapter_equals_numpy():
    adapter = shaken(WhiteningMixture(DATA.features["text"], 8, 3, 0.2)).eval()
    part, x = numpy_of(adapter), DATA.features["text"].vectors.astype(float)
    shares = softmax(x @ part["gate"])
    whitened = np.stack([(x - b) @ w for b, w in zip(part["shifts"], part["weights"], strict=True)], 1)
    expected = (shares[..., None] * whitened).sum(1)
    expected[NO_TEXT] = 0
    np.testing.assert_allclose(adapter().detach(), expected, atol=1e-5)
    numbers = torch.tensor([[4, 0], [NO_TEXT + 1, 9]])
    np.testing.assert_allclose(adapter(numbers).detach()[[0, 1], [0, 1]], expected[[3, 8]], atol=1e-5)
    assert not adapter(numbers)[[0, 1], [1, 0]].any()


def test_gate_is_noisy_in_training_only_and_even_at_first():
    adapter = WhiteningMixture(DATA.features["text"], 8, 4, 0.0)
    vectors = torch.from_numpy(DATA.features["text"].vectors)
    torch.manual_seed(0)
    spread = torch.stack([adapter.train().shares(vectors) for _ in range(400)]).log()
    gaps = spread[..., 0] - spread[..., 1]
    assert gaps.std().item() == pytest.approx(math.sqrt(2) * (math.log(2) + 0.01), rel=0.05)
    assert gaps.mean().abs() < 0.03
    assert torch.equal(adapter.eval().shares(vectors), torch.full((ITEMS, 4), 0.25))
    assert not torch.equal(adapter.train()(), adapter())


@pytest.mark.parametrize("modalities", [("text",), ("text", "image")])
def test_unisrec_scores_cosines_and_learns_from_every_position(modalities):
    model = shaken(UniSRec(DATA, UniSRecConfig(modalities=modalities, width=8, inner=8)), 0.1).eval()
    batch = rows([1, 2, 3], [9, 8])
    vectors = sum(model.adapters[name]() for name in modalities) + model.items.weight[1:]
    torch.testing.assert_close(model.item_vectors(), F.normalize(vectors, dim=-1))
    torch.testing.assert_close(model(batch).norm(dim=-1)[0], torch.full((3,), 1 / 0.07))
    batch = next(Epochs(DATA, "positions", batch_size=12).epoch(0))[0]
    found = batch.targets > 0
    scores = model.score(model(batch)[found], model.item_vectors())
    expected = F.cross_entropy(scores, batch.targets[found] - 1)
    torch.testing.assert_close(model.loss(batch, Criterion()), expected)


@pytest.mark.parametrize("model", [UniSRec, MISSRec, M3SRec, STOSAM3])
def test_missing_vectors_are_named(model):
    with pytest.raises(DataError, match="--text"):
        model(TrainingData(12, ITEMS, DATA.train))


# ---- MISSRec ----------------------------------------------------------------------------------------------


def missrec(**options: object) -> MISSRec:
    model = shaken(MISSRec(DATA, MISSRecConfig(width=8, inner=8, heads=2, **options)))
    model.begin_epoch(np.random.default_rng(6))
    return model.eval()


def test_distinct_interests():
    random = np.random.default_rng(0)
    numbers = random.integers(0, 6, (50, 7))
    numbers[0] = 0
    for row, once in zip(numbers, distinct(torch.from_numpy(numbers)).numpy(), strict=True):
        assert sorted(once[once > 0]) == sorted(set(row) - {0})
        assert (once[(once > 0).sum() :] == 0).all()


def test_interests_are_means_of_adapted_vectors():
    model = missrec()
    tokens = torch.cat([model.text(), model.image()])
    interests = torch.cat([model.text_interests[1:], model.image_interests[1:]])
    assert interests[NO_TEXT] == 0 and interests[ITEMS + NO_IMAGE] == 0 and (interests > 0).sum() == 46
    assert len(model.centroids) == 23 + 1
    nearest = torch.cdist(tokens, model.centroids[1:]).argmin(1) + 1
    assert (interests == nearest)[interests > 0].all()
    assert (model.centroids[1:] < 0).any() and not model.centroids[0].any()
    assert {"centroids", "text_interests", "image_interests"} <= set(model.state_dict())


def test_padding_is_in_neither_memory_nor_second_term():
    """The release sums the memory over padding too."""
    model = missrec(interest_weight=1.0)
    sequences = [1, 2, 3, 4, 9, 12], [7], [NO_TEXT + 1]

    def second_term(*chosen: list[int], wider: int = 0) -> torch.Tensor:
        batch = rows(*chosen, wider=wider)
        targets = torch.zeros_like(batch.items)
        targets[:, 0] = 1
        batch = Batch(batch.users, batch.items, targets=targets)
        return model.loss(batch, lambda *_, score: torch.zeros(()))

    alone = []
    for sequence in sequences:
        numbers = torch.tensor(sequence)
        interests = torch.cat([model.text_interests[numbers], model.image_interests[numbers]]).unique()
        memory = model.centroids[interests[interests > 0]][None]
        for block in model.encoder:
            memory = block(memory, torch.ones(memory.shape[:2], dtype=torch.bool))
        alone.append(model.encoder_norm(memory).sum(1).square().sum() / 8)
    torch.testing.assert_close(second_term(*sequences, wider=2), torch.stack(alone).mean())

    before = model.states(rows(*sequences))
    model.centroids[0] = 100.0
    assert torch.equal(model.states(rows(*sequences)), before)


@pytest.mark.parametrize("transductive", [True, False])
def test_missrec_fuses_by_state_and_candidate(transductive):
    model = missrec(transductive=transductive)
    with torch.no_grad():
        model.fusion.fill_(3.0)
    states = model.states(rows([1, 2, 3], [4, 6])).double()

    def cosines(vectors: torch.Tensor) -> np.ndarray:
        return (states @ F.normalize(vectors.double(), dim=-1).T).detach().numpy()

    text, image = cosines(model.text()), cosines(model.image())
    both = np.stack([text, image], -1)
    fused = (softmax(3.0 * both) * both).sum(-1)
    fused[:, NO_TEXT], fused[:, NO_IMAGE] = image[:, NO_TEXT], text[:, NO_IMAGE]
    if transductive:
        fused = (cosines(model.items.weight[1:]) + 2 * fused) / 3
    scores = model.score(states.float(), model.item_vectors()).detach()
    np.testing.assert_allclose(scores, fused / 0.07, rtol=1e-4, atol=1e-4)


# ---- M3SRec -----------------------------------------------------------------------------------------------


def mixture_in_numpy(part: dict[str, np.ndarray], x: np.ndarray, shares: np.ndarray) -> np.ndarray:
    experts, inner = shares.shape[-1], len(part["contract"]) // shares.shape[-1]
    total = 0
    for k in range(experts):
        own = slice(k * inner, (k + 1) * inner)
        hidden = torch.from_numpy(x @ part["expand.weight"][own].T + part["expand.bias"][own])
        output = F.gelu(hidden).numpy() @ part["contract"][own] + part["shifts"][k]
        total = total + shares[..., k : k + 1] * output
    return total


def test_mixture_of_experts_equals_numpy():
    mixture = shaken(ExpertMixture(6, 5, 4, 3))
    part, x = numpy_of(mixture), np.random.default_rng(0).normal(size=(2, 7, 6))
    shares = softmax(x @ part["router.weight"].T + part["router.bias"])
    found = mixture(torch.from_numpy(x).float()).detach()
    np.testing.assert_allclose(found, mixture_in_numpy(part, x, shares), rtol=1e-4, atol=1e-5)


def test_fusion_equals_numpy_and_passes_over_what_is_not_there():
    fusion = shaken(Fusion(4))
    part, x = numpy_of(fusion), np.random.default_rng(0).normal(size=(5, 3, 4))
    there = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 0, 0]], bool)
    logits = (np.tanh(x @ part["hidden.weight"].T + part["hidden.bias"]) @ part["weight.weight"].T)[..., 0]
    expected = (softmax(np.where(there, logits, -np.inf))[..., None] * x).sum(1)
    found = fusion(torch.from_numpy(x).float(), torch.from_numpy(there)).detach()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_tokens_attend_to_no_later_item():
    places, there = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([[1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    allowed = attended(places, there)[0]
    for a in range(6):
        for b in range(6):
            assert allowed[a, b] == (a == b or (bool(there[0, b]) and a % 3 >= b % 3))


@pytest.mark.parametrize("model", [
    M3SRec(DATA, M3SRecConfig(width=8, inner=8, shared_layers=2)),
    STOSAM3(DATA, STOSAM3Config(width=8, length=9)),
])  # fmt: skip
def test_later_items_change_no_earlier_state_and_earlier_ones_change_later_states(model):
    model = shaken(model).eval()
    one, other = rows([1, 2, NO_IMAGE + 1, 4, 5, 6, 7]), rows([1, 2, NO_IMAGE + 1, 4, 9, NO_TEXT + 1, 11])
    torch.testing.assert_close(model(one)[:, :4], model(other)[:, :4], rtol=1e-5, atol=1e-5)
    changed = model(rows([8, 2, NO_IMAGE + 1, 4, 5, 6, 7])) - model(one)
    assert (changed.abs().amax(-1) > 1e-3).all()


def test_m3srec_has_no_token_of_a_modality_that_an_item_lacks():
    model = shaken(M3SRec(DATA, M3SRecConfig(width=8, inner=8))).eval()
    lacks, has = rows([NO_IMAGE + 1, NO_IMAGE + 1]), rows([NO_IMAGE + 1, 2])
    before = model(lacks), model(has)
    with torch.no_grad():
        model.kinds["image"] += torch.randn(8)
    assert torch.equal(model(lacks), before[0])
    assert not torch.allclose(model(has)[:, 1], before[1][:, 1])


# ---- STOSA with multimodal experts ------------------------------------------------------------------------


def test_experts_are_mixed_at_every_position():
    """The release mixes those of position 0, by weights read at positions 0 to 3, for all positions."""
    names, random = ("id", "text", "image"), np.random.default_rng(0)
    experts = shaken(ModalityExperts(names, 8, 2, 4))
    x = {name: random.normal(size=(2, 6, 8)) for name in names}
    x["image"][1, 4] = 0

    def routed(part: dict[str, np.ndarray], given: np.ndarray) -> np.ndarray:
        hidden = torch.from_numpy(given @ part["router.0.weight"].T + part["router.0.bias"])
        return softmax(F.gelu(hidden).numpy() @ part["router.2.weight"].T + part["router.2.bias"])

    part, joined = numpy_of(experts.shared), np.concatenate(list(x.values()), -1)
    outputs = [mixture_in_numpy(part, joined, routed(part, joined))]
    for name in names:
        part = numpy_of(experts.own[name])
        outputs.append(mixture_in_numpy(part, x[name] + outputs[0], routed(part, x[name])))
    outputs[-1][1, 4] = 0
    part = numpy_of(experts.weights)
    logits = np.concatenate(outputs, -1) @ part["weight"].T + part["bias"]
    logits[1, 4, -1] = -np.inf
    expected = (softmax(logits)[..., None] * np.stack(outputs, -2)).sum(-2)
    found = experts({name: torch.from_numpy(value).float() for name, value in x.items()}).detach()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_mean_stream_sees_context():
    """In the release the mean of a sequence is its last item's input."""
    model = shaken(STOSAM3(DATA, STOSAM3Config(width=8, layers=1))).eval()
    difference = model.states(rows([1, 2, 3])) - model.states(rows([9, 2, 3]))
    assert difference[:, :8].abs().max() > 1e-3
