"""MicroLens (50k, 100k, 1M): short videos with a cover image and a title each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.data.raw.delimited import read_delimited
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import find_images, join_columns, mapped, with_clean_ids
from recllm.data.raw.lines import open_bytes
from recllm.data.raw.sequence_lines import read_sequences
from recllm.data.raw.tables import FILE, LINE, RawDataset, RawTable, find_file, require_columns
from recllm.data.readers.options import ImportOptions
from recllm.errors import DataError

USER = ("user", "userid", "user_id")
ITEM = ("item", "videoid", "itemid", "item_id", "video_id")
TIME = ("timestamp", "time")


@dataclass
class MicroLens(ImportOptions):
    """Imports a MicroLens folder: pairs, titles and covers.

    That is `*_pairs.csv` or `*_pairs.tsv`, `*_titles.csv` or `*_title_en.csv`, and a folder of covers. Where
    both pairs files are there, the CSV counts, for it has the times. Likes and views
    (`*_likes_and_views.txt`) become extra columns of the items; they were counted at the end of the log, so
    a model must not see them in training. Category tags (`tags_to_summary.csv`) become categories.
    """

    covers: Path | None = None
    """Folder with one image a video, named by its id; by default SOURCE's folder with `cover` in its name."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the files that the folder holds."""
        pairs = find_file(self.source, "*pairs.csv*", "*pairs.tsv*", what="MicroLens pairs file")
        sequences = ".tsv" in pairs.suffixes
        table = (
            read_sequences(pairs, findings, workspace) if sequences else _pairs(pairs, findings, workspace)
        )
        raw = RawDataset(table, source={"pairs": pairs.name})
        if sequences:
            raw.source["order"] = "time"
        titles = self._optional("*titles.csv*", "*title_en.csv*", "*title*.csv*")
        if titles is not None:
            raw.items = _two_columns(titles, "title", findings, workspace)
        for path, names in (
            (self._optional("*likes_and_views.txt*"), ["likes", "views"]),
            (self._optional("*tags_to_summary.csv*"), ["categories"]),
        ):
            if path is not None:
                join_columns(raw, _features(path, names, findings, workspace), findings)
        covers = self.covers or self._covers_folder()
        if covers is not None:
            find_images(raw, covers)
        return raw

    def _optional(self, *patterns: str) -> Path | None:
        for pattern in patterns:
            found = sorted(path for path in self.source.glob(pattern) if path.is_file())
            if found:
                return found[0]
        return None

    def _covers_folder(self) -> Path | None:
        found = sorted(path for path in self.source.glob("*cover*") if path.is_dir())
        if not found:
            return None
        # The archive has the folder in a folder of the same name.
        inner = found[0] / found[0].name
        return inner if inner.is_dir() else found[0]


def _pairs(path: Path, findings: Findings, workspace: Path) -> RawTable:
    table = read_delimited(path, findings, workspace)
    names = {name.lower(): name for name in table.frame.collect_schema().names()}
    columns = {}
    for target, usual in (("user", USER), ("item", ITEM), ("timestamp", TIME)):
        column = next((names[name] for name in usual if name in names), None)
        if column is not None or target != "timestamp":
            columns[target] = column or target
    require_columns(path, names.values(), columns.values())
    return mapped(table, columns, "interactions")


def _two_columns(path: Path, name: str, findings: Findings, workspace: Path) -> RawTable:
    """Reads `item,title` with or without a header line; titles may hold commas without being quoted."""
    with open_bytes(path) as file:
        first = file.readline(10_000).decode("utf-8", errors="replace").removeprefix("\ufeff")
    has_header = first.split(",")[0].strip().strip('"').lower() in ITEM
    header = None if has_header else ["item", name]
    table = read_delimited(path, findings, workspace, header=header, join_last=True)
    found = table.frame.collect_schema().names()
    held = [column for column in found if column not in (LINE, FILE)]
    if len(held) < 2:
        raise DataError(f"{path}: expected the columns item and {name}; found: {', '.join(held)}")
    return with_clean_ids(mapped(table, {"item": held[0], name: held[1]}, "items"), "item", findings)


def _features(path: Path, names: list[str], findings: Findings, workspace: Path) -> pl.DataFrame:
    if names == ["categories"]:
        table = _two_columns(path, "categories", findings, workspace)
        columns = [pl.concat_list("categories").list.drop_nulls()]
    else:
        table = read_delimited(path, findings, workspace, separator="\t", quote=None, header=["item", *names])
        table = with_clean_ids(table, "item", findings)
        columns = [pl.col(name).cast(pl.Int64, strict=False) for name in names]
    frame = table.frame.select("item", *columns).filter(pl.col("item").is_not_null())
    return frame.unique("item", keep="first", maintain_order=True).collect()
