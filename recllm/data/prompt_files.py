"""Rows of a parquet file of instructions, whose prompts stay on disk until they are needed."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from recllm.data.instructions import rows_of_task
from recllm.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FILE_ROW = "file_row"
"""The column of `small_columns` that holds each row's number in the file."""
_SMALL = ("id", "user", "target_row", "target", "item", "label", "images")


def small_columns(
    path: Path, users: Collection[str] | None = None, *, task: str | None = None
) -> pl.DataFrame:
    """Reads all columns but the texts, which take kilobytes a row.

    Args:
        path: A part of instructions.
        users: Read the rows of these users only.
        task: Read the rows of this task only, for example `recllm.data.instructions.YES_NO`; None: all rows.

    Returns:
        The rows in the file's order: `file_row`, and of id, user, target_row, target, item, label and images
        those that the file has. Images are categories: each path is held once, however many rows show it.
    """
    table = pl.scan_parquet(path, glob=False, row_index_name=FILE_ROW)
    names = table.collect_schema().names()
    if task is not None:
        table = rows_of_task(table, task)
    if users is not None:
        table = table.filter(pl.col("user").is_in(pl.Series(users, dtype=pl.String).implode()))
    kept = table.select(FILE_ROW, *(name for name in _SMALL if name in names))
    if "images" in names:
        kept = kept.with_columns(pl.col("images").cast(pl.List(pl.Categorical)))
    return kept.collect(engine="streaming")


def image_paths(rows: pl.DataFrame) -> pl.Series:
    """Returns the paths of all images that rows show, each once, in the order of the rows; text."""
    return rows["images"].explode(empty_as_null=True).drop_nulls().unique(maintain_order=True).cast(pl.String)


class PromptFile:
    """Reads rows of a parquet file by number, decoding one row group at a time.

    The last row group is kept, so that rows which are read in the file's order are decoded once. It may be
    used in several threads.

    Args:
        path: A part of instructions.

    Raises:
        DataError: The file has no prompts.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._file = pq.ParquetFile(path)
        if "prompt" not in self._file.schema_arrow.names:
            raise DataError(
                f"{path} has no column 'prompt'; expected rows of instructions, as `recllm build "
                "instructions` writes them"
            )
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._lock = threading.Lock()
        self._kept: tuple[tuple[int, tuple[str, ...] | None], pa.Table] | None = None

    def take(self, numbers: Sequence[int] | pl.Series, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Reads rows.

        Args:
            numbers: The numbers of the rows in the file, in any order.
            columns: The columns to read; None: all.

        Returns:
            The rows, in the order of `numbers`.

        Raises:
            DataError: The file has no row of such a number.
        """
        import pyarrow as pa

        places = np.asarray(numbers, np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < self._starts[-1]:
            raise DataError(
                f"{self.path} has {self._starts[-1]:,} rows, but rows {places.min():,} to {places.max():,} "
                "are wanted; if the file was replaced meanwhile, run the command again"
            )
        groups = np.searchsorted(self._starts, places, "right") - 1
        wanted = None if columns is None else tuple(columns)
        order = np.argsort(groups, kind="stable")
        with self._lock:
            found = [
                self._group(int(group), wanted).take(places[groups == group] - self._starts[group])
                for group in np.unique(groups)
            ] or [self._group(0, wanted).slice(0, 0)]
        return pl.DataFrame(pa.concat_tables(found).take(np.argsort(order)))

    def _group(self, group: int, columns: tuple[str, ...] | None) -> pa.Table:
        # Rows are copied out of Arrow: strings that Polars gathers would keep the whole row group alive.
        if self._kept is None or self._kept[0] != (group, columns):
            self._kept = None  # two are never held
            table = self._file.read_row_group(group, columns=columns, use_threads=False)
            self._kept = (group, columns), table
        return self._kept[1]
