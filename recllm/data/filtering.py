"""Filters that make a smaller dataset: rating threshold, required image or text, iterated k-core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
from tyro.conf import Positional, arg

from recllm.data.coding import recode
from recllm.data.dataset import Dataset, finish_dataset
from recllm.data.derived import dataset_folder
from recllm.data.image_files import copy_image
from recllm.errors import DataError


@dataclass
class FilterOptions:
    """Filters a dataset: first by rating, image and text, then to the k-core of what is left."""

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder to filter."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The dataset folder to make."""
    user_core: int = 1
    """Every user left has at least this many interactions."""
    item_core: int = 0
    """Every item left has at least this many interactions; 0 keeps items that nobody has touched."""
    min_rating: float | None = None
    """Leave out interactions rated lower than this, and unrated ones."""
    require_image: bool = False
    """Leave out items without an image."""
    require_text: bool = False
    """Leave out items with neither title nor text."""
    overwrite: bool = False
    """Replace OUT where it exists."""
    discard_derived: bool = False
    """With --overwrite: also delete what other commands made from the old dataset (splits, texts,
    instructions, ...). Generated answers, visual tokens and embeddings are kept in any case."""


def k_core(
    user_codes: np.ndarray,
    item_codes: np.ndarray,
    user_core: int,
    item_core: int,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """Finds the largest set of interactions in which every user and every item has enough of them.

    Users and items below their bound are removed in turn until none is.

    Args:
        user_codes: The user of each interaction; shape [interactions], non-negative integers.
        item_codes: The item of each interaction; shape [interactions].
        user_core: Least number of interactions of a user.
        item_core: Least number of interactions of an item.
        keep: Interactions to start from; all where None.

    Returns:
        True for each interaction of the core; shape [interactions].
    """
    rows = np.arange(len(user_codes)) if keep is None else np.flatnonzero(keep)
    users, items = user_codes[rows], item_codes[rows]
    while len(rows):
        enough = (np.bincount(users) >= user_core)[users]
        enough &= (np.bincount(items) >= item_core)[items]
        if enough.all():
            break
        rows, users, items = rows[enough], users[enough], items[enough]
    core = np.zeros(len(user_codes), dtype=bool)
    core[rows] = True
    return core


def filter_dataset(dataset: Dataset, options: FilterOptions) -> Dataset:
    """Writes the filtered dataset.

    Args:
        dataset: The dataset at `options.dataset`.
        options: What to keep.

    Raises:
        DataError: Nothing is left, the log has no ratings to filter by, or the folder cannot be written.
    """
    dropped: dict[str, dict[str, int]] = {}
    items_kept = _required_items(dataset, options, dropped)
    keep = items_kept[dataset.item_codes]
    _count(dropped, "interactions with left-out items", np.count_nonzero(~keep))
    if options.min_rating is not None:
        ratings = dataset.scan_interactions().select("rating").collect(engine="streaming")["rating"]
        if ratings.null_count() == len(ratings):
            raise DataError(f"{dataset.folder} has no ratings, so --min-rating cannot be used")
        high = (ratings >= options.min_rating).fill_null(False).to_numpy()
        _count(
            dropped,
            f"interactions rated below {options.min_rating:g}, or not rated",
            np.count_nonzero(keep & ~high),
        )
        keep &= high
    core = k_core(dataset.user_codes, dataset.item_codes, options.user_core, options.item_core, keep)
    _count(
        dropped,
        f"interactions outside the k-core (users {options.user_core}, items {options.item_core})",
        np.count_nonzero(keep & ~core),
    )
    if not core.any():
        told = "; ".join(f"{entry['rows']:,} {reason}" for reason, entry in dropped.items())
        raise DataError(
            f"{dataset.folder}: no interaction is left after filtering ({told}); lower the bounds"
        )

    users_kept = np.bincount(dataset.user_codes[core], minlength=len(dataset.users)) > 0
    items_kept &= np.bincount(dataset.item_codes[core], minlength=len(dataset.items)) >= options.item_core
    with dataset_folder(
        options.out, overwrite=options.overwrite, discard_derived=options.discard_derived
    ) as folder:
        items = dataset.items.filter(pl.Series(items_kept))
        items.write_parquet(folder / "items.parquet")
        dataset.users.filter(pl.Series(users_kept)).write_parquet(folder / "users.parquet")
        write_rows(dataset.scan_interactions(), core, folder / "interactions.parquet")
        for path in items["images"].explode().drop_nulls().unique():
            # A dataset's images never change in place, so both datasets can share them on disk.
            copy_image(dataset.folder / path, folder / path, link=True)
        source = {
            "filter": _settings(options),
            "data_hash": dataset.data_hash,
            "of": dataset.manifest["source"],
        }
        codes = recode(dataset.user_codes[core], users_kept), recode(dataset.item_codes[core], items_kept)
        filtered = finish_dataset(folder, source=source, dropped={"left_out": dropped}, codes=codes)
    filtered.folder = options.out
    return filtered


def write_rows(frame: pl.LazyFrame, keep: np.ndarray, path: Path) -> None:
    """Streams the rows of `frame` where `keep` is true to a parquet file, in order and in bounded memory."""
    mask = pl.LazyFrame({"__keep": keep})
    rows = pl.concat([frame, mask], how="horizontal").filter("__keep").drop("__keep")
    rows.sink_parquet(path, engine="streaming", compression_level=1)


def _required_items(
    dataset: Dataset, options: FilterOptions, dropped: dict[str, dict[str, int]]
) -> np.ndarray:
    kept = np.ones(len(dataset.items), dtype=bool)
    has_image = (dataset.items["images"].list.len() > 0).to_numpy()
    has_text = ((dataset.items["title"] != "") | (dataset.items["text"] != "")).to_numpy()
    for required, has, what in (
        (options.require_image, has_image, "items without an image"),
        (options.require_text, has_text, "items with neither title nor text"),
    ):
        if required:
            _count(dropped, what, np.count_nonzero(kept & ~has))
            kept &= has
    return kept


def _settings(options: FilterOptions) -> dict[str, object]:
    left_out = ("dataset", "out", "overwrite", "discard_derived")
    return {name: value for name, value in vars(options).items() if name not in left_out}


def _count(dropped: dict[str, dict[str, int]], reason: str, rows: int) -> None:
    if rows:
        dropped[reason] = {"rows": int(rows)}
