"""Layers that several sequence models are made of."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.rankers.features import Features

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def dropout(x: Tensor, share: float) -> Tensor:
    """Sets a share of the values to 0, rounded to 65,536ths, and scales the others up.

    Ours on the CPU, where a value costs 16 random bits: torch draws value after value on processors that are
    not Intel's, which takes a multiple of the time.
    """
    if share in (0, 1) or x.device.type != "cpu":
        return F.dropout(x, share)
    dropped = min(round(share * 2**16), 2**16 - 1)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    keep = torch.ge(bits, dropped - 2**15, out=torch.empty_like(x, requires_grad=False))
    return x * keep.mul_(2**16 / (2**16 - dropped))


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropped: float, *, causal: bool = False
) -> Tensor:
    """Returns softmax(Q K^T / sqrt(d)) V, with dropout of the weights.

    Args:
        query: Shape [..., T, d].
        key: Shape [..., S, d].
        value: Shape [..., S, d].
        mask: Where a query attends to a key; bool, shape [..., T, S]. None: everywhere.
        dropped: The share of the weights that is dropped.
        causal: No query attends to a key behind its own place; without a mask.
    """
    if dropped == 0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, mask, dropped, causal)
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout(scores.softmax(-1), dropped) @ value


class Dropout(nn.Dropout):
    """torch's, drawn by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, in training with dropout."""
        return dropout(x, self.p) if self.training else x


class CrossAttention(nn.Module):
    """Multi-head attention to another sequence: softmax(Q K^T / sqrt(width / heads)) V."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, known: Tensor) -> Tensor:
        """Maps x [B, T, width] by what it reads in memory [B, S, width] where that is known [B, S]."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pairs = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0
        mixed = attention(query, *pairs, known[:, None, None, :], dropped)
        return self.output(mixed.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself: softmax(Q K^T / sqrt(width / heads)) V."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, known: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: Shape [B, T, width].
            known: Where there is something to attend to; bool, shape [B, T]. None: each position attends to
                itself and those before it, which padding on the right can never be.
        """
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if known is None else known[:, None, None, :]
        dropped = self.dropout if self.training else 0
        mixed = attention(*heads, mask, dropped, causal=known is None)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A Transformer layer: attention and a two-layer network, each with dropout and a residual.

    Args:
        width: d.
        heads: Attention heads.
        inner: Width within the two-layer network.
        dropout: After attention and network, and of the attention's weights.
        activation: Of the network.
        norm: `first`: x + f(LayerNorm(x)) (SASRec); `last`: LayerNorm(x + f(x)) (BERT4Rec).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        dropout: float,
        activation: Literal["relu", "gelu"] = "gelu",
        norm: Literal["first", "last"] = "last",
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, dropout)
        self.expand, self.contract = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = Dropout(dropout)
        self.activation, self.norm = ACTIVATIONS[activation], norm

    def forward(self, x: Tensor, known: Tensor | None = None) -> Tensor:
        """Maps [B, T, width] to [B, T, width]; `known` as in `SelfAttention`."""
        if self.norm == "first":
            x = x + self.dropout(self.attention(self.norms[0](x), known))
            return x + self.dropout(self._network(self.norms[1](x)))
        x = self.norms[0](x + self.dropout(self.attention(x, known)))
        return self.norms[1](x + self.dropout(self._network(x)))

    def _network(self, x: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x)))


class FrozenFeatures(nn.Module):
    """Vectors of items that no training changes, and which items have one.

    The vectors are no part of a checkpoint: they come from the catalog, and are compared by fingerprint.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.width = features.vectors.shape[1]
        padded = torch.zeros(len(features.vectors) + 1, self.width)
        padded[1:] = torch.from_numpy(features.vectors)
        present = torch.zeros(len(padded), 1)
        present[1:, 0] = torch.from_numpy(features.present).float()
        self.register_buffer("vectors", padded, persistent=False)
        self.register_buffer("present", present, persistent=False)

    def forward(self, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns vectors [..., width] and presence [..., 1] (1 or 0) of item numbers, or of the whole
        catalog by code. Padding and items without the modality have zeros."""
        if numbers is None:
            return self.vectors[1:], self.present[1:]
        return self.vectors[numbers], self.present[numbers]


class Projection(nn.Module):
    """Frozen features, mapped linearly to a width; zero where an item has none, so that none is invented."""

    def __init__(self, features: Features, width: int, bias: bool = True) -> None:
        super().__init__()
        self.features = FrozenFeatures(features)
        self.linear = nn.Linear(self.features.width, width, bias=bias)

    def forward(self, numbers: Tensor | None = None, *, zeroed: bool = False) -> Tensor:
        """Returns the projections [..., width] of item numbers, or of the whole catalog by code."""
        if zeroed:
            rows = self.features.vectors[1:] if numbers is None else numbers[..., None]
            return self.linear.weight.new_zeros(*rows.shape[:-1], self.linear.out_features)
        vectors, present = self.features(numbers)
        return self.linear(vectors) * present


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Initializes linear and embedding weights from N(0, std), biases with 0, norms with 1 (BERT)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=std)
            if part.padding_idx is not None:
                with torch.no_grad():
                    part.weight[part.padding_idx].zero_()
