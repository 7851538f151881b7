"""Items with equal vectors have equal scores.

A matrix product does not see to that: the columns at the edge of a block are summed in another order than the
rest, so that equal vectors may get scores that differ in their last bits, and whether they tie would depend
on where they are stored. The score of the first of them is therefore given to all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_CHUNK = 2**20  # numbers in work at a time


def twin_rows(table: Any) -> tuple[Any, Any] | None:
    """Finds the rows that equal an earlier one, 0.0 and -0.0 being equal.

    Rows are told apart by a hash of their bits, and those of equal hash are compared. This costs about as
    much as scoring two users.

    Args:
        table: [I, D] finite numbers, a numpy array or a torch tensor on any device.

    Returns:
        The numbers of the rows that repeat, and for each that of the first row equal to it, on the device of
        the table; None where no row repeats.
    """
    if 0 in table.shape:
        return None
    keys = _hashes(table)
    ordered = np.sort(keys)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    earliest = first[which.reshape(-1)]
    later = np.flatnonzero(earliest != np.arange(len(keys)))
    if not _equal(table, later, earliest[later]):  # two different rows have one hash: sort the rows
        rows = table if isinstance(table, np.ndarray) else table.cpu().numpy()
        _, first, which = np.unique(rows + 0.0, axis=0, return_index=True, return_inverse=True)
        earliest = first[which.reshape(-1)]
        later = np.flatnonzero(earliest != np.arange(len(keys)))
        if not len(later):
            return None
    return _beside(table, later), _beside(table, earliest[later])


def tie_twins(scored: Any, twins: tuple[Any, Any] | None) -> Any:
    """Gives each later twin the score of the first, in place, and returns the block [B, I]."""
    if twins is not None:
        later, earliest = twins
        scored[:, later] = scored[:, earliest]
    return scored


def _hashes(table: Any) -> np.ndarray:
    """[I] sums of the 32-bit words of each row times random odd numbers, modulo 2^64."""
    rows, width = table.shape
    words = width * (table.dtype.itemsize // 4)
    factors = _beside(table, np.random.default_rng(0).integers(-(2**63), 2**63, words, np.int64) | 1)
    step = max(1, _CHUNK // words)
    keys = np.empty(rows, np.int64)
    for start in range(0, rows, step):
        part = table[start : start + step] + 0.0  # -0.0 becomes 0.0
        if isinstance(part, np.ndarray):
            keys[start : start + step] = np.ascontiguousarray(part).view(np.int32) @ factors
        else:
            import torch

            product = part.contiguous().view(torch.int32) * factors
            keys[start : start + step] = product.sum(1).cpu().numpy()
    return keys


def _equal(table: Any, one: np.ndarray, other: np.ndarray) -> bool:
    step = max(1, _CHUNK // table.shape[1])
    for start in range(0, len(one), step):
        left, right = (_beside(table, rows[start : start + step]) for rows in (one, other))
        if not bool((table[left] == table[right]).all()):
            return False
    return True


def _beside(table: Any, array: np.ndarray) -> Any:
    if isinstance(table, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).to(table.device)
