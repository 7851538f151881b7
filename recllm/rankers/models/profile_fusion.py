"""Trained fusions of text and image for mean-profile retrieval: the baselines of VLM4Rec (arXiv 2603.12625).

With the frozen vectors t, v of an item at unit length, h_t = W_t t + b_t and h_v = W_v v + b_v (width d):

    text, image   x = h_t;  x = h_v                          what training alone gives
    average       x = (h_t + h_v) / 2
    concat        x = [h_t; h_v]
    attention     a = softmax(MLP([h_t; h_v])) in R^2;       x = a_t h_t + a_v h_v
    gating        g = sigma(MLP([h_t; h_v])) in R^d;         x = g * h_t + (1 - g) * h_v
    cross         x = [A_t h_v; A_v h_t]
    spectral      c_m = F^-1(F(h_m) * w_m),  c_f = F^-1(F(h_t) * F(h_v) * w_f)  as in SMORE;
                  x = a_t c_t + a_v c_v + a_f c_f,  a = softmax(Q [c_t; c_v; c_f]) in R^3

    f = ReLU(LayerNorm(W x + b)) / |.|                       the item's vector, shape [I, d]
    r = mean of f over the latest items of the history       VLM4Rec eq. 15
    score(u, j) = cos(r_u, f_j)                              VLM4Rec eq. 17

MLP is two linear maps with a ReLU between; the widths, blocks and f are those of the release. Its cross-modal
attention has sequences of one token, over which a softmax is 1: what is left are value and output map, one
linear map A. `spectral` is the fusion of SMORE as an encoder of items; SMORE with its graphs is the ranker
`smore`. All fusions end in the same block, so that two of them differ by x alone.

Loss: InfoNCE over the temperature 0.07 (`sampled-ce`).  Repaired: in the release the positive of an item is
the item itself, so that the loss only repels; here it is the item that follows in a training history. Its
negatives may be the user's own items; here none is. It restores the last epoch; `fit` keeps the best.

Ours: what a positive follows is the profile of the items before it, as in ranking (`anchor: item` takes the
one item before it); an item without a modality has h_m = 0, and one without any is in no profile, is no
positive, and scores 0; there is no table of item numbers, so that cold items are ranked as all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.layers import Projection
from recllm.rankers.models.smore import denoise
from recllm.rankers.models.smore import fuse as fuse_spectra
from recllm.rankers.pairs import MODALITIES, content_of
from recllm.rankers.ranker import SequenceRanker, Without
from recllm.rankers.training_data import TrainingData

Fusion = Literal["text", "image", "average", "concat", "attention", "gating", "cross", "spectral"]


@dataclass(frozen=True)
class ProfileFusionConfig:
    """Sizes of a trained fusion."""

    transductive: ClassVar[bool] = False
    fusion: Fusion = "attention"
    """How text and image become one vector: attention, gating, cross, spectral, average or concat; text or
    image trains the same network on one of them."""
    width: int = 512
    """d: width of the projections and of an item's vector."""
    recent: int = 10
    """Latest items with content that make a profile."""
    length: int = 50
    """Items of a history that are read."""
    anchor: Literal["profile", "item"] = "profile"
    """What a positive follows in training: the profile of the items before it, or the one item before it."""
    temperature: float = 0.07
    """Cosines are divided by it."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the fusion reads."""
        return (self.fusion,) if self.fusion in MODALITIES else MODALITIES


