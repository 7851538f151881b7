"""Interactions that come with a split: train/valid/test files, or MMRec's one file with a label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.data.raw.anyfile import SEPARATORS, read_table, suffix_of
from recllm.data.raw.cleaning import clean_id
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import column_of, find_images, looked_at, mapped
from recllm.data.raw.lines import is_compressed
from recllm.data.raw.tables import FILE, RawDataset, RawTable, find_file
from recllm.data.readers.options import ImportOptions
from recllm.data.readers.table import items_table
from recllm.errors import DataError

PARTS = {"train": ("train", "training"), "valid": ("valid", "val", "validation", "dev"), "test": ("test",)}
LABELS = {"0": "train", "1": "valid", "2": "test"}
USER = ("user", "userID", "user_id")
ITEM = ("item", "itemID", "item_id")


@dataclass
class PreSplit(ImportOptions):
    """Imports interactions that are split already; the extra column `part` says train, valid or test.

    SOURCE is a folder with `train`, `valid` and `test` tables (.csv, .tsv, .jsonl or .parquet, also .gz), or
    MMRec's tab-separated `.inter` file whose `x_label` is 0, 1 or 2 (or a folder with one). A pair that
    stands in two parts counts in the first one (in the earlier one where there are times).
    """

    user: str | None = None
    """Column with the user id; by default `user`, `userID` or `user_id`."""
    item: str | None = None
    """Column with the item id; by default `item`, `itemID` or `item_id`."""
    label: str = "x_label"
    """Column of the single file that says the part: 0 train, 1 valid, 2 test."""
    timestamp: str | None = None
    """Column with the time; by default `timestamp` where there is such a column."""
    rating: str | None = None
    """Column with the rating; by default `rating` where there is such a column."""
    disjoint_users: bool = False
    """The parts have different users (strong generalization). Otherwise a part none of whose users is in the
    training part is an error: its ids may be spelled in another way."""
    items_file: Path | None = None
    """Table of the items."""
    item_id: str = "item"
    """Column of the items file with the item id."""
    images: Path | None = None
    """Folder of item images, named by item id: `<item>.jpg`, `<item>_0.jpg`, ..."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the three files, or the one."""
        single = self._single_file()
        if single is not None:
            raw = RawDataset(self._read_labelled(single, findings, workspace), source={"layout": "x_label"})
        else:
            raw = RawDataset(self._read_parts(findings, workspace), source={"layout": "train/valid/test"})
        if self.items_file is not None:
            table = read_table(self.items_file, findings, workspace)
            raw.items = items_table(table, self.item_id, findings)
        if self.images is not None:
            find_images(raw, self.images)
        return raw

    def _single_file(self) -> Path | None:
        if not self.source.is_dir():
            return self.source
        found = sorted(self.source.glob("*.inter"))
        if len(found) == 1 and not any(_is_part(path, "train") for path in self.source.iterdir()):
            return found[0]
        return None

    def _read_labelled(self, path: Path, findings: Findings, workspace: Path) -> RawTable:
        table = read_table(path, findings, workspace)
        columns = {**self._columns(table), "part": column_of(table, self.label, self.label)}
        table = mapped(table, columns, "interactions")
        label = pl.col("part").cast(pl.String).str.strip_chars().str.strip_suffix(".0")
        named = label.replace_strict(LABELS, default=None, return_dtype=pl.String)
        unknown = looked_at(
            table, lambda frame: frame.filter(named.is_null()).select(label.fill_null("")).head(1).collect()
        )["part"]
        if len(unknown):
            raise DataError(
                f"{path}: {self.label} is {unknown[0]!r}; expected 0 (train), 1 (valid) or 2 (test)"
            )
        again = table.with_lines
        exactly = None if again is None else lambda: again().with_columns(named.alias("part"))
        return RawTable(path, table.frame.with_columns(named.alias("part")), exactly)

    def _read_parts(self, findings: Findings, workspace: Path) -> RawTable:
        tables = {}
        for part, names in PARTS.items():
            found = sorted(path for path in self.source.iterdir() if path.is_file() and _is_part(path, part))
            if not found:
                expected = [f"{name}{suffix}" for name in names for suffix in (".csv", ".csv.gz")]
                find_file(self.source, *expected, what=f"{part} file")
            if len(found) > 1:
                raise DataError(
                    f"{self.source} holds several {part} files: {', '.join(path.name for path in found)}"
                )
            table = read_table(found[0], findings, workspace)
            tables[part] = mapped(table, self._columns(table), "interactions")

        if not self.disjoint_users:
            for part in ("valid", "test"):
                _check_users(tables["train"], tables[part], part, findings)

        def joined(exactly: bool) -> pl.LazyFrame:
            frames = []
            for part, table in tables.items():
                frame = table.with_lines() if exactly and table.with_lines is not None else table.frame
                marks = {"part": pl.lit(part), FILE: pl.lit(table.path.name)}
                frames.append(frame.with_columns(**marks))
            return pl.concat(frames, how="diagonal_relaxed")

        exact = all(table.with_lines is None for table in tables.values())
        return RawTable(self.source, joined(False), None if exact else lambda: joined(True))

    def _columns(self, table: RawTable) -> dict[str, str]:
        names = table.frame.collect_schema().names()
        columns = {}
        for target, given, usual in (("user", self.user, USER), ("item", self.item, ITEM)):
            default = next((name for name in usual if name in names), usual[0])
            columns[target] = column_of(table, given or default, default)
        for target, given in (("timestamp", self.timestamp), ("rating", self.rating)):
            column = column_of(table, given, target)
            if column is not None:
                columns[target] = column
        return columns


def _check_users(train: RawTable, table: RawTable, part: str, findings: Findings) -> None:
    def users(of: RawTable) -> pl.Series:
        ids = looked_at(of, lambda frame: frame.select(clean_id(frame, "user", findings)).unique().collect())
        return ids["user"].drop_nulls().sort()

    known, ours = users(train), users(table)
    if len(known) and len(ours) and not ours.is_in(known.implode()).any():
        raise DataError(
            f"no user of {table.path.name} (such as {ours[0]!r}) is in {train.path.name} (such as "
            f"{known[0]!r}); if the {part} part has users of its own, say --disjoint-users"
        )


def _is_part(path: Path, part: str) -> bool:
    known = suffix_of(path) in (*SEPARATORS, ".jsonl", ".ndjson", ".json", ".parquet", ".pq")
    inner = path.with_suffix("") if is_compressed(path) else path
    return known and inner.stem.lower() in PARTS[part]
