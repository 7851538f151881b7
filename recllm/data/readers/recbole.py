"""RecBole's atomic files: tab-separated, without quotes, each column named `field:type`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.data.raw.delimited import read_delimited
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import (
    collected,
    column_of,
    find_images,
    looked_at,
    mapped,
    with_clean_ids,
    with_source_rows,
)
from recllm.data.raw.lines import is_compressed
from recllm.data.raw.lists import list_column
from recllm.data.raw.tables import LINE, RawDataset, RawTable, existing_file, find_file
from recllm.data.readers.options import ImportOptions
from recllm.errors import DataError

TYPES = ("token", "token_seq", "float", "float_seq")
TITLES = ("title", "movie_title", "movie_name", "book_title", "app_name", "product_name", "name")
CATEGORIES = ("categories", "category", "class", "genre", "genres", "type", "tags")
TEXTS = ("text", "description")


@dataclass
class RecBole(ImportOptions):
    """Imports RecBole atomic files: `X.inter`, and `X.item` and `X.user` beside it where there are any.

    SOURCE is the folder, or the `.inter` file where the folder holds several. Fields that no option names are
    kept as extra columns, `float` as numbers and `_seq` as lists. Titles and texts stay text.
    """

    user: str = "user_id"
    """Field with the user id."""
    item: str = "item_id"
    """Field with the item id."""
    timestamp: str | None = None
    """Field with the time; by default `timestamp` where there is one."""
    rating: str | None = None
    """Field with the rating; by default `rating` where there is one."""
    review: str | None = None
    """Field with the review text; by default `review` where there is one."""
    title: str | None = None
    """Field of the items with the title; by default `title`, `name` or RecBole's own name for it."""
    text: str | None = None
    """Field of the items with a description; by default the first of `text`, `description`."""
    categories: str | None = None
    """Field of the items with categories; by default categor(y, ies), class, genre(s), type or tags."""
    sequence_separator: str = " "
    """What stands between the entries of `token_seq` and `float_seq` fields."""
    images: Path | None = None
    """Folder of item images, named by item id: `<item>.jpg`, `<item>_0.jpg`, ..."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the atomic files."""
        inter = self._inter_file()
        columns = {"user": self.user, "item": self.item}
        table, types = self._open(inter, findings, workspace)
        for name in ("timestamp", "rating", "review"):
            column = column_of(table, getattr(self, name), name)
            if column is not None:
                columns[name] = column
        raw = RawDataset(mapped(self._typed(table, types, set(columns.values())), columns, "interactions"))
        suffix = inter.suffix if is_compressed(inter) else ""
        stem = inter.name.removesuffix(suffix).removesuffix(".inter")
        items, users = (inter.with_name(f"{stem}{kind}{suffix}") for kind in (".item", ".user"))
        if items.is_file():
            raw.items = self._read_items(items, findings, workspace)
        if users.is_file():
            table, types = self._open(users, findings, workspace)
            raw.users = mapped(
                self._typed(collected(table), types, {self.user}), {"user": self.user}, "users"
            )
        if self.images is not None:
            find_images(raw, self.images)
        raw.source["layout"] = "recbole"
        return raw

    def _inter_file(self) -> Path:
        if not self.source.is_dir():
            return existing_file(self.source, "the .inter file")
        found = sorted([*self.source.glob("*.inter"), *self.source.glob("*.inter.gz")])
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{self.source} holds several .inter files ({names}); give the one to import")
        return found[0] if found else find_file(self.source, "*.inter", what=".inter file")

    def _open(self, path: Path, findings: Findings, workspace: Path) -> tuple[RawTable, dict[str, str]]:
        """Reads one atomic file as text columns, and the types that its header names."""
        table = read_delimited(path, findings, workspace, separator="\t", quote=None)
        header = [name for name in table.frame.collect_schema().names() if name != LINE]
        types = {name.rpartition(":")[0]: name.rpartition(":")[2] for name in header}
        if set(types.values()) - set(TYPES) or "" in types or len(types) != len(header):
            raise DataError(
                f"{path}: the first line must name each field once, as `name:type` with the types "
                f"{', '.join(TYPES)}; found: {', '.join(header)}"
            )
        names = {f"{name}:{kind}": name for name, kind in types.items()}
        exactly = table.with_lines
        again = None if exactly is None else lambda: exactly().rename(names)
        return RawTable(path, table.frame.rename(names), again), types

    def _typed(self, table: RawTable, types: dict[str, str], as_text: set[str]) -> RawTable:
        """Gives fields their types, except those in `as_text`; a field with other values stays text."""
        casts = {}
        for name, kind in types.items():
            if name in as_text or kind == "token":
                continue
            entries = (
                pl.col(name)
                .str.split(self.sequence_separator)
                .list.eval(pl.element().filter(pl.element().str.strip_chars() != ""))
            )
            if kind == "token_seq":
                casts[name] = entries
            elif kind == "float_seq":
                casts[name] = entries.cast(pl.List(pl.Float64), strict=False)
            else:
                casts[name] = pl.col(name).str.strip_chars().cast(pl.Float64, strict=False)
        floats = {
            name: (cast.is_null() & (pl.col(name).str.strip_chars() != "")).any()
            for name, cast in casts.items()
            if types[name] == "float"
        }
        if floats:
            wrong = looked_at(
                table, lambda frame: frame.select(**floats).collect(engine="streaming").row(0, named=True)
            )
            casts = {name: cast for name, cast in casts.items() if not wrong.get(name)}
        again = table.with_lines
        exactly = None if again is None else lambda: again().with_columns(**casts)
        return RawTable(table.path, table.frame.with_columns(**casts), exactly)

    def _read_items(self, path: Path, findings: Findings, workspace: Path) -> RawTable:
        table, types = self._open(path, findings, workspace)
        table = collected(table)
        columns = {"item": self.item}
        for target, given, usual in (
            ("title", self.title, TITLES),
            ("text", self.text, TEXTS),
            ("categories", self.categories, CATEGORIES),
        ):
            default = next((name for name in usual if name in types), usual[0])
            column = column_of(table, given, default)
            if column is not None:
                columns[target] = column
        as_text = {columns[name] for name in ("item", "title", "text") if name in columns}
        as_text.add(columns.get("categories", self.item))
        table = mapped(self._typed(table, types, as_text), columns, "items")
        if "categories" in columns:
            listed = list_column(table.frame, "categories", path, self.sequence_separator, findings)
            table.frame = table.frame.with_columns(listed)
        return with_source_rows(with_clean_ids(table, "item", findings))
