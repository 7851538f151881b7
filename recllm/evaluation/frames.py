"""Checks of the tables that evaluation reads: scores and rank records."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from recllm.data.tables import text_ids
from recllm.errors import DataError

COLUMNS = ("user", "item", "above", "tied", "n")
"""The columns of rank records."""
LARGEST_LIST = 2**31
"""Candidates that a list may have."""


def check_scores(frame: pl.DataFrame, keys: Sequence[str], where: str = "scores") -> pl.DataFrame:
    """Returns `keys` and `score` as Float64 with -0.0 turned into 0.0, which it equals."""
    frame = text_ids(frame, keys, where)
    if "score" not in frame.columns or not frame["score"].dtype.is_numeric():
        raise DataError(f"{where}: no numeric column 'score'; found {', '.join(frame.columns)}")
    return frame.select(*keys, pl.col("score").cast(pl.Float64) + 0.0)


def check_ranks(frame: pl.DataFrame, lists: str, where: str) -> None:
    """Raises a `DataError` naming the first row of `COLUMNS` that cannot be a rank."""
    # Wide enough that no sum below wraps around; what does not even fit is null.
    frame = frame.with_columns(pl.col(COLUMNS[2:]).cast(pl.Int64, strict=False))
    above, tied, n = (pl.col(name) for name in COLUMNS[2:])
    countable = pl.col(COLUMNS[2:]).is_between(-LARGEST_LIST, LARGEST_LIST).fill_null(False)
    rules = [
        (pl.all_horizontal(countable), f"lists may have {LARGEST_LIST} candidates at most"),
        (
            (above >= 0) & (tied >= 1) & (above + tied <= n),
            "expected 0 <= above, 1 <= tied, above + tied <= n",
        ),
    ]
    if lists == "user":
        positives = pl.len().over("user")
        same_rank = pl.len().over("user", "above")
        higher = above.rank("min").over("user") - 1
        last_above, last_tied = (column.shift(1).over("user", order_by="above") for column in (above, tied))
        rules += [
            (pl.len().over("user", "item") == 1, "this (user, item) stands more than once"),
            (n == n.first().over("user"), "n differs from the user's other rows"),
            (
                (tied == tied.first().over("user", "above")) & (same_rank <= tied) & (higher <= above),
                "contradicts the user's other rows: equal `above` means one tie that holds its positives",
            ),
            (
                last_above.is_null() | (above == last_above) | (above >= last_above + last_tied),
                "contradicts the user's other rows: `above` must count all of a tie that stands higher",
            ),
            (positives <= n, "the user has more positives than candidates"),
        ]
    for rule, meaning in rules:
        broken = frame.select((~rule).alias("broken"))["broken"]
        if broken.any():
            row = broken.arg_max()
            raise DataError(f"{where}: row {row} {frame.row(row)} ({', '.join(COLUMNS)}): {meaning}")
