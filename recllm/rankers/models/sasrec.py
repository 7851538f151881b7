"""SASRec: Self-Attentive Sequential Recommendation (Kang and McAuley, ICDM 2018, arXiv 1808.09781).

    E^_j  = Dropout(E_{s_j} + P_j)                               (eq. 1) item and position
    S     = E^ + Dropout(SA(LayerNorm(E^)))                      (eq. 2, 5) causal self-attention
    F     = S + Dropout(FFN(LayerNorm(S)))                       (eq. 4, 5) ReLU, inner width d
    r_{i} = LayerNorm(F_t) . E_i                                 (eq. 6) the item table is shared

Shapes: items [B, T], states [B, T, d], items' vectors [I, d].

Loss: cross-entropy over the whole catalog by default. The paper's is binary with one drawn negative (`bce`),
with which SASRec loses to BERT4Rec for the loss alone (arXiv 2309.07602). The last LayerNorm is the authors'
code's. Ours: padding is on the right and positions count from a row's first item, so that a score depends on
neither padding nor batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.layers import Block, Dropout, init_normal
from recllm.rankers.ranker import SequenceRanker, Without, states_at_targets
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class SASRecConfig:
    """Sizes of SASRec."""

    width: int = 64
    """d: width of items and states."""
    layers: int = 2
    """Self-attention layers."""
    heads: int = 2
    """Attention heads."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.5
    """Of embeddings, attention and network."""


class SASRec(SequenceRanker):
    """Reads a sequence by causal self-attention, and foretells the next item at every position."""

    Config: ClassVar[type] = SASRecConfig

    def __init__(self, data: TrainingData, config: SASRecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SASRecConfig()
        self.items = nn.Embedding(data.n_items + 1, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.width, config.dropout, "relu", "first")
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        init_normal(self)

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state after each item; shape [B, T, d]."""
        place = torch.arange(batch.items.shape[1], device=batch.items.device)
        x = self.dropout(self.items(batch.items) + self.positions(place))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the item table without its padding; shape [I, d]."""
        return self.items.weight[1:]

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares each position's state with the item that came next."""
        states, targets, negatives = states_at_targets(self, batch)
        return criterion(states, self.item_vectors(), targets, negatives)
