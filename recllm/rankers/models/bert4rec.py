"""BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer (Sun et
al., CIKM 2019, arXiv 1904.06690).

    h^0_j = E_{v_j} + P_j                                                 (eq. 5)
    H^l   = Trm(H^{l-1})                                                  (eq. 1 to 4) both ways, GELU
    P(v)  = softmax(GELU(h^L W_P + b_P) E^T + b_O)                        (eq. 7) the item table is shared

Training hides each item with probability rho behind a mask, and foretells the hidden ones (eq. 8): the loss
is cross-entropy over the whole catalog at hidden positions. To foretell what comes next, a mask is put after
the latest item.

Shapes: items [B, T], states [B, T, d + 1], items' vectors [I, d + 1]: the last coordinate carries b_O.

Ours: a row in which chance hides nothing has one item hidden, so that none is in vain; a share of the rows
(`last_share`) hides its latest item alone, as in scoring, which the paper does with copies of the data; and
the output is normalized before the product, as BERT does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.layers import Block, Dropout, init_normal
from recllm.rankers.ranker import SequenceRanker, Without, at_last, states_at_targets
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class BERT4RecConfig:
    """Sizes of BERT4Rec."""

    width: int = 64
    """d: width of items and states."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 2
    """Attention heads."""
    length: int = 50
    """Items and masks that are read: one item fewer in scoring."""
    dropout: float = 0.2
    """Of embeddings, attention and network."""
    hidden_share: float = 0.4
    """rho: the probability that an item is hidden in training."""
    last_share: float = 0.1
    """The share of the rows that hide their latest item alone."""


class BERT4Rec(SequenceRanker):
    """Reads a sequence both ways, and foretells what is hidden in it."""

    Config: ClassVar[type] = BERT4RecConfig
    examples = "cloze"
    losses = ("ce",)

    def __init__(self, data: TrainingData, config: BERT4RecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BERT4RecConfig()
        self.mask = data.n_items + 1  # the number that stands for what is hidden
        self.items = nn.Embedding(data.n_items + 2, config.width, padding_idx=0)
        self.item_bias = nn.Parameter(torch.zeros(data.n_items))
        self.positions = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, 4 * config.width, config.dropout) for _ in range(config.layers)
        )
        self.input_norm, self.output_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(config.width, config.width)
        init_normal(self)

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state at each place, hidden or not; shape [B, T, d + 1]."""
        place = torch.arange(batch.items.shape[1], device=batch.items.device)
        x = self.dropout(self.input_norm(self.items(batch.items) + self.positions(place)))
        known = batch.known
        known = known | ~known.any(1, keepdim=True)  # a row of padding attends to something, and is not used
        for block in self.blocks:
            x = block(x, known)
        x = self.output_norm(F.gelu(self.output(x)))
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    def states(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns what is foretold of the place after the latest item; shape [B, d + 1]."""
        masked = self.with_mask_after(batch)
        return at_last(self(masked), masked)

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the items of the shared table and their biases; shape [I, d + 1]."""
        return torch.cat([self.items.weight[1 : self.mask], self.item_bias[:, None]], 1)

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Hides items, and compares the states there with what was hidden."""
        states, targets, _ = states_at_targets(self, self.hide(batch))
        return criterion(states, self.item_vectors(), targets)

    def hide(self, batch: Batch) -> Batch:
        """Puts masks in the place of some items of a training batch, which become the only targets."""
        known, lengths = batch.known, batch.lengths
        chance = torch.rand(batch.items.shape, device=batch.items.device).masked_fill(~known, 2)
        hidden = chance < self.config.hidden_share
        hidden |= (chance == chance.amin(1, keepdim=True)) & ~hidden.any(1, keepdim=True)
        last = torch.arange(batch.items.shape[1], device=batch.items.device) == lengths[:, None] - 1
        only_last = torch.rand(len(batch), 1, device=batch.items.device) < self.config.last_share
        hidden = torch.where(only_last, last, hidden) & known
        return replace(
            batch,
            items=batch.items.masked_fill(hidden, self.mask),
            targets=batch.items.masked_fill(~hidden, 0),
        )

    def with_mask_after(self, batch: Batch) -> Batch:
        """Puts a mask after each row's latest item; the oldest item of a full row goes."""
        items = F.pad(batch.items, (0, 1))
        items[torch.arange(len(batch), device=items.device), batch.lengths] = self.mask
        if items.shape[1] > self.config.length:
            full = items[:, -1] > 0
            items = torch.where(full[:, None], items[:, 1:], items[:, :-1])
        return replace(batch, items=items, days=None)
