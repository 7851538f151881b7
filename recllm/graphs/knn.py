"""The graph of nearest neighbors by cosine, block by block: no items x items matrix is ever whole."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recllm.graphs.screening import CHUNK, Screen, can_screen

BLOCK = 2**24
"""Similarities that are held at a time: 64 MiB."""


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The edges from items to their nearest neighbors, by item, the most similar first.

    Attributes:
        n_items: Items, of which some may have no edges.
        items: Item codes; int64, shape [edges].
        neighbors: Item codes; int64, shape [edges].
        cosines: Of item and neighbor; float32, shape [edges].
    """

    n_items: int
    items: Tensor
    neighbors: Tensor
    cosines: Tensor

    def matrix(self, *, weighted: bool = True) -> sparse.csr_array:
        """Returns the matrix of cosines, or of ones where not weighted; float32, shape [items, items].

        A row has an item's neighbors.
        """
        weights = self.cosines if weighted else torch.ones_like(self.cosines)
        where = (self.items.cpu().numpy(), self.neighbors.cpu().numpy())
        return sparse.csr_array((weights.cpu().numpy(), where), shape=(self.n_items, self.n_items))


@torch.no_grad()
def nearest_neighbors(
    vectors: Tensor, present: Tensor, k: int, *, block: int = BLOCK, screen: bool | None = None
) -> Neighbors:
    """Finds the k nearest items of each item by cosine.

    An item is its own nearest neighbor and counts among the k, as in LATTICE, FREEDOM, SMORE and MLLMRec. Of
    equally similar items those with the lower number are taken. Items that are not present, and those whose
    vector is zero (it has no direction), get no neighbors and are nobody's.

    Memory: the vectors, once more where not all are present, one block and the edges; half as much as the
    vectors more where pairs are screened. Time: a matrix product of all pairs.

    Args:
        vectors: Shape [items, width].
        present: Which items have a vector; bool, shape [items].
        k: Neighbors of an item, itself included; fewer where there are fewer items.
        block: Similarities that are held at a time; twice as many where they are in bfloat16.
        screen: Look for candidates in bfloat16 first, which finds the same neighbors (see
            `recllm.graphs.screening`); None: where that is faster.

    Raises:
        ValueError: k is less than 1.
    """
    if k < 1:
        raise ValueError(f"{k} neighbors; expected at least 1, the item itself")
    lengths = vectors.norm(dim=1)
    known = (present & (lengths > 0)).nonzero()[:, 0]
    if len(known) < len(vectors):
        vectors, lengths = vectors[known], lengths[known]
    k, scale = min(k, len(known)), 1 / lengths
    screen = can_screen(vectors, k) if screen is None else screen
    screened = Screen(vectors, scale) if screen and len(known) else None
    twins: tuple[Tensor, Tensor] | None = None
    rows = max(2 * block // (len(known) + CHUNK) if screened else block // max(len(known), 1), 1)
    found = []
    for at in range(0, len(known), rows):
        part = slice(at, min(at + rows, len(known)))
        nearest = screened.nearest(part, k) if screened else None
        if nearest is None:
            twins = twins or _twins(vectors)
            nearest = _of_rows(vectors, scale, twins, part, k)
        found.append(nearest)
    columns = torch.cat([columns for columns, _ in found]) if found else known.new_zeros((0, k))
    cosines = torch.cat([cosines for _, cosines in found]) if found else lengths.new_zeros((0, k))
    items = known.repeat_interleave(k)
    return Neighbors(len(present), items, known[columns].flatten(), cosines.flatten())


def _twins(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are equal to an earlier one, and the first such."""
    seen: dict[bytes, int] = {}
    digests = (blake2b(row, digest_size=16).digest() for row in vectors.detach().cpu().contiguous().numpy())
    first = np.array([seen.setdefault(digest, row) for row, digest in enumerate(digests)], dtype=np.int64)
    later = np.flatnonzero(first != np.arange(len(first)))
    return tuple(torch.from_numpy(rows).to(vectors.device) for rows in (later, first[later]))


def _of_rows(
    vectors: Tensor, scale: Tensor, twins: tuple[Tensor, Tensor], rows: slice, k: int
) -> tuple[Tensor, Tensor]:
    """The neighbors [rows, k] of some rows, and their cosines."""
    similar = (vectors[rows] @ vectors.T).mul_(scale)
    later, first = twins
    similar[:, later] = similar[:, first]  # a product may round alike columns otherwise in other places
    own = torch.arange(rows.start, rows.stop, device=vectors.device)
    similar[own - rows.start, own] = torch.inf
    values, columns = similar.topk(min(k + 1, len(vectors)), dim=1)
    if values.shape[1] > k:
        tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        if len(tied):
            columns[tied, :k] = _lowest_of_equals(similar[tied], values[tied, k - 1], k)
    columns = columns[:, :k].sort(dim=1).values
    cosines, order = similar.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), (cosines * scale[rows, None]).clamp(-1, 1)


def _lowest_of_equals(similar: Tensor, least: Tensor, k: int) -> Tensor:
    """The k most similar of each row where several have the k-th similarity `least`: of these, the first."""
    above, equal = similar > least[:, None], similar == least[:, None]
    wanted = k - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1, dtype=torch.int32) <= wanted))).nonzero()[:, 1].view(-1, k)
