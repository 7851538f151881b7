"""Exact top-K search over item vectors that need not fit into memory: blocks of a memory-mapped matrix.

    vectors = np.load("items.npy", mmap_mode="r")                      # [items, d]
    items, scores = search(vectors, profiles, 100, excluded=(offsets, codes))

Each block of items is read once for each block of queries, and only scores above a query's k-th best so far
are looked at again, so that memory is bounded whatever the catalog. For many users, make their profiles block
by block as well: `MeanProfiles.of_users` reads the rows of their items alone.
"""

from __future__ import annotations

import numpy as np

from recllm.errors import DataError

HELD = 2**25
"""Scores, and numbers of item vectors, that are held at a time: 128 MiB of each."""


def search(
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    excluded: tuple[np.ndarray, np.ndarray] | None = None,
    cosine: bool = True,
    held: int = HELD,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k items with the highest scores of each query; of equal scores the lower code comes first.

    Scores are float32 inner products, which do not depend on the blocks but for rounding.

    Args:
        vectors: Of the items; shape [items, d]; an array, or memory-mapped (`np.load(..., mmap_mode="r")`).
            A row of zeros is an item without a vector and is never found.
        queries: Shape [n, d].
        k: Items a query.
        excluded: Items that may not be found, such as the history: item codes, and where those of each query
            start and stop: `(offsets [n + 1], codes)`.
        cosine: Score the cosine with the item; the inner product otherwise.
        held: Scores, and numbers of item vectors, that are held at a time.

    Returns:
        Item codes int64 and scores float32, both [n, k]; -1 and NaN where fewer than k items are left.

    Raises:
        DataError: k or `held` is below 1, the widths differ, offsets do not fit, or a number is not finite.
    """
    count, width = vectors.shape
    if k < 1 or held < 1:
        raise DataError(f"k is {k} and held is {held}; expected at least 1")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise DataError(f"queries have shape {queries.shape}; expected [n, {width}], as wide as the items")
    if not np.isfinite(queries).all():
        raise DataError(
            f"query {int((~np.isfinite(queries).all(1)).argmax())} has a number that is not finite"
        )
    owner, hidden = _excluded(excluded, len(queries), count)
    found = np.full((len(queries), k), -1, dtype=np.int64)
    best = np.full((len(queries), k), np.nan, dtype=np.float32)
    rows = max(1, min(len(queries), 4096, held // min(max(count, 1), 8192)))
    columns = max(1, min(held // rows, held // max(width, 1)))
    for start in range(0, len(queries), rows):
        block = slice(start, min(start + rows, len(queries)))
        inside = slice(*np.searchsorted(owner, (block.start, block.stop)))
        found[block], best[block] = _best(
            vectors,
            queries[block].astype(np.float32),
            (owner[inside] - start, hidden[inside]),
            (k, columns, cosine),
        )
    return found, best


def _best(
    vectors: np.ndarray,
    queries: np.ndarray,
    excluded: tuple[np.ndarray, np.ndarray],
    how: tuple[int, int, bool],
) -> tuple[np.ndarray, np.ndarray]:
    """The best items of a block of queries, from blocks of items in ascending order."""
    k, columns, cosine = how
    found = np.full((len(queries), k), -1, dtype=np.int64)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    order = np.argsort(excluded[1], kind="stable")
    owner, hidden = excluded[0][order], excluded[1][order]
    for start in range(0, len(vectors), columns):
        items = np.asarray(vectors[start : start + columns], dtype=np.float32)
        length = np.sqrt(np.einsum("id,id->i", items, items, dtype=np.float64))
        if not np.isfinite(length).all():
            item = start + int((~np.isfinite(length)).argmax())
            raise DataError(f"the vector of item code {item} has a number that is not finite")
        scores = queries @ items.T
        if cosine:
            scores /= np.where(length > 0, length, 1).astype(np.float32)
        scores[:, length == 0] = -np.inf
        inside = slice(*np.searchsorted(hidden, (start, start + len(items))))
        scores[owner[inside], hidden[inside] - start] = -np.inf
        least = best[:, -1:]
        if len(items) > k and not np.isfinite(least).all():  # the k best of this block, and their equals
            here = np.partition(scores, len(items) - k, axis=1)[:, len(items) - k, None]
            row, column = np.nonzero((scores >= here) & (scores > least))
        else:
            row, column = np.nonzero(scores > least)  # of an equal score the earlier item stays
        _merge(found, best, row, column + start, scores[row, column])
    best[found < 0] = np.nan
    return found, best


def _merge(found: np.ndarray, best: np.ndarray, row: np.ndarray, item: np.ndarray, score: np.ndarray) -> None:
    """Puts further items into the lists of their rows, in place."""
    touched, row = np.unique(row, return_inverse=True)
    if not len(touched):
        return
    k = found.shape[1]
    row = np.concatenate([np.repeat(np.arange(len(touched)), k), row])
    item = np.concatenate([found[touched].ravel(), item])
    score = np.concatenate([best[touched].ravel(), score])
    order = np.lexsort((item, -score, row))
    row, item, score = row[order], item[order], score[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < k
    found[touched[row[kept]], place[kept]] = item[kept]
    best[touched[row[kept]], place[kept]] = score[kept]


def _excluded(
    excluded: tuple[np.ndarray, np.ndarray] | None, queries: int, items: int
) -> tuple[np.ndarray, np.ndarray]:
    """The query and the item code of each exclusion, by query."""
    if excluded is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    offsets, codes = (np.asarray(each, dtype=np.int64) for each in excluded)
    if (
        len(offsets) != queries + 1
        or offsets[0] != 0
        or offsets[-1] != len(codes)
        or (np.diff(offsets) < 0).any()
    ):
        raise DataError(
            f"excluded: offsets must rise from 0 to {len(codes)}, one more than {queries} queries"
        )
    if len(codes) and not 0 <= codes.min() <= codes.max() < items:
        raise DataError(
            f"excluded: item codes go from 0 to {items - 1}; found {codes.min()} to {codes.max()}"
        )
    return np.repeat(np.arange(queries), np.diff(offsets)), codes
