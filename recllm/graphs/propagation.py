"""Sparse adjacency matrices: made from interactions, normalized, and multiplied with tables of vectors.

Products run as weighted bags of rows (`embedding_bag`), which is about four times as fast on a CPU as torch's
own sparse products and keeps nothing for the backward pass: the gradient is the product with the transpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F


def interaction_matrix(users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> sparse.csr_array:
    """Returns R: 1 where a user has touched an item; float32, shape [U, I].

    Args:
        users: User codes of the distinct pairs; shape [pairs].
        items: Item codes; shape [pairs].
        n_users: U.
        n_items: I.
    """
    ones = np.ones(len(users), dtype=np.float32)
    return sparse.csr_array((ones, (users, items)), shape=(n_users, n_items))


def bipartite(interactions: sparse.csr_array) -> sparse.csr_array:
    """Returns [[0, R], [R^T, 0]] of a matrix R [U, I]: users first, then items; shape [U + I, U + I]."""
    return sparse.csr_array(sparse.block_array([[None, interactions], [interactions.T, None]]))


def symmetric_normalized(matrix: sparse.csr_array) -> sparse.csr_array:
    """Returns D^-1/2 A D^-1/2, D the row sums of A, on both sides also where A is not symmetric.

    A node without edges keeps none.
    """
    scale = _power(matrix.sum(1), -0.5)
    return sparse.csr_array(sparse.diags_array(scale) @ matrix @ sparse.diags_array(scale))


def degree_normalized(matrix: sparse.csr_array) -> sparse.csr_array:
    """Returns D_r^-1/2 A D_c^-1/2, with the row sums D_r and the column sums D_c of a matrix of any shape."""
    rows, columns = _power(matrix.sum(1), -0.5), _power(matrix.sum(0), -0.5)
    return sparse.csr_array(sparse.diags_array(rows) @ matrix @ sparse.diags_array(columns))


def trained_only(interactions: sparse.csr_array, degrees: np.ndarray) -> sparse.csr_array:
    """Leaves out the interactions [B, I] with items that have no edge in a graph, by their degrees [I]."""
    kept = sparse.csr_array(interactions @ sparse.diags_array((degrees > 0).astype(np.float32)))
    kept.eliminate_zeros()
    return kept


def symmetric_edges(interactions: sparse.csr_array, degrees: np.ndarray) -> sparse.csr_array:
    """Returns the edges from users outside a graph to its items, weighted as within it: 1 / sqrt(d_u d_i).

    Args:
        interactions: 1 where a user has interacted with an item; shape [B, I]. d_u are its row sums.
        degrees: d_i, of the items in the graph; shape [I].
    """
    scales = sparse.diags_array(_power(interactions.sum(1), -0.5)), sparse.diags_array(_power(degrees, -0.5))
    return sparse.csr_array(scales[0] @ interactions @ scales[1])


def row_normalized(matrix: sparse.csr_array) -> sparse.csr_array:
    """Returns D^-1 A, D the row sums of A. A node without edges keeps none."""
    return sparse.csr_array(sparse.diags_array(_power(matrix.sum(1), -1.0)) @ matrix)


def _power(degrees: np.ndarray, exponent: float) -> np.ndarray:
    known = degrees > 0
    return np.where(known, np.where(known, degrees, 1).astype(np.float64) ** exponent, 0).astype(np.float32)


class SparseMatrix(nn.Module):
    """A constant sparse matrix, which multiplies dense ones; differentiable in these.

    It is kept by rows, for the product, and its transpose by rows, for the gradient: 8 bytes a number each.
    Neither is part of a checkpoint.

    Args:
        matrix: Shape [N, M].
    """

    def __init__(self, matrix: sparse.csr_array) -> None:
        super().__init__()
        self.shape = matrix.shape
        for prefix, each in (("", matrix), ("transposed_", matrix.T)):
            rows = sparse.csr_array(each)
            for name, values in (("starts", rows.indptr), ("columns", rows.indices)):
                self.register_buffer(
                    prefix + name, torch.from_numpy(values.astype(np.int32)), persistent=False
                )
            numbers = torch.from_numpy(rows.data.astype(np.float32))
            self.register_buffer(prefix + "numbers", numbers, persistent=False)

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts of the rows [N + 1], columns [numbers] and numbers [numbers]."""
        return self.starts, self.columns, self.numbers

    @property
    def transposed_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the transpose; starts [M + 1]."""
        return self.transposed_starts, self.transposed_columns, self.transposed_numbers

    def forward(self, dense: Tensor) -> Tensor:
        """Returns the product with a dense matrix: [M, D] to [N, D]."""
        return _Product.apply(dense, self.rows, self.transposed_rows)


def mean_of_layers(matrix: SparseMatrix, users: Tensor, items: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Propagates over a bipartite graph: (E + A E + ... + A^L E) / (L + 1), E = [users; items].

    Args:
        matrix: A; shape [U + I, U + I].
        users: Shape [U, D].
        items: Shape [I, D].
        layers: L.

    Returns:
        Users [U, D] and items [I, D]; source: LightGCN (arXiv 2002.02126), eq. 8 with equal weights.
    """
    return _MeanOfLayers.apply(users, items, matrix.rows, matrix.transposed_rows, layers)


@torch.no_grad()
def fold_in(
    matrix: SparseMatrix,
    users: Tensor,
    items: Tensor,
    layers: int,
    edges: SparseMatrix,
    own: Tensor | None = None,
) -> Tensor:
    """Propagates to users outside the graph: as `mean_of_layers`, with 0 for their own first layer.

    They read the graph, and nothing in it reads them: vectors of others stay as they are.

    Args:
        matrix: As in `mean_of_layers`; shape [U + I, U + I].
        users: Shape [U, D].
        items: Shape [I, D].
        layers: L.
        edges: From each user outside to items; shape [B, I].
        own: The weight of a user's own layer in the next one; shape [B, 1]; None for 0.

    Returns:
        Shape [B, D].
    """
    layer = torch.cat([users, items])
    new = layer.new_zeros(edges.shape[0], layer.shape[1])
    total = new.clone()
    for _ in range(layers):
        passed = edges(layer[len(users) :])
        new = passed if own is None else passed + own * new
        total += new
        layer = _times(matrix.rows, layer)
    return total / (layers + 1)


Rows = tuple[Tensor, Tensor, Tensor]


def _times(rows: Rows, dense: Tensor) -> Tensor:
    starts, columns, numbers = rows
    return F.embedding_bag(
        columns,
        dense,
        starts,
        mode="sum",
        per_sample_weights=numbers.to(dense.dtype),
        include_last_offset=True,
    )


def _layers(rows: Rows, users: Tensor, items: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    layer = torch.cat([users, items])
    total = layer.clone() if layers else layer
    for _ in range(layers):
        layer = _times(rows, layer)
        total += layer
    total /= layers + 1
    return total[: len(users)], total[len(users) :]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, rows: Rows, transposed_rows: Rows) -> Tensor:
        ctx.transposed_rows = transposed_rows
        return _times(rows, dense)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _times(ctx.transposed_rows, upstream.contiguous()), None, None


class _MeanOfLayers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, users: Tensor, items: Tensor, rows: Rows, transposed_rows: Rows, layers: int
    ) -> tuple[Tensor, Tensor]:
        ctx.transposed_rows, ctx.layers = transposed_rows, layers
        return _layers(rows, users, items, layers)

    @staticmethod
    def backward(ctx: Any, users: Tensor, items: Tensor) -> tuple[Tensor | None, ...]:
        return *_layers(ctx.transposed_rows, users, items, ctx.layers), None, None, None
