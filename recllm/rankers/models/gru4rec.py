"""GRU4Rec: Session-based Recommendations with Recurrent Neural Networks (Hidasi et al., ICLR 2016, arXiv
1511.06939; losses over the whole catalog as in Hidasi and Karatzoglou, CIKM 2018, arXiv 1706.03847).

    x_t = Dropout(E_{s_t})
    h_t = GRU(x_t, h_{t-1})                    (eq. 1 to 4) one layer or several
    y_t = W h_t + b                            back to the width of the items (ours)
    score(t, i) = y_t . E_i                    input and output items share one table (as in 1706.03847)

Shapes: items [B, T], h [B, T, hidden], states y [B, T, d], items' vectors [I, d].

Loss: cross-entropy over the whole catalog at every position (ours; the papers take the other targets of a
batch of parallel sessions as negatives).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.layers import Dropout
from recllm.rankers.ranker import SequenceRanker, Without, states_at_targets
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class GRU4RecConfig:
    """Sizes of GRU4Rec."""

    width: int = 64
    """d: width of items and states."""
    hidden: int = 128
    """Width of the recurrent state."""
    layers: int = 1
    """Recurrent layers."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.3
    """Of the items that go in."""


class GRU4Rec(SequenceRanker):
    """Reads a sequence item by item, and foretells the next at every position."""

    Config: ClassVar[type] = GRU4RecConfig

    def __init__(self, data: TrainingData, config: GRU4RecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GRU4RecConfig()
        self.items = nn.Embedding(data.n_items + 1, config.width, padding_idx=0)
        self.recurrence = nn.GRU(config.width, config.hidden, config.layers, batch_first=True)
        self.output = nn.Linear(config.hidden, config.width)
        self.dropout = Dropout(config.dropout)
        nn.init.xavier_normal_(self.items.weight[1:])
        for name, parameter in self.recurrence.named_parameters():
            if name.startswith("weight"):
                nn.init.xavier_uniform_(parameter)

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state after each item; shape [B, T, d]."""
        hidden, _ = self.recurrence(self.dropout(self.items(batch.items)))
        return self.output(hidden)

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the item table without its padding; shape [I, d]."""
        return self.items.weight[1:]

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares each position's state with the item that came next."""
        states, targets, negatives = states_at_targets(self, batch)
        return criterion(states, self.item_vectors(), targets, negatives)
