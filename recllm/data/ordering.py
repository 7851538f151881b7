"""Each user's interactions together and in time, by a counting sort where the log is in time order."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def group_by_user(user_codes: np.ndarray, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups rows by user, keeping their order within each user: a counting sort, linear in the number of
    rows.

    Args:
        user_codes: The user of each row; shape [rows], values below `n_users`.
        n_users: Number of users.

    Returns:
        Row numbers grouped by user, shape [rows], and offsets, shape [n_users + 1]: user `u` has the rows
        `order[offsets[u] : offsets[u + 1]]`.
    """
    rows = len(user_codes)
    width = np.int32 if rows < 2**31 else np.int64
    # SciPy's COO -> CSR conversion is the counting sort: it scatters columns (row numbers) into their rows
    # (users).
    coordinates = (user_codes.astype(width, copy=False), np.arange(rows, dtype=width))
    grouped = sparse.coo_array((np.ones(rows, dtype=bool), coordinates), shape=(n_users, rows)).tocsr()
    return grouped.indices, grouped.indptr.astype(np.int64)


def group_by_user_in_time(
    user_codes: np.ndarray, timestamps: np.ndarray | None, n_users: int
) -> tuple[np.ndarray, np.ndarray]:
    """Groups rows by user and sorts each user's rows by time; equal times keep the input order.

    Args:
        user_codes: The user of each row; shape [rows].
        timestamps: The time of each row; shape [rows]; None where input order is time order.
        n_users: Number of users.

    Returns:
        As `group_by_user`.
    """
    order, offsets = group_by_user(user_codes, n_users)
    if timestamps is None or _is_sorted_within(timestamps[order], offsets):
        return order, offsets
    by_time = np.argsort(timestamps, kind="stable")
    order, offsets = group_by_user(user_codes[by_time], n_users)
    return by_time[order], offsets


def _is_sorted_within(times: np.ndarray, offsets: np.ndarray) -> bool:
    falls = times[1:] < times[:-1]
    borders = offsets[1:-1]
    falls[borders[(borders > 0) & (borders < len(times))] - 1] = False
    return not falls.any()


def places_in_time(timestamps: np.ndarray | None, rows: int) -> np.ndarray:
    """Returns the place of each interaction in the order of time, and then of the log.

    Args:
        timestamps: The time of each row; shape [rows]; None where input order is time order.
        rows: How many interactions the log has.

    Returns:
        int64, shape [rows]: `a` precedes `b` if `places[a] < places[b]`.
    """
    places = np.arange(rows)
    if timestamps is not None:
        places[np.argsort(timestamps, kind="stable")] = np.arange(rows)
    return places
