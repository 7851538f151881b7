"""STOSA: Sequential Recommendation via Stochastic Self-Attention (Fan et al., WWW 2022, arXiv 2201.06035).

Each item is a Gaussian with a mean and a diagonal covariance, each with a table and positions of its own;
both streams go through LayerNorm, dropout and ELU, and a 1 more keeps covariances positive. With queries,
keys and values of both streams,

    W2(a, b)^2 = |mu_a - mu_b|^2 + |sqrt S_a - sqrt S_b|^2       (eq. 9) the squared 2-Wasserstein distance
    A          = softmax(-W2(q, k)^2 / sqrt(d / heads))          (eq. 8) causal
    mu         = A mu_V,   S = A^2 S_V                           (eq. 10) A^2 element by element
    FFN        = LayerNorm(x + Dropout(B ELU(A x + a) + b))      (eq. 11) inner width 4 d, one for each stream

    D(s, i)    = W2(state, Gaussian of item i)^2                 (eq. 12) less is better

Loss (eq. 13 to 15): -log sigma(D(s, n) - D(s, p)) + weight * max(0, D(s, p) - D(p, n)) for each position with
its next item p and a drawn item n; the mean over several n, where there are.

Shapes: items [B, T], each stream [B, T, d]; state [B, T, 2 d + 1], items' vectors [I, 2 d + 1]. A squared
distance is an inner product up to a number of the state's own, which moves no ranking:

    -W2(s, i)^2 = [2 mu_s, 2 sqrt S_s, -1] . [mu_i, sqrt S_i, |mu_i|^2 + tr S_i] - |mu_s|^2 - tr S_s

Repaired: in the release the mean stream of every layer is written to a misspelt name, so that the mean of a
sequence is its last item's input and only covariances see context; here both streams do. Its negatives avoid
the user's held-out items, which tells them; here they avoid training items alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.layers import Dropout
from recllm.rankers.pairs import compare
from recllm.rankers.ranker import SequenceRanker, Without, states_at_targets
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class STOSAConfig:
    """Sizes of STOSA; the defaults are those of the authors' command for Beauty."""

    width: int = 64
    """d: width of a mean and of a covariance."""
    layers: int = 1
    """Stochastic self-attention layers."""
    heads: int = 4
    """Attention heads."""
    length: int = 100
    """Latest items that are read."""
    dropout: float = 0.3
    """Of embeddings and networks."""
    attention_dropout: float = 0.0
    """Of the attention's weights."""
    positive_negative_weight: float = 0.005
    """Weight of the second term of the loss: a positive is to be closer to the state than to a negative."""


def squared_wasserstein(means: Tensor, roots: Tensor, other_means: Tensor, other_roots: Tensor) -> Tensor:
    """Squared 2-Wasserstein distances of diagonal Gaussians, all pairs.

    Args:
        means: Shape [..., n, d].
        roots: Square roots of the covariances' diagonals; shape [..., n, d].
        other_means: Shape [..., m, d].
        other_roots: Shape [..., m, d].

    Returns:
        Shape [..., n, m].
    """
    here, there = torch.cat([means, roots], -1), torch.cat([other_means, other_roots], -1)
    squares = here.square().sum(-1)[..., :, None] + there.square().sum(-1)[..., None, :]
    return (squares - 2 * here @ there.transpose(-1, -2)).clamp(min=0)


class WassersteinAttention(nn.Module):
    """Causal self-attention of Gaussians (eq. 8 to 10); each stream with dropout, residual, LayerNorm."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.mean_parts, self.covariance_parts = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.mean_output, self.covariance_output = nn.Linear(width, width), nn.Linear(width, width)
        self.mean_norm, self.covariance_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.attention_dropout = Dropout(dropout), Dropout(attention_dropout)

    def forward(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Maps both streams, each [B, T, width]."""
        query, key, value = self._heads(self.mean_parts(mean))
        spread_query, spread_key, spread_value = self._heads(positive(self.covariance_parts(covariance)))
        distance = squared_wasserstein(query, spread_query.sqrt(), key, spread_key.sqrt())
        length = mean.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=mean.device).triu(1)
        weights = (-distance / math.sqrt(query.shape[-1])).masked_fill(later, -torch.inf).softmax(-1)
        weights = self.attention_dropout(weights)
        mixed = self.mean_output(_merged(weights @ value))
        spread = self.covariance_output(_merged(weights.square() @ spread_value))
        mixed = self.mean_norm(mean + self.dropout(mixed))
        return mixed, self.covariance_norm(covariance + self.dropout(spread))

    def _heads(self, parts: Tensor) -> Tensor:
        """[B, T, 3 width] to query, key and value [3, B, heads, T, width / heads]."""
        batch, length, _ = parts.shape
        return parts.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)


