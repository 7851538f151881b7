"""Exact search for the users with the most similar vectors, a block of similarities at a time.

Similarities are compared at a grid of 1e-6, and of equal ones the more recent key is first, so that the
result does not depend on blocks, nor on how equal histories were rounded (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recllm.errors import DataError
from recllm.progress import Progress

if TYPE_CHECKING:
    import torch

GRID = 1e-6
"""What similarities are multiples of."""
_PAIRS = 2**22  # similarities held at a time
_FIRST = 4  # keys looked at for each user wanted; more where they are of fewer users


def nearest_users(
    queries: torch.Tensor,
    keys: torch.Tensor,
    k: int,
    *,
    query_users: np.ndarray,
    key_users: np.ndarray,
    key_places: np.ndarray,
    query_places: np.ndarray | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k most similar users of each query among keys, exactly.

    A key of the query's user is never found, nor one of length zero, nor one whose place is not before the
    query's. Of a user's keys, the most similar counts. A query of length zero has no neighbors. Blocks of
    similarities are compared and dropped; no queries x keys matrix is made.

    Args:
        queries: Shape [Q, D].
        keys: Shape [K, D], on the same device.
        k: Users for each query.
        query_users: User code of each query; shape [Q].
        key_users: User code of each key; shape [K].
        key_places: A different number for each key, which grows with time; shape [K].
        query_places: In the same order of time; shape [Q]. None: keys of any time count.
        progress: Show a bar.

    Returns:
        Numbers of keys, int64, and cosines as multiples of `GRID`, float32, both of shape [Q, k], by falling
        similarity; -1 and NaN where there are fewer users.

    Raises:
        DataError: A vector is not finite.
    """
    import torch

    device = queries.device if queries.device.type == "cuda" else torch.device("cpu")
    units, query_norms = _unit(queries, device)
    key_units, key_norms = _unit(keys, device)
    order = np.argsort(key_places, kind="stable")
    order = order[key_norms[order] > 0]
    key_units = key_units[torch.from_numpy(order).to(device)]
    owners = key_users[order].astype(np.int64)
    largest = max(int(owners.max(initial=0)), int(query_users.max(initial=0)))
    own_order, own_offsets = _by_user(owners, largest)
    bounds = np.full(len(queries), len(order))
    if query_places is not None:
        bounds = np.searchsorted(key_places[order], query_places)
    bounds[query_norms == 0] = 0
    found = np.full((len(queries), k), -1, dtype=np.int64)
    cosines = np.full((len(queries), k), np.nan, dtype=np.float32)
    by_bound = np.argsort(bounds, kind="stable")
    at = int(np.searchsorted(bounds[by_bound], 1))
    with Progress(
        desc="neighbors", total=len(queries), initial=at, unit="target", disable=not progress
    ) as bar:
        while at < len(by_bound):
            stop = _block_end(bounds, by_bound, at)
            block = by_bound[at:stop]
            limit = int(bounds[block[-1]])
            similarity = units[torch.from_numpy(block).to(device)] @ key_units[:limit].T
            # One whole number for each pair, all different: grid of the similarity, then recency.
            grid = torch.round(similarity / GRID).to(torch.int64)
            column = torch.arange(limit, device=device)
            ranked = (grid + round(2 / GRID)) * limit + column
            ranked[column >= torch.from_numpy(bounds[block]).to(device)[:, None]] = -1
            _hide_own(ranked, query_users[block], own_order, own_offsets, limit)
            for row, places in _distinct_users(ranked, owners, k):
                found[block[row], : len(places)] = order[places]
                cosines[block[row], : len(places)] = (
                    grid[row, torch.from_numpy(places).to(device)].cpu().numpy() * GRID
                )
            bar.update(stop - at)
            at = stop
    return found, cosines


def _unit(vectors: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors of length 1 in float64 (zero stays zero), and their lengths before."""
    import torch

    vectors = vectors.detach().to(device, torch.float64)
    norms = vectors.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all()):
        raise DataError("a user's state is not finite; train the ranker again")
    return vectors / norms.clamp(min=torch.finfo(torch.float64).tiny), norms[:, 0].cpu().numpy()


def _by_user(owners: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of each user's keys, ascending, and where each user's begin."""
    order = np.argsort(owners, kind="stable")
    return order, np.searchsorted(owners[order], np.arange(largest + 2))


def _block_end(bounds: np.ndarray, by_bound: np.ndarray, at: int) -> int:
    """Where a block ends that begins at `at`, of at most `_PAIRS` similarities, or of one query."""
    stop = min(at + max(_PAIRS // int(bounds[by_bound[at]]), 1), len(by_bound))
    while stop - at > 1 and (stop - at) * int(bounds[by_bound[stop - 1]]) > _PAIRS:
        stop = at + max((stop - at) // 2, 1)
    return stop


def _hide_own(
    ranked: torch.Tensor, users: np.ndarray, own_order: np.ndarray, own_offsets: np.ndarray, limit: int
) -> None:
    import torch

    begin, end = own_offsets[users], own_offsets[users + 1]
    counts = end - begin
    rows = np.repeat(np.arange(len(users)), counts)
    inner = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = own_order[np.repeat(begin, counts) + inner]
    inside = columns < limit
    device = ranked.device
    ranked[torch.from_numpy(rows[inside]).to(device), torch.from_numpy(columns[inside]).to(device)] = -1


def _distinct_users(ranked: torch.Tensor, owners: np.ndarray, k: int) -> Sequence[tuple[int, np.ndarray]]:
    """The columns of the best k different users of each row, best first; rows without any are left out."""
    import torch

    limit = ranked.shape[1]
    pending, width, found = np.arange(len(ranked)), min(limit, _FIRST * k), []
    while len(pending):
        values = ranked[torch.from_numpy(pending).to(ranked.device)].topk(width, dim=1).values.cpu().numpy()
        unfinished = []
        for row, best in zip(pending.tolist(), values, strict=True):
            places = best[best >= 0] % limit
            first = np.sort(np.unique(owners[places], return_index=True)[1])[:k]
            if len(first) == k or width == limit or len(places) < width:
                if len(first):
                    found.append((row, places[first]))
            else:
                unfinished.append(row)
        pending, width = np.array(unfinished, dtype=np.int64), min(limit, 4 * width)
    return found
