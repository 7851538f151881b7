"""The refined item graph of MLLMRec (arXiv 2508.15304, eq. 6 to 11).

    s_ab  = cosine of the vectors of items a and b                                      (eq. 6)
    S~_ab = 1 where b is among the K_s nearest of a and s_ab >= alpha, else 0           (eq. 7)
    c_ab  = |U_a and U_b| / |U_a or U_b|, U_a the training users of item a              (eq. 8)
    C~_ab = c_ab where b is among the K_c items with the largest c_ab, else 0           (eq. 9)
    S*    = S~ + C~                                                                     (eq. 10)
    N^-1/2 S* N^-1/2,  N the row sums of S*, on both sides also where S* is not symmetric (eq. 11)

An item is its own nearest neighbor and counts among the K_s, so that S~ has a loop at each item with a
vector. It is not a neighbor of itself in C~: co-occurrence is with another item.

Repaired: the release takes entries of C that equal 1 for the diagonal. That also removes the edge between two
items with the same users, the strongest there can be, and leaves in float32 the loop at an item with a single
user, whose 1 / (1 + 1e-7) is not 1. Here the diagonal is left out by position, whatever its value.
Ours: of equal c_ab the pair with more common users comes first, then the lower item code.

Nothing is items x items: R^T R is made for some rows at a time, and of a row only its K_c best are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from recllm.graphs.knn import Neighbors

BLOCK = 2**22
"""Pairs of items with a common user that are held at a time: about 200 MiB."""
_ROWS = 2**16  # row numbers below this are sorted in linear time


def semantic_graph(neighbors: Neighbors, threshold: float | None) -> sparse.csr_array:
    """Returns S~ of the K_s nearest neighbors; float32, shape [items, items]; MLLMRec eq. 7.

    Args:
        neighbors: The K_s nearest items of each item, itself included.
        threshold: alpha, the least cosine of an edge; None keeps all neighbors.
    """
    if threshold is not None:  # rounding may leave an item's cosine with itself below 1
        kept = (neighbors.cosines >= threshold) | (neighbors.items == neighbors.neighbors)
        edges = (each[kept] for each in (neighbors.items, neighbors.neighbors, neighbors.cosines))
        neighbors = Neighbors(neighbors.n_items, *edges)
    return neighbors.matrix(weighted=False)


def audience_graph(interactions: sparse.csr_array, neighbors: int, *, block: int = BLOCK) -> sparse.csr_array:
    """Returns C~, the largest Jaccard similarities of each item's users; MLLMRec eq. 8 and 9.

    Time: the sum over the users of their squared numbers of items. Memory: `block` pairs and the edges.

    Args:
        interactions: 1 where a user has a training interaction with an item; shape [users, items].
        neighbors: K_c; items with fewer that have a common user get fewer.
        block: Pairs of items that are held at a time; those of one item at least.

    Returns:
        float32, shape [items, items]; not symmetric.

    Raises:
        ValueError: `neighbors` is less than 1.
    """
    if neighbors < 1:
        raise ValueError(f"{neighbors} neighbors; expected at least 1")
    items = interactions.shape[1]
    of_users = sparse.csr_array(interactions != 0, dtype=np.int32)
    of_items = sparse.csr_array(of_users.T)
    degrees = np.diff(of_items.indptr)
    # Of each row of R^T R, before equal ones are added:
    pairs = of_items @ np.diff(of_users.indptr).astype(np.int64)
    found = []
    for part in _blocks(pairs, block):
        common = sparse.coo_array(of_items[part] @ of_users)
        rows, columns = (each.astype(np.int64) for each in common.coords)
        others = rows + part.start != columns
        rows, columns, counts = rows[others], columns[others], common.data[others]
        jaccard = counts / (degrees[rows + part.start] + degrees[columns] - counts)
        best = _largest(rows, columns, jaccard, counts, neighbors)
        found.append((rows[best] + part.start, columns[best], jaccard[best].astype(np.float32)))
    rows, columns, values = (np.concatenate(each) for each in zip(*found, strict=True)) if found else [[]] * 3
    return sparse.csr_array((values, (rows, columns)), shape=(items, items), dtype=np.float32)


def refined_graph(
    neighbors: Neighbors, threshold: float | None, audience: sparse.csr_array | None
) -> sparse.csr_array:
    """Returns S* = S~ + C~, not normalized; float32, shape [items, items]; MLLMRec eq. 10.

    Args:
        neighbors: As in `semantic_graph`.
        threshold: As in `semantic_graph`.
        audience: C~; None for S~ alone.
    """
    semantic = semantic_graph(neighbors, threshold)
    return semantic if audience is None else sparse.csr_array(semantic + audience)


def _blocks(sizes: np.ndarray, block: int) -> Iterator[slice]:
    """Cuts rows into runs whose sizes sum up to at most `block`, or which are one row."""
    ends = np.cumsum(sizes, dtype=np.int64)
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + block, side="right"))
        stop = min(max(stop, start + 1), start + _ROWS)
        yield slice(start, stop)
        start = stop


def _largest(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, counts: np.ndarray, k: int
) -> np.ndarray:
    """Returns the places of each row's k largest values, by row, value, count and column."""

    def places(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ordered = rows[order]
        first = np.searchsorted(ordered, np.arange(len(order) and ordered[-1] + 1))
        return ordered, np.arange(len(order)) - first[ordered]

    # Values alone first, which is fast: what is below a row's k-th value is not sorted further.
    order = np.argsort(-values)
    order = order[np.argsort(rows[order].astype(np.uint16), kind="stable")]
    ordered, place = places(order)
    least = np.zeros(len(order) and ordered[-1] + 1)
    least[ordered[place == k - 1]] = values[order[place == k - 1]]
    left = np.flatnonzero(values >= least[rows])
    left = left[np.lexsort((columns[left], -counts[left], -values[left], rows[left]))]
    return left[places(left)[1] < k]
