"""BPR: matrix factorization by Bayesian personalized ranking (Rendle et al., UAI 2009, arXiv 1205.2618).

    x^_{ui} = p_u . q_i                                                     (section 4.3.1)
    loss    = -mean ln sigma(x^_{ui} - x^_{uj})
              + lambda / (2 B) sum of |p_u|^2 + |q_i|^2 + |q_j|^2           (BPR-OPT, section 4.1)

for B drawn training pairs (u, i), each with an item j that the user has not touched.

Shapes: users [U, d], items [I, d].

Ours: Adam on mini-batches instead of single steps; one lambda for all tables. Here are also the parts that
every ranker of pairs shares: its tables, the comparison of a batch, and the penalty of the rows in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.pairs import compare, penalty, rows_of, xavier_table
from recllm.rankers.ranker import PairRanker, Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class BPRConfig:
    """Sizes of BPR."""

    width: int = 64
    """d: width of users and items."""
    regularization: float = 0.1
    """lambda: weight of half the squares of a batch's rows of the tables, per pair."""


class BPR(PairRanker):
    """Scores an item by the inner product of a user's and its own row."""

    Config: ClassVar[type] = BPRConfig

    def __init__(self, data: TrainingData, config: BPRConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BPRConfig()
        self.users = xavier_table(data.n_users, config.width)
        self.items = xavier_table(data.n_items, config.width)

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns the tables [U, d] and [I, d]."""
        return self.users.weight, self.items.weight

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs, and keeps their rows small."""
        rows = rows_of(*self.vectors(), batch)
        return compare(*rows, criterion) + self.config.regularization * penalty(*rows)
