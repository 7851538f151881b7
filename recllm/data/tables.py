"""Tables that users bring: parquet or CSV, with ids as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recllm.errors import DataError


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


def read_users(path: Path) -> list[str]:
    """Returns the distinct ids in the column `user` of a table, in its order.

    Raises:
        DataError: As `read_table`; or it has no such column, or no row.
    """
    frame = text_ids(read_table(path)[0], ("user",), str(path))
    if frame.is_empty():
        raise DataError(f"{path} names no user")
    return frame["user"].unique(maintain_order=True).to_list()


def describe(row: dict[str, Any]) -> str:
    """Names a row by its ids."""
    return ", ".join(f"{key} {row[key]!r}" for key in ("user", "target", "item") if key in row)


def _refuse_twin_columns(frame: pl.DataFrame, path: Path) -> None:
    """Polars reads the second `score` of a header as `score_duplicated_0`; which is meant cannot be known."""
    if not any("_duplicated_" in name for name in frame.columns):
        return
    header = pl.read_csv(path, has_header=False, n_rows=1, infer_schema=False, glob=False).row(0)
    if twins := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: the column {twins[0]!r} stands more than once in the header; keep one")
