"""Whose vector is which row of a matrix: the orders that a `.npy` file without ids may have.

A matrix does not say which item a row belongs to, and items of a dataset are sorted by id as text (0, 1, 10,
2), so that no order is a safe guess. It is always named:

numeric   items in ascending order of their ids, which are all whole numbers (MMRec's files)
source    the rows of the items table that the dataset was imported from
dataset   the rows of DATASET/items.parquet
FILE      a mapping: an item id on each line, or a CSV or TSV file with the columns `item` and `row`
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from recllm.data.dataset import Dataset
from recllm.data.schema import SOURCE_ROW
from recllm.errors import DataError

NAMED = ("numeric", "source", "dataset")
_WHOLE = re.compile(r"0|[1-9][0-9]*")


def names_beside(path: Path) -> Path:
    """Returns where the ids of a matrix's rows may be written: `<name>.items.txt` beside it."""
    return path.with_suffix(".items.txt")


def needs_order(source: str | None) -> bool:
    """Returns whether a source of features is a matrix without ids, the only kind that takes an order."""
    return source is not None and source.endswith(".npy") and not names_beside(Path(source)).is_file()


def rows_of_items(dataset: Dataset, path: Path, rows: int, order: str | None) -> list[tuple[str, int]]:
    """Returns item ids and the row of each in a matrix; an id may be unknown to the dataset.

    Args:
        dataset: The dataset.
        path: The matrix's file, for its ids beside it and for messages.
        rows: Its number of rows.
        order: One of `NAMED`, or the path of a mapping; not used if `<name>.items.txt` names the items.

    Raises:
        DataError: The order is not named, or does not fit the dataset or the matrix.
    """
    beside = names_beside(path)
    if beside.is_file():
        return _listed(beside, path, rows)
    if order is None:
        raise DataError(_ambiguous(dataset, path))
    if order not in NAMED:
        return _mapped(Path(order), path, rows)
    ids = _in_order(dataset, order)
    if len(ids) != rows:
        raise DataError(
            f"{path}: {rows:,} rows, but {dataset.folder / 'items.parquet'} has {len(ids):,} items; "
            f"--feature-order {order} expects as many. If the file has rows for other items too (of a "
            "catalog before `data filter`, or padding), give --feature-order FILE with the item of each row"
        )
    return [(item, row) for row, item in enumerate(ids)]


def _ambiguous(dataset: Dataset, path: Path) -> str:
    ids = dataset.items["item"]
    choices = ["dataset (the order of items.parquet, sorted by id as text)"]
    if all(_WHOLE.fullmatch(item) for item in ids):
        choices.insert(0, "numeric (ids in ascending order as numbers, as in MMRec's files)")
    if SOURCE_ROW in dataset.items.columns:
        choices.insert(0, "source (the order of the items table that was imported)")
    choices.append("FILE (an item id on each line, or a CSV file with the columns item and row)")
    return (
        f"{path}: a .npy file does not say which item a row belongs to; give --feature-order with one of "
        f"{'; '.join(choices)}. Or write the ids to {names_beside(path).name} beside it, or save a "
        ".safetensors file with a tensor for each item id"
    )


def _in_order(dataset: Dataset, order: str) -> list[str]:
    """Returns the dataset's item ids in a named order."""
    ids = dataset.items["item"]
    if order == "dataset":
        return ids.to_list()
    if order == "numeric":
        if odd := next((item for item in ids if not _WHOLE.fullmatch(item)), None):
            raise DataError(
                f"--feature-order numeric: item {odd!r} of {dataset.folder} is not a whole number without "
                "leading zeros; give source, dataset or FILE"
            )
        return sorted(ids, key=int)
    if SOURCE_ROW not in dataset.items.columns:
        raise DataError(
            f"--feature-order source: {dataset.folder} does not keep the order of its source. "
            "Readers keep it if they are given an items table; import again with one, or give numeric, "
            "dataset or FILE"
        )
    places = dataset.items[SOURCE_ROW]
    if places.null_count():
        lacking = ids.filter(places.is_null())[0]
        raise DataError(
            f"--feature-order source: item {lacking!r} of {dataset.folder} was not in the items table "
            "that was imported; give FILE with the item of each row"
        )
    return ids.gather(places.arg_sort()).to_list()


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(
            f"--feature-order {path}: no such file; expected {', '.join(NAMED)}, or a file that names the "
            "item of each row"
        )
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; expected the id of an item on each line") from None


def _listed(path: Path, matrix: Path, rows: int) -> list[tuple[str, int]]:
    """Reads an id from each line."""
    ids = [line.removesuffix("\r") for line in _lines(path)]
    if len(ids) != rows:
        raise DataError(f"{matrix}: {rows:,} rows, but {path} has {len(ids):,} items; expected as many")
    _check_unique(path, ids)
    return [(item, row) for row, item in enumerate(ids)]


def _mapped(path: Path, matrix: Path, rows: int) -> list[tuple[str, int]]:
    """Reads a list of ids, or a table with the columns item and row."""
    lines = _lines(path)
    separator = "\t" if "\t" in lines[0] else ","
    header = [name.strip() for name in lines[0].removesuffix("\r").split(separator)]
    if sorted(header) != ["item", "row"]:
        return _listed(path, matrix, rows)
    found = []
    for number, fields in enumerate(csv.reader(lines[1:], delimiter=separator), 2):
        if len(fields) != 2:
            raise DataError(f"{path}, line {number}: {len(fields)} fields; expected an item and a row")
        item, row = fields[header.index("item")].strip(), fields[header.index("row")].strip()
        if not _WHOLE.fullmatch(row) or int(row) >= rows:
            raise DataError(
                f"{path}, line {number}: row {row!r} of item {item!r}; expected a number from 0 to "
                f"{rows - 1} ({matrix.name} has {rows:,} rows)"
            )
        found.append((item, int(row)))
    _check_unique(path, [item for item, _ in found])
    places, counts = np.unique([row for _, row in found], return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{path}: row {places[counts > 1][0]} is given to several items; expected one")
    return found


def _check_unique(path: Path, ids: list[str]) -> None:
    seen: set[str] = set()
    for item in ids:
        if item in seen:
            raise DataError(f"{path}: item {item!r} stands twice; expected each once")
        seen.add(item)
