"""From raw tables to a raw dataset: recllm's column names, items that were never listed, images by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import polars as pl

from recllm.data import schema
from recllm.data.raw.cleaning import clean_id
from recllm.data.raw.findings import Findings
from recllm.data.raw.tables import (
    FILE,
    LINE,
    RawDataset,
    RawTable,
    check_image_search,
    check_names,
    require_columns,
)
from recllm.data.schema import SOURCE_ROW
from recllm.errors import DataError

Result = TypeVar("Result")


def mapped(table: RawTable, columns: Mapping[str, str], kind: str) -> RawTable:
    """Gives columns recllm's names and keeps all others as extra columns.

    Args:
        table: The table.
        columns: recllm's name -> the name in the file. One column of the file may serve twice.
        kind: `items`, `interactions` or `users`. An extra column with a name that this table's schema uses is
            renamed to `<name>_source`.

    Raises:
        DataError: A column is missing (the message lists those found), has a name that cannot be kept, or
            holds lists where single values are expected.
    """
    found = [name for name in table.frame.collect_schema().names() if name not in (LINE, FILE)]
    require_columns(table.path, found, columns.values())
    check_names(table.path, found)
    reserved = {*schema.TABLES[kind], *columns, *([SOURCE_ROW] if kind == "items" else [])}
    extras = {}
    for name in found:
        if name not in columns.values():
            kept = name
            while kept in reserved or (kept != name and kept in found):
                kept += "_source"
            extras[name] = kept

    def pick(frame: pl.LazyFrame) -> pl.LazyFrame:
        marks = [name for name in (LINE, FILE) if name in frame.collect_schema()]
        wanted = [pl.col(name).alias(target) for target, name in columns.items()]
        return frame.select(*wanted, *(pl.col(name).alias(kept) for name, kept in extras.items()), *marks)

    again = table.with_lines
    return _check_flat(
        RawTable(table.path, pick(table.frame), None if again is None else lambda: pick(again()))
    )


def column_of(table: RawTable, given: str | None, default: str) -> str | None:
    """Returns the column that the user named, else `default` where the table has it, else None.

    "" for `given` switches the column off.

    Raises:
        DataError: The table lacks the column that the user named.
    """
    names = table.frame.collect_schema().names()
    if given == "":
        return None
    if given is not None:
        require_columns(table.path, [name for name in names if name not in (LINE, FILE)], [given])
        return given
    return default if default in names else None


def looked_at(table: RawTable, query: Callable[[pl.LazyFrame], Result]) -> Result:
    """Runs a query on a table; where Polars cannot read the file, the exact reader takes over for good."""
    try:
        return query(table.frame)
    except pl.exceptions.PolarsError:
        if table.with_lines is None:
            raise
        table.frame, table.with_lines = table.with_lines(), None
        return query(table.frame)


def collected(table: RawTable) -> RawTable:
    """Reads a small table now, so that a malformed line is counted here and not met by a later join."""
    return RawTable(table.path, looked_at(table, lambda frame: frame.collect()).lazy())


def with_clean_ids(table: RawTable, key: str, findings: Findings) -> RawTable:
    """Reads a small table now, with ids as the dataset will have them, ready for joins."""
    table = collected(table)
    table.frame = table.frame.with_columns(clean_id(table.frame, key, findings)).collect().lazy()
    return table


def with_source_rows(table: RawTable) -> RawTable:
    """Keeps the order of an items table: `SOURCE_ROW` is an item's row in it, from 0.

    Items of a dataset are sorted by id as text. Vectors that were computed row by row need the order of the
    source.
    """
    table.frame = table.frame.with_row_index(SOURCE_ROW).with_columns(pl.col(SOURCE_ROW).cast(pl.Int64))
    return table


def items_of(interactions: RawTable, findings: Findings) -> RawTable:
    """Returns an items table with the ids that the interactions name, for sources that list no items."""

    def unique(frame: pl.LazyFrame) -> pl.DataFrame:
        ids = frame.select(clean_id(frame, "item", findings)).filter(pl.col("item").is_not_null())
        return ids.unique().collect(engine="streaming").sort("item")

    return RawTable(interactions.path, looked_at(interactions, unique).lazy())


def join_columns(raw: RawDataset, columns: pl.DataFrame, findings: Findings) -> None:
    """Joins columns to the items by `item`; an item that `columns` lacks gets nulls."""
    raw.only_touched |= raw.items is None
    raw.items = with_clean_ids(raw.items or items_of(raw.interactions, findings), "item", findings)
    raw.items.frame = raw.items.frame.join(columns.lazy(), on="item", how="left", maintain_order="left")


def find_images(raw: RawDataset, folder: Path, *, pattern: str | None = None) -> None:
    """Has the items' images looked for in a folder, as `images_by_item` does, once all items are known.

    Raises:
        DataError: The folder is missing, or the pattern lacks `{item}`.
    """
    check_image_search(folder, pattern)
    raw.image_folder, raw.image_pattern, raw.find_images = folder, pattern, True


def text_column(frame: pl.LazyFrame, name: str, path: Path) -> pl.Expr:
    """Returns a column as text; the entries of a list stand on lines of their own.

    Raises:
        DataError: The column nests deeper.
    """
    dtype = frame.collect_schema()[name]
    column = pl.col(name)
    if isinstance(dtype, pl.List) and not dtype.inner.is_nested():
        return column.cast(pl.List(pl.String)).list.join("\n", ignore_nulls=True).alias(name)
    if dtype.is_nested():
        raise DataError(f"{path}: column {name!r} is of type {dtype}; expected text")
    return column.cast(pl.String).alias(name)


def _check_flat(table: RawTable) -> RawTable:
    for name, dtype in table.frame.collect_schema().items():
        scalar = name in ("user", "item") or (name in schema.INTERACTIONS and name not in schema.ITEMS)
        if scalar and (dtype.is_nested() or dtype == pl.Binary):
            raise DataError(
                f"{table.path}: the column for {name!r} is of type {dtype}; expected single values"
            )
    return table