class ProfileFusion(SequenceRanker):
    """Ranks by the cosine of an item's fused vector to the mean of those of the latest items."""

    Config: ClassVar[type] = ProfileFusionConfig
    losses = ("sampled-ce", "bpr", "ce")
    modalities = MODALITIES
    modality_parts: ClassVar = {"text": ("text",), "image": ("image",)}

    def __init__(self, data: TrainingData, config: ProfileFusionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ProfileFusionConfig()
        self.modalities = config.modalities
        self.modality_parts = {modality: (modality,) for modality in self.modalities}
        content = content_of(data, f"The fusion {config.fusion!r}", needed=self.modalities)
        for modality in self.modalities:
            self.add_module(modality, Projection(at_unit_length(content[modality]), config.width))
        self.fusion = FUSIONS[config.fusion](config.width)
        width = config.width * (2 if config.fusion in ("concat", "cross") else 1)
        self.output = nn.Sequential(nn.Linear(width, config.width), nn.LayerNorm(config.width), nn.ReLU())
        known = np.any([content[modality].present for modality in self.modalities], axis=0)
        self.register_buffer("known", torch.from_numpy(np.append(False, known)), persistent=False)

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the fused vectors of all items at unit length; zero for items without content; [I, d]."""
        numbers = torch.arange(1, len(self.known), device=self.known.device)
        return self._encode(numbers, without)

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the profile after each item, over the temperature; shape [B, T, d]."""
        numbers, place = batch.items.unique(return_inverse=True)
        return self._profiles(self._encode(numbers, without)[place], batch, self.config.recent, without)

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares profiles with the items that follow. Only the items of the batch are encoded, except for
        `ce`, which compares with the catalog."""
        drawn = [] if batch.negatives is None else [batch.negatives.flatten()]
        numbers = torch.cat([batch.items.flatten(), batch.targets.flatten(), *drawn])
        if criterion.loss == "ce":
            numbers = torch.arange(len(self.known), device=numbers.device)
        numbers = numbers.unique()  # in order: the place of a number is found by bisection
        vectors = self._encode(numbers, without)
        recent = 1 if self.config.anchor == "item" else self.config.recent
        states = self._profiles(vectors[torch.searchsorted(numbers, batch.items)], batch, recent, without)
        states, targets, negatives = batch.at_targets(states)
        known = self._known(without)
        taught = known[targets + 1] & states.detach().any(1)  # a profile, and an item with content
        if not taught.any():
            return vectors.sum() * 0.0
        compared = vectors
        if criterion.loss == "ce":
            compared, places = vectors[1:], targets
        else:
            places = torch.searchsorted(numbers, targets + 1)
            negatives = torch.searchsorted(numbers, negatives[taught] + 1)
        mean = criterion(states[taught], compared, places[taught], negatives)
        return mean * (taught.sum() / len(taught))  # a mean over all targets, also where processes share them

    def _known(self, without: Without) -> Tensor:
        """Returns which item numbers have content beside what is left out; bool, shape [I + 1]."""
        if not without:
            return self.known
        left = [self.get_submodule(name).features.present for name in self.modalities if name not in without]
        return torch.cat(left, 1).any(1) if left else torch.zeros_like(self.known)

    def _encode(self, numbers: Tensor, without: Without) -> Tensor:
        """Returns the fused vectors of item numbers at unit length; [N] to [N, d]."""
        projected = [
            self.get_submodule(modality)(numbers, zeroed=modality in without) for modality in self.modalities
        ]
        fused = self.output(self.fusion(*projected))
        return F.normalize(fused, dim=-1) * self._known(without)[numbers][:, None]

    def _profiles(self, vectors: Tensor, batch: Batch, recent: int, without: Without) -> Tensor:
        """Returns the mean of the latest `recent` vectors of items with content, at unit length over the
        temperature: [B, T, d] to [B, T, d]."""
        known = self._known(without)[batch.items]
        count = known.cumsum(1)
        age = count[:, :, None] - count[:, None, :]  # of item j after item t; negative for later ones
        chosen = (age >= 0) & (age < recent) & known[:, None, :]
        return F.normalize(chosen.to(vectors.dtype) @ vectors, dim=-1) / self.config.temperature


class One(nn.Module):
    """x = h, of one modality."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, vectors: Tensor) -> Tensor:
        """[N, d] to [N, d]."""
        return vectors


class Average(nn.Module):
    """x = (h_t + h_v) / 2."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """[N, d] twice to [N, d]."""
        return (text + image) / 2


class Concat(Average):
    """x = [h_t; h_v]."""

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """[N, d] twice to [N, 2d]."""
        return torch.cat([text, image], -1)


class Attention(nn.Module):
    """x = a_t h_t + a_v h_v, with a of two numbers for each item."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shares = two_layers(2 * width, width, 2)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """[N, d] twice to [N, d]."""
        shares = self.shares(torch.cat([text, image], -1)).softmax(-1)
        return shares[:, :1] * text + shares[:, 1:] * image


class Gating(nn.Module):
    """x = g * h_t + (1 - g) * h_v, with a gate for each feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = two_layers(2 * width, width, width)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """[N, d] twice to [N, d]."""
        gate = self.gate(torch.cat([text, image], -1)).sigmoid()
        return gate * text + (1 - gate) * image


class Cross(nn.Module):
    """x = [A_t h_v; A_v h_t]: the attention of one token on one token of the other modality."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_text, self.to_image = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """[N, d] twice to [N, 2d]."""
        return torch.cat([self.to_text(image), self.to_image(text)], -1)


class Spectral(nn.Module):
    """x = a_t c_t + a_v c_v + a_f c_f: filtered spectra and their product. Filters [d / 2 + 1, 2] start at 1,
    as in the release."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("of_text", "of_image", "of_both"):
            self.register_parameter(name, nn.Parameter(torch.tensor([1.0, 0.0]).repeat(width // 2 + 1, 1)))
        self.shares = nn.Linear(3 * width, 3)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """[N, d] twice to [N, d]."""
        views = torch.stack(
            [
                denoise(text, self.of_text),
                denoise(image, self.of_image),
                fuse_spectra(text, image, self.of_both),
            ],
            1,
        )
        shares = self.shares(views.flatten(1)).softmax(-1)
        return (shares[:, :, None] * views).sum(1)


FUSIONS: dict[str, Callable[[int], nn.Module]] = {
    "text": One,
    "image": One,
    "average": Average,
    "concat": Concat,
    "attention": Attention,
    "gating": Gating,
    "cross": Cross,
    "spectral": Spectral,
}


def two_layers(width: int, inner: int, out: int) -> nn.Sequential:
    """Returns two linear maps with a ReLU between."""
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, out))


def at_unit_length(features: Features) -> Features:
    """Returns the features with vectors of length 1; those of length 0 stay."""
    length = np.linalg.norm(features.vectors.astype(np.float64), axis=1, keepdims=True)
    vectors = (features.vectors / np.where(length > 0, length, 1)).astype(np.float32)
    return Features(vectors, features.present, features.source)
