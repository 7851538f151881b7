"""What the `recllm data ...` commands do and print, over the library's functions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import polars as pl
from tyro.conf import Positional, arg

from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.dataset import Dataset
from recllm.data.derived import kept_stores
from recllm.data.filtering import FilterOptions, filter_dataset
from recllm.data.importing import import_dataset
from recllm.data.readers import (
    Amazon,
    ImportOptions,
    ItemSequences,
    MicroLens,
    MovieLens,
    PreSplit,
    RecBole,
    Table,
    Yelp,
)
from recllm.data.split_facts import said
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.data.toyworld import ToyworldConfig, write_toyworld
from recllm.files import MANIFEST, read_json
from recllm.printing import printable

__all__ = [
    "Amazon",
    "CandidateOptions",
    "FilterOptions",
    "InspectOptions",
    "ItemSequences",
    "MicroLens",
    "MovieLens",
    "PreSplit",
    "RecBole",
    "SplitOptions",
    "Table",
    "ToyworldConfig",
    "Yelp",
    "candidates",
    "filter_",
    "import_raw",
    "inspect",
    "split",
    "toyworld",
]


@dataclass
class InspectOptions:
    """Shows what is in a dataset: counts, columns, the first rows, what the import left out."""

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder."""
    rows: int = 3
    """Rows of each table to show."""


def import_raw(options: ImportOptions) -> None:
    """Imports raw files and prints what came of it."""
    dataset, findings = import_dataset(options)
    for line in findings.lines():
        print(line)
    _print_counts(dataset)
    _print_kept(dataset)


def toyworld(options: ToyworldConfig) -> None:
    """Makes a toy world."""
    dataset = write_toyworld(options)
    _print_counts(dataset)
    _print_kept(dataset)


def inspect(options: InspectOptions) -> None:
    """Prints a dataset's counts, columns and first rows."""
    dataset = Dataset.open(options.dataset)
    _print_counts(dataset)
    for kind in ("left_out", "kept"):
        for reason, entry in dataset.manifest["dropped"].get(kind, {}).items():
            print(printable(f"{kind.replace('_', ' ')}: {entry['rows']:,} {reason}"))
    tables = {"items": dataset.items, "interactions": dataset.scan_interactions(), "users": dataset.users}
    with pl.Config(tbl_cols=-1, fmt_str_lengths=40, tbl_hide_dataframe_shape=True):
        for name, table in tables.items():
            print(f"\n{name}.parquet")
            print(_shown(table.lazy().head(options.rows).collect()))


def _shown(table: pl.DataFrame) -> pl.DataFrame:
    """Returns a table's rows with their texts escaped, for a terminal."""
    texts = [name for name, dtype in table.schema.items() if dtype in (pl.String, pl.List(pl.String))]
    columns = {
        name: [
            None if value is None else printable(value) if isinstance(value, str) else [*map(_entry, value)]
            for value in table[name].to_list()
        ]
        for name in texts
    }
    shown = table.with_columns(
        pl.Series(name, values, table.schema[name]) for name, values in columns.items()
    )
    return shown.rename({name: printable(name) for name in table.columns})


def _entry(value: str | None) -> str | None:
    return None if value is None else printable(value)


def filter_(options: FilterOptions) -> None:
    """Filters a dataset into a new one."""
    filtered = filter_dataset(Dataset.open(options.dataset), options)
    for reason, entry in filtered.manifest["dropped"]["left_out"].items():
        print(f"left out: {entry['rows']:,} {reason}")
    _print_counts(filtered)
    _print_kept(filtered)


def split(options: SplitOptions) -> None:
    """Splits a dataset."""
    made = make_split(Dataset.open(options.dataset), options)
    counts = made.manifest["counts"]
    print(f"{made.folder}: protocol {made.protocol}")
    for part in ("train", "valid", "test"):
        targets = f", {counts[f'{part}_targets']:,} of them targets" if part != "train" else ""
        beside = f", and {counts[f'{part}_dislikes']:,} dislikes" if f"{part}_dislikes" in counts else ""
        print(f"  {part:<6} {counts[part]:>12,} interactions{targets}{beside}")
    if counts["unused"]:
        print(f"  unused {counts['unused']:>12,} interactions")
    for line in said(made.manifest["facts"]):
        print(f"  {line}")
    for warning in made.manifest["warnings"]:
        print(f"warning: {warning}")
    print(f"next: recllm data candidates {made.folder}")


def candidates(options: CandidateOptions) -> None:
    """Draws candidates for a split."""
    opened = Split.open(options.split)
    folder = make_candidates(opened, options)
    left_out = read_json(folder / MANIFEST, "the candidates' manifest")["left_out"]
    for part in ("valid", "test"):
        rows = pl.scan_parquet(folder / f"{part}.parquet", glob=False).select(pl.len()).collect().item()
        lists = rows // (options.negatives + 1)
        print(
            f"{folder / part}.parquet: {lists:,} lists of 1+{options.negatives}, "
            f"protocol {opened.protocol}/{options.name}"
        )
        if left_out[part]["lists"]:
            users = ", ".join(map(repr, left_out[part]["users"]))
            print(
                f"  left out: {left_out[part]['lists']:,} lists of users with fewer than {options.negatives} "
                f"items that they have not touched ({users})"
            )


def _print_counts(dataset: Dataset) -> None:
    counts = dataset.manifest["counts"]
    print(
        f"{dataset.folder}: {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['interactions']:,} interactions"
    )
    told = [f"{counts[f'items_with_{what}']:,} with {what}" for what in ("title", "text", "image")]
    print(f"  items: {', '.join(told)}")
    told = [f"{counts[what]:,} with {what}" for what in ("timestamps", "ratings", "reviews")]
    print(f"  interactions: {', '.join(told)}")
    if dataset.has_timestamps:
        print(f"  time: {' to '.join(map(_day, dataset.manifest['time_range']))} (UTC)")


def _print_kept(dataset: Dataset) -> None:
    """Prints what a new dataset has from the one that it replaced."""
    if kept := kept_stores(dataset.folder):
        print(f"  kept from the old dataset: {', '.join(kept)}")


def _day(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):  # beyond the years that dates have
        return f"{seconds:,} s"
