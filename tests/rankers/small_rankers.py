"""Every ranker, small, on the tiny world: how the battery makes them, feeds them and reads them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recllm.rankers import RANKERS, ranker_class
from recllm.rankers.batches import Batch, Epochs, history_batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.ranker import PairRanker, Ranker, SequenceRanker
from recllm.rankers.training_data import TrainingData
from tests.rankers import worlds

# With fewer neighbors, ties at the last place are broken by the items' codes.
REFINED = {"refine": True, "threshold": 0.2, "audience_neighbors": worlds.ITEMS}
VARIANTS = {
    **{name: (name, {}) for name in RANKERS},
    "unisrec-both": ("unisrec", {"modalities": ("text", "image")}),
    "freedom-refined": ("freedom", REFINED),
    "mllmrec": ("mllmrec", {"threshold": 0.2, "audience_neighbors": worlds.ITEMS}),
    "mllmrec-graph": ("mllmrec", {"reasoning": False, "item_graph": False, "user_graph": True}),
    "missrec": ("missrec", {"interest_share": 0.3}),
    "mmsbr": ("mmsbr", {"rounds": 2}),
    **{f"profile-{name}": ("profile_fusion", {"fusion": name}) for name in ("gating", "cross", "spectral")},
}
SEQUENTIAL = [name for name in VARIANTS if issubclass(ranker_class(VARIANTS[name][0]), SequenceRanker)]
CAUSAL = [name for name in SEQUENTIAL if ranker_class(VARIANTS[name][0]).examples == "positions"]
MODALITIES = [
    (name, modality)
    for name, (ranker, chosen) in VARIANTS.items()
    for modality in chosen.get("modalities", ranker_class(ranker).modalities)
]
SIZES = {"width": 16, "length": 16, "heads": 2, "inner": 24, "experts": 2, "clusters": 8}
HINTS = {"text": "--text", "image": "--image", "times": "time", "categories": "categor", "prices": "price"}
"""What an error about something that is missing must tell."""
DATA = worlds.tiny_data()

every = pytest.mark.parametrize("name", VARIANTS)
every_sequential = pytest.mark.parametrize("name", SEQUENTIAL)
every_causal = pytest.mark.parametrize("name", CAUSAL)
every_modality = pytest.mark.parametrize(("name", "modality"), MODALITIES)


def small(name: str, data: TrainingData = DATA, seed: int = 0) -> Ranker:
    """Makes a narrow ranker without dropout and regularization."""
    ranker, chosen = VARIANTS[name]
    cls = ranker_class(ranker)
    fields = cls.Config.__dataclass_fields__
    plain = {field: 0.0 for field in fields if "dropout" in field or field == "regularization"}
    torch.manual_seed(seed)
    return cls(data, cls.Config(**{**{k: v for k, v in SIZES.items() if k in fields}, **plain, **chosen}))


def shake(model: Ranker, size: float = 0.1) -> Ranker:
    """Moves all parameters, padding excepted: where one stands at zero, much would go unnoticed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)
        for part in model.modules():
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx] = 0
    return model


@functools.cache
def made(name: str) -> Ranker:
    """A ranker within its first epoch, in eval mode. Tests change copies of it."""
    model = small(name)
    model.begin_epoch(np.random.default_rng(3))
    return shake(model).eval()


def training_batches(model: Ranker, size: int = 64, number: int = 0, drawn: int = 2) -> Iterator[Batch]:
    """An epoch for the ranker's own loss, with so many negatives where it takes any."""
    negatives = 0 if model.losses[0] == "ce" else drawn
    length = getattr(model.config, "length", 16)
    epochs = Epochs(DATA, model.examples, batch_size=size, length=length, negatives=negatives)
    return (batch for batch, _ in epochs.epoch(number))


def loss_of(model: Ranker, batch: Batch, **options: object) -> Tensor:
    torch.manual_seed(5)
    return model.loss(batch, Criterion(model.losses[0]), **options)


def known(model: Ranker, users: np.ndarray | None = None) -> Batch:
    """The training histories of users; of all, the one without any among them, where none are named."""
    users = np.arange(worlds.USERS) if users is None else users
    return history_batch(DATA, DATA.train, users, model.config.length, "cpu")


def scores(model: Ranker, batch: Batch | None = None, **options: object) -> Tensor:
    """Scores of all items, for the rows of a batch or for all users."""
    with torch.no_grad():
        if isinstance(model, PairRanker):
            return model.score(*model.vectors(**options))
        batch = known(model) if batch is None else batch
        return model.score(model.states(batch, **options), model.item_vectors(**options))


def near(a: Tensor, b: Tensor) -> bool:
    """Whether values are equal but for rounding at their scale."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


def ndcg_at_10(model: Ranker) -> float:
    """Of each user's latest training item after those before it; for pairs, of all training items."""
    if isinstance(model, PairRanker):
        relevant = np.zeros((worlds.USERS, worlds.ITEMS), bool)
        relevant[DATA.pairs()] = True
        found, relevant = scores(model).numpy()[DATA.train.users], relevant[DATA.train.users]
    else:
        before, latest = worlds.without_last(DATA)
        batch = history_batch(DATA, before, DATA.train.users, model.config.length, "cpu")
        found, relevant = scores(model, batch).numpy(), np.arange(1, worlds.ITEMS + 1) == latest[:, None]
    gains = np.take_along_axis(relevant, np.argsort(-found, axis=1, kind="stable")[:, :10], 1)
    discounts = 1 / np.log2(np.arange(2, 12))
    ideal = [discounts[: min(10, count)].sum() for count in relevant.sum(1)]
    return float((gains @ discounts / ideal).mean())
