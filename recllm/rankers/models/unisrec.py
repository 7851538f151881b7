"""UniSRec: Towards Universal Sequence Representation Learning (Hou et al., KDD 2022, arXiv 2206.05941).

The adapter maps an item's frozen text vector x to the width d by a mixture of K whitenings:

    x~_k = (Dropout(x) - b_k) W_k                                (eq. 2) parametric whitening
    v    = sum_k g_k x~_k                                        (eq. 3)
    g    = softmax(x W_g + eps * (softplus(x W_n) + 0.01))       (eq. 4, 5) eps ~ N(0, 1), in training only

A causal Transformer (post-norm, GELU) reads Dropout(LayerNorm(v_j + p_j)), with an embedding p_j of the
position (eq. 6, 7). Its output at position t is s_t, and an item scores cos(s_t, v_i) / tau. Transductive:
v_i + e_i stands for v_i in both places, with an embedding e_i of the item's number.

Shapes: items [B, T], states [B, T, d], items' vectors [I, d]. Scores are inner products of normalized
vectors, of which the states are divided by tau.

Loss: cross-entropy over the whole catalog, after every item at once; the paper takes each prefix as a row of
its own. Without its pre-training on other domains.
Ours: images by an adapter of their own, added to that of the text (`modalities`); the experts share one mask
of dropout; a step adapts the catalog once, so that an item has the same vector in the sequence and as a
candidate; an item without the modality has v = 0, and not -sum_k g_k b_k W_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.layers import Block, Dropout, FrozenFeatures, init_normal
from recllm.rankers.ranker import SequenceRanker, Without
from recllm.rankers.training_data import TrainingData

Modality = Literal["text", "image"]


@dataclass(frozen=True)
class UniSRecConfig:
    """Sizes of UniSRec."""

    modalities: tuple[Modality, ...] = ("text",)
    """What is adapted: text (the paper's), image, or both."""
    transductive: bool = True
    """Also gives each item an embedding by its number."""
    width: int = 300
    """d: width of items and states."""
    experts: int = 8
    """K: whitenings of an adapter."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 2
    """Attention heads."""
    inner: int = 256
    """Width within a layer's network."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.5
    """Of the Transformer."""
    adapter_dropout: float = 0.2
    """Of the features, before they are whitened."""
    temperature: float = 0.07
    """tau: cosines are divided by it."""


class WhiteningMixture(nn.Module):
    """The adapter: a mixture of parametric whitenings of frozen vectors."""

    def __init__(self, features: Features, width: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.features = FrozenFeatures(features)
        self.weights = nn.Parameter(torch.empty(experts, self.features.width, width))
        self.shifts = nn.Parameter(torch.zeros(experts, self.features.width))
        self.gate = nn.Parameter(torch.zeros(self.features.width, experts))
        self.noise = nn.Parameter(torch.zeros(self.features.width, experts))
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.weights, std=0.02)

    def forward(self, numbers: Tensor | None = None, *, zeroed: bool = False) -> Tensor:
        """Returns the adapted vectors [..., width] of item numbers, or of the whole catalog by code."""
        vectors, present = self.features(numbers)
        if zeroed:
            return vectors.new_zeros(*vectors.shape[:-1], self.weights.shape[2])
        experts, width, out = self.weights.shape
        side_by_side = self.weights.transpose(0, 1).reshape(width, experts * out)
        mapped = (self.dropout(vectors) @ side_by_side).unflatten(-1, (experts, out))
        shifted = torch.einsum("kf,kfd->kd", self.shifts, self.weights)
        shares = self.shares(vectors)
        return present * (torch.einsum("...k,...kd->...d", shares, mapped) - shares @ shifted)

    def shares(self, vectors: Tensor) -> Tensor:
        """Returns how much each expert counts, [..., K]; noisy in training."""
        logits = vectors @ self.gate
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(vectors @ self.noise) + 0.01)
        return logits.softmax(-1)


class UniSRec(SequenceRanker):
    """Reads what items are about, by self-attention over adapted texts, and compares by cosine."""

    Config: ClassVar[type] = UniSRecConfig
    modalities = ("text",)
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {"text": ("adapters.text",)}

    def __init__(self, data: TrainingData, config: UniSRecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UniSRecConfig()
        self.modalities = tuple(config.modalities)
        self.modality_parts = {name: (f"adapters.{name}",) for name in self.modalities}
        if not self.modalities:
            raise DataError("UniSRec has no modalities; expected text, image or both (modalities)")
        for name in self.modalities:
            if name not in data.features:
                raise DataError(f"UniSRec needs vectors of the items' {name}s; give --{name}")
        width = config.width
        self.items = nn.Embedding(data.n_items + 1, width, padding_idx=0) if config.transductive else None
        self.positions = nn.Embedding(config.length, width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.inner, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        init_normal(self)
        self.adapters = nn.ModuleDict(
            {
                name: WhiteningMixture(data.features[name], width, config.experts, config.adapter_dropout)
                for name in self.modalities
            }
        )

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state after each item, normalized and divided by tau; shape [B, T, d]."""
        numbers, rows = batch.items.unique(return_inverse=True)
        return self._read(self._embed(numbers, without)[rows])

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the normalized vectors of all items; shape [I, d]."""
        return F.normalize(self._embed(None, without), dim=-1)

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares each position's state with the item that came next."""
        catalog = self._embed(None, without)
        padded = F.pad(catalog, (0, 0, 1, 0))
        picked = [part.at_targets(self._read(padded[part.items])) for _, part in batch.by_length()]
        states, targets, negatives = zip(*picked, strict=True)
        return criterion(
            torch.cat(states),
            F.normalize(catalog, dim=-1),
            torch.cat(targets),
            None if negatives[0] is None else torch.cat(negatives),
        )

    def _embed(self, numbers: Tensor | None, without: Without) -> Tensor:
        """v (+ e) of item numbers, or of the whole catalog by code."""
        adapted = [adapter(numbers, zeroed=name in without) for name, adapter in self.adapters.items()]
        vectors = sum(adapted[1:], adapted[0])
        if self.items is None:
            return vectors
        return vectors + (self.items.weight[1:] if numbers is None else self.items(numbers))

    def _read(self, vectors: Tensor) -> Tensor:
        """Maps v of sequences, [B, T, d], to states."""
        place = torch.arange(vectors.shape[1], device=vectors.device)
        x = self.dropout(self.norm(vectors + self.positions(place)))
        for block in self.blocks:
            x = block(x)
        return F.normalize(x, dim=-1) / self.config.temperature
