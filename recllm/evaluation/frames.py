"""Reading and checking the tables that evaluation takes in: candidates, scores, rank records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recllm.errors import DataError

COLUMNS = ("user", "item", "above", "tied", "n")
"""The columns of rank records."""
LARGEST_LIST = 2**31
"""Candidates that a list may have."""


def read_table(path: Path) -> tuple[pl.DataFrame, dict[str, str]]:
    """Reads parquet with its metadata, or CSV (also gzipped) with ids kept as they are written (007 stays
    007).

    Raises:
        DataError: The file is missing or damaged, its name is not UTF-8, or a CSV names two columns alike or
            has a score that is not a number.
    """
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!a}: the name of the file is not UTF-8; rename it") from None
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    is_csv = path.name.lower().endswith((".csv", ".csv.gz"))
    try:
        if is_csv:
            frame, metadata = pl.read_csv(path, infer_schema=False, glob=False), {}
            _refuse_twin_columns(frame, path)
        else:
            frame = pl.read_parquet(path, hive_partitioning=False, glob=False)
            metadata = pl.read_parquet_metadata(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            f"{path}: not readable as {'CSV' if is_csv else 'parquet'} ({error}); CSV must be called "
            ".csv or .csv.gz, and any other file must be parquet"
        ) from None
    for name in {"score", "label"} & set(frame.columns) if is_csv else ():
        numbers = frame[name].str.strip_chars().cast(pl.Float64, strict=False)
        if (wrong := numbers.is_null()).any():
            row = wrong.arg_max()
            raise DataError(f"{path}: row {row}: {name} {frame[name][row]!r} is not a number")
        frame = frame.with_columns(numbers.alias(name))
    return frame, metadata


def _refuse_twin_columns(frame: pl.DataFrame, path: Path) -> None:
    """Polars reads the second `score` of a header as `score_duplicated_0`; which is meant cannot be known."""
    if not any("_duplicated_" in name for name in frame.columns):
        return
    header = pl.read_csv(path, has_header=False, n_rows=1, infer_schema=False, glob=False).row(0)
    if twins := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: the column {twins[0]!r} stands more than once in the header; keep one")


def text_ids(frame: pl.DataFrame, columns: Sequence[str], where: str) -> pl.DataFrame:
    """Casts id columns to text, which integers and strings become without loss."""
    for name in columns:
        if name not in frame.columns:
            raise DataError(f"{where}: no column {name!r}; found {', '.join(frame.columns) or 'none'}")
        kind = frame[name].dtype
        if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum)):
            raise DataError(f"{where}: column {name!r} is {kind}; ids must be text or integers")
        if frame[name].null_count():
            raise DataError(f"{where}: column {name!r} is empty in row {frame[name].is_null().arg_max()}")
    return frame.with_columns(pl.col(columns).cast(pl.String))


def check_candidates(frame: pl.DataFrame, where: str = "candidates") -> pl.DataFrame:
    """Returns `user`, (`target`,) `item`, `label` with ids as text, or raises a `DataError`."""
    keys = ["user", "target", "item"] if "target" in frame.columns else ["user", "item"]
    frame = text_ids(frame, keys, where)
    if "label" not in frame.columns:
        raise DataError(f"{where}: no column 'label'; found {', '.join(frame.columns)}")
    label = frame["label"]
    wrong = ~((label == 0) | (label == 1)).fill_null(False) if label.dtype.is_numeric() else None
    if wrong is None or wrong.any():
        row = 0 if wrong is None else wrong.arg_max()
        raise DataError(f"{where}: row {row} has label {label[row]!r}; labels must be 1 or 0")
    frame = frame.select(*keys, pl.col("label").cast(pl.Int8))
    if (twice := frame.select(keys).is_duplicated()).any():
        raise DataError(
            f"{where}: {describe(frame.row(twice.arg_max(), named=True))} stands twice in one list"
        )
    if "target" in keys:
        wrong = (frame["item"] == frame["target"]) != (frame["label"] == 1)
        if wrong.any():
            raise DataError(
                f"{where}: row {wrong.arg_max()}: label 1 must stand at the target and only there"
            )
    positives = frame.group_by(keys[:-1], maintain_order=True).agg(pl.col("label").max())
    if (bare := positives.filter(pl.col("label") == 0)).height:
        raise DataError(
            f"{where}: {bare.height} lists have no positive, the first is {describe(bare.row(0, named=True))}"
        )
    return frame


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


def describe(row: dict[str, Any]) -> str:
    """Names a row by its ids."""
    return ", ".join(f"{key} {row[key]!r}" for key in ("user", "target", "item") if key in row)
