"""LightGCN: Light Graph Convolution Network (He et al., SIGIR 2020, arXiv 2002.02126).

    E^{k+1} = D^-1/2 A D^-1/2 E^k,  A = [[0, R], [R^T, 0]]                  (eq. 6 to 8)
    E       = mean of E^0 .. E^K                                            (eq. 4, alpha_k = 1 / (K + 1))
    y^_{ui} = e_u . e_i                                                     (eq. 5)
    loss    = BPR + lambda / (2 B) sum of |e^0|^2 over the rows of the batch (eq. 15)

R are the training interactions of the users. A user whom training did not know has e^0 = 0 and reads the
graph from outside: e^{k+1}_u = sum over the known items of e^k_i / sqrt(d_u d_i) (ours).

Shapes: users [U, d], items [I, d], E [U + I, d].

Ours: the mean of the layers is one operation, whose gradient is the same operation on the gradient (A is
symmetric; the operation takes the transpose), so that no layer is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scipy import sparse
from torch import Tensor

from recllm.graphs.propagation import (
    SparseMatrix,
    bipartite,
    fold_in,
    interaction_matrix,
    mean_of_layers,
    symmetric_edges,
    symmetric_normalized,
    trained_only,
)
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.pairs import compare, penalty, rows_of, xavier_table
from recllm.rankers.ranker import PairRanker, Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class LightGCNConfig:
    """Sizes of LightGCN."""

    width: int = 64
    """d: width of users and items."""
    layers: int = 3
    """K: propagations, 1 to 4."""
    regularization: float = 1e-3
    """lambda: weight of half the squares of a batch's rows of the tables, before propagation, per pair."""


class LightGCN(PairRanker):
    """Smooths tables of users and items over the graph of their interactions."""

    Config: ClassVar[type] = LightGCNConfig
    folds_in = True

    def __init__(self, data: TrainingData, config: LightGCNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LightGCNConfig()
        self.users = xavier_table(data.n_users, config.width)
        self.items = xavier_table(data.n_items, config.width)
        touched = interaction_matrix(*data.pairs(), data.n_users, data.n_items)
        self.graph = SparseMatrix(symmetric_normalized(bipartite(touched)))
        self._degrees = touched.sum(0)

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns the means over the layers, [U, d] and [I, d]."""
        return mean_of_layers(self.graph, self.users.weight, self.items.weight, self.config.layers)

    def fold_in(self, interactions: sparse.csr_array, *, without: Without = ()) -> Tensor:
        """Returns the means over the layers of users outside the graph; shape [B, d]."""
        users, items = self.users.weight, self.items.weight
        edges = SparseMatrix(symmetric_edges(trained_only(interactions, self._degrees), self._degrees))
        return fold_in(self.graph, users, items, self.config.layers, edges.to(items.device))

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs, and keeps their rows of the tables small."""
        rows = rows_of(self.users.weight, self.items.weight, batch)
        return compare(*rows_of(*self.vectors(), batch), criterion) + self.config.regularization * penalty(
            *rows
        )