class StochasticBlock(nn.Module):
    """A layer: stochastic attention, then a network for each stream."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = WassersteinAttention(width, heads, dropout, attention_dropout)
        self.mean_network, self.covariance_network = Network(width, dropout), Network(width, dropout)

    def forward(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Maps both streams, each [B, T, width]; the covariance that comes out is positive."""
        mean, covariance = self.attention(mean, covariance)
        return self.mean_network(mean), positive(self.covariance_network(covariance))


class Network(nn.Module):
    """LayerNorm(x + Dropout(W2 ELU(W1 x)))  (eq. 11)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.dropout = nn.LayerNorm(width), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., width] to [..., width]."""
        return self.norm(x + self.dropout(self.contract(F.elu(self.expand(x)))))


class STOSA(SequenceRanker):
    """Reads a sequence of Gaussians, and foretells the next by distance."""

    Config: ClassVar[type] = STOSAConfig
    losses = ("bpr", "ce", "sampled-ce")

    def __init__(self, data: TrainingData, config: STOSAConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or STOSAConfig()
        width, count = config.width, data.n_items + 1
        self.means, self.covariances = (nn.Embedding(count, width, padding_idx=0) for _ in range(2))
        self.mean_positions, self.covariance_positions = (
            nn.Embedding(config.length, width) for _ in range(2)
        )
        self.mean_norm, self.covariance_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            StochasticBlock(width, config.heads, config.dropout, config.attention_dropout)
            for _ in range(config.layers)
        )
        init_gaussian(self)

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state after each item; shape [B, T, 2 d + 1]."""
        place = torch.arange(batch.items.shape[1], device=batch.items.device)
        mean = self.means(batch.items) + self.mean_positions(place)
        covariance = self.covariances(batch.items) + self.covariance_positions(place)
        mean = F.elu(self.dropout(self.mean_norm(mean)))
        covariance = positive(self.dropout(self.covariance_norm(covariance)))
        for block in self.blocks:
            mean, covariance = block(mean, covariance)
        return as_state(mean, covariance)

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the items' Gaussians as vectors; shape [I, 2 d + 1]."""
        return as_item(self.means.weight[1:], positive(self.covariances.weight[1:]))

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """The criterion, and where there are negatives the second term of the loss."""
        states, targets, negatives = states_at_targets(self, batch, without=without)
        if negatives is None:
            return criterion(states, self.item_vectors(without=without), targets)
        numbers = torch.cat([targets[:, None], negatives], 1) + 1
        items = as_item(self.means(numbers), positive(self.covariances(numbers)))
        among_items = between_items(items[:, :1], items[:, 1:])
        excess = (distance(states, items[:, 0])[:, None] - among_items).clamp(min=0)
        return compare(states, items, criterion) + self.config.positive_negative_weight * excess.mean()


def positive(x: Tensor) -> Tensor:
    """ELU + 1, and never so close to 0 that the gradient of a root is not a number."""
    return (F.elu(x) + 1).clamp(min=1e-6)


def as_state(mean: Tensor, covariance: Tensor) -> Tensor:
    """A Gaussian [..., d], [..., d] as the left side of the inner product; shape [..., 2 d + 1]."""
    return torch.cat([2 * mean, 2 * covariance.sqrt(), -torch.ones_like(mean[..., :1])], -1)


def as_item(mean: Tensor, covariance: Tensor) -> Tensor:
    """A Gaussian [..., d], [..., d] as the right side of the inner product; shape [..., 2 d + 1]."""
    size = mean.square().sum(-1, keepdim=True) + covariance.sum(-1, keepdim=True)
    return torch.cat([mean, covariance.sqrt(), size], -1)


def distance(states: Tensor, items: Tensor) -> Tensor:
    """Squared Wasserstein distance of states to items, row by row: [N, 2 d + 1] twice to [N]."""
    return (states[..., :-1] / 2).square().sum(-1) - (states * items).sum(-1)


def between_items(items: Tensor, others: Tensor) -> Tensor:
    """Squared Wasserstein distance of items to items, row by row: [..., 2 d + 1] twice to [...]."""
    return (items[..., :-1] - others[..., :-1]).square().sum(-1)


def init_gaussian(module: nn.Module) -> None:
    """Initializes linear and embedding weights from N(.01, .02), as the authors do."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, mean=0.01, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


def _merged(heads: Tensor) -> Tensor:
    batch, _, length, _ = heads.shape
    return heads.transpose(1, 2).reshape(batch, length, -1)
