"""Raw files in, a dataset folder out: read, clean, join, stage the images, validate, rename into place."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data import schema
from recllm.data.coding import encode, recode
from recllm.data.dataset import NO_TIME, Dataset, finish_dataset
from recllm.data.derived import dataset_folder
from recllm.data.filtering import write_rows
from recllm.data.image_files import copy_image, is_inside, is_plain_file
from recllm.data.raw.cleaning import read_side_table, write_interactions
from recllm.data.raw.findings import SHOWN, Findings
from recllm.data.raw.tables import RawDataset, images_by_item
from recllm.data.raw.times import TimeReading
from recllm.data.readers.options import ImportOptions
from recllm.errors import DataError
from recllm.progress import Progress


def import_dataset(options: ImportOptions) -> tuple[Dataset, Findings]:
    """Imports raw files as a dataset folder.

    Killed at any moment, it leaves no dataset at `options.out`, or the one that was there before. An old one
    that holds splits, texts or other derived files is replaced only with `discard_derived`; see
    `recllm.data.derived`.

    Args:
        options: A reader with its options, for example `recllm.data.readers.MovieLens(source, out)`.

    Returns:
        The dataset, and what was found wrong with the source.

    Raises:
        DataError: The source cannot be read, has nothing in it, or (`strict`) has a malformed line; or
            `options.out` exists and may not be replaced.
    """
    for path in (options.source, options.out):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(f"{str(path)!r}: a name with bytes that are not UTF-8; rename it") from None
    findings = Findings(strict=options.strict)
    with dataset_folder(
        options.out, overwrite=options.overwrite, discard_derived=options.discard_derived
    ) as folder:
        workspace = folder / ".workspace"
        raw = options.read(findings, workspace)
        if "timestamp" not in raw.interactions.frame.collect_schema():
            findings.note(
                "the interactions have no time column; where order matters, input order stands for it"
            )
        codes = _write_tables(raw, folder, options, findings)
        shutil.rmtree(workspace, ignore_errors=True)
        source = {"reader": type(options).__name__, "path": options.source.name, **raw.source}
        dataset = finish_dataset(folder, source=source, dropped=findings.as_dict(), codes=codes)
    dataset.folder = options.out
    return dataset, findings


def _write_tables(
    raw: RawDataset, folder: Path, options: ImportOptions, findings: Findings
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the three tables and the images; returns the user and item code of each interaction."""
    target = folder / "interactions.parquet"
    times = TimeReading(options.timestamp_unit, options.time_format)
    keep = write_interactions(raw.interactions, target, times, findings).to_numpy().copy()
    good = pl.scan_parquet(target, glob=False).filter(pl.col("user").is_not_null())
    user_ids, touched = (
        good.select(name).unique().collect(engine="streaming")[name].sort() for name in ("user", "item")
    )
    items, unknown = _join_items(raw, touched, findings)
    item_ids = pl.concat([items["item"], unknown]).sort()
    user_codes, item_codes = encode(pl.scan_parquet(target, glob=False), user_ids, item_ids)

    if options.unknown_items == "drop" and raw.items is not None and len(unknown):
        gone = item_ids.is_in(unknown.implode()).to_numpy()[item_codes] & keep
        examples = [f"item {item!r}" for item in unknown.head(SHOWN)]
        reason = "interactions with items that the items table lacks"
        findings.drop(reason, int(gone.sum()), examples, chosen=True)
        keep &= ~gone
    elif len(unknown):
        if raw.items is not None:
            shown = ", ".join(map(repr, unknown.head(3)))
            findings.note(
                f"{len(unknown):,} items are not in the items table ({shown}): kept, without title or text"
            )
        items = pl.concat([items, unknown.to_frame("item")], how="diagonal").sort("item")
    if options.duplicates != "keep":
        extra = _repeated(target, user_codes, item_codes, keep, options.duplicates)
        pairs = [(user_ids[int(user_codes[row])], item_ids[int(item_codes[row])]) for row in extra[:SHOWN]]
        examples = [f"user {user!r}, item {item!r}" for user, item in pairs]
        if len(extra) and options.duplicates == "error":
            raise DataError(
                f"{raw.interactions.path}: {examples[0]} repeats an earlier row ({len(extra):,} such rows)"
            )
        reason = f"repeated (user, item) pairs (the {options.duplicates} in time counts)"
        findings.drop(reason, len(extra), examples, chosen=True)
        keep[extra] = False
    _keep_rows(target, keep, raw.interactions.path)

    users_kept = np.bincount(user_codes[keep], minlength=len(user_ids)) > 0
    users = _join_users(raw, user_ids.filter(pl.Series(users_kept)).to_frame("user"), findings)
    items_kept = item_ids.is_in(items["item"].implode()).to_numpy()
    items = _stage_images(raw, items, folder, options, findings)
    for name, frame in (("items", items), ("users", users)):
        schema.complete(frame.lazy(), name).collect().write_parquet(folder / f"{name}.parquet")
    return recode(user_codes[keep], users_kept), recode(item_codes[keep], items_kept)


def _join_items(raw: RawDataset, touched: pl.Series, findings: Findings) -> tuple[pl.DataFrame, pl.Series]:
    """Returns the items table, and the ids of `touched` that it lacks."""
    if raw.items is None:
        return pl.DataFrame(schema={"item": pl.String}), touched
    items = read_side_table(raw.items, "item", findings)
    if raw.only_touched:
        items = items.filter(pl.col("item").is_in(touched.implode()))
    known = touched.is_in(items["item"].implode())
    if not known.any():
        listed = repr(items["item"][0]) if len(items) else "no id at all"
        raise DataError(
            f"no item id of {raw.interactions.path.name} (such as {touched[0]!r}) is in "
            f"{raw.items.path.name} (such as {listed}); check which columns hold the ids"
        )
    return items, touched.filter(~known)


def _join_users(raw: RawDataset, users: pl.DataFrame, findings: Findings) -> pl.DataFrame:
    if raw.users is None:
        return users
    table = read_side_table(raw.users, "user", findings)
    known = table["user"].is_in(users["user"].implode())
    if len(users) and not known.any():
        listed = repr(table["user"][0]) if len(table) else "no id at all"
        raise DataError(
            f"no user id of {raw.interactions.path.name} (such as {users['user'][0]!r}) is in "
            f"{raw.users.path.name} (such as {listed}); check which columns hold the ids"
        )
    idle = len(table) - known.sum()
    if idle:
        findings.note(f"{idle:,} users of {raw.users.path.name} have no interaction and were not taken over")
    return users.join(table, on="user", how="left", maintain_order="left")


def _repeated(
    target: Path, users: np.ndarray, items: np.ndarray, keep: np.ndarray, policy: str
) -> np.ndarray:
    """Rows that repeat a (user, item) pair: all but the first (or last) in time, ties in input order."""
    rows = np.flatnonzero(keep)
    pairs = users[rows].astype(np.int64) << 32 | items[rows]
    ordered = np.sort(pairs)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(several):
        return several
    chosen = several[np.minimum(np.searchsorted(several, pairs), len(several) - 1)] == pairs
    rows, pairs = rows[chosen], pairs[chosen]
    times = (
        pl.scan_parquet(target, glob=False)
        .select(pl.col("timestamp").fill_null(NO_TIME))
        .collect(engine="streaming")
    )
    time = times["timestamp"].to_numpy()[rows]
    if policy == "first":  # a row without a time never wins over one that has it
        time = np.where(time == NO_TIME, np.iinfo(np.int64).max, time)
    order = np.lexsort((time, pairs))
    same = pairs[order][1:] == pairs[order][:-1]
    extra = np.append(same, False) if policy == "last" else np.insert(same, 0, False)
    return np.sort(rows[order[extra]])


def _keep_rows(target: Path, keep: np.ndarray, source: Path) -> None:
    if keep.all():
        return
    if not keep.any():
        raise DataError(f"{source}: no interaction is left; see what the options leave out")
    filtered = target.with_name("interactions.filtered.parquet")
    write_rows(pl.scan_parquet(target, glob=False), keep, filtered)
    filtered.replace(target)


def _stage_images(
    raw: RawDataset, items: pl.DataFrame, folder: Path, options: ImportOptions, findings: Findings
) -> pl.DataFrame:
    """Copies the items' images to `images/`, under the paths they have in the source folder."""
    if raw.image_folder is None:
        return items
    if raw.find_images:
        found = images_by_item(raw.image_folder, items["item"], findings, pattern=raw.image_pattern)
        items = items.drop("images", strict=False).join(found, on="item", how="left", maintain_order="left")
    elif "images" not in items.columns:
        return items
    kept: dict[str, list[str]] = {}
    outside: list[str] = []
    missing: list[str] = []
    root = raw.image_folder.resolve()
    pairs = items.select("item", "images").explode("images").drop_nulls()
    for item, path in Progress(pairs.iter_rows(), "images", len(pairs), unit="file"):
        source = root / path if is_inside(path) else None
        if source is None or not source.resolve().is_relative_to(root):
            outside.append(f"item {item!r}: {path!r}")
        elif not is_plain_file(source) or source.stat().st_size == 0:
            missing.append(f"item {item!r}: {path!r}")
        else:
            staged = f"images/{path}"
            if not (folder / staged).exists():
                copy_image(source, folder / staged, link=options.link_images)
            kept.setdefault(item, []).append(staged)
    findings.drop("image paths that leave the image folder", len(outside), outside)
    findings.drop("image files that are missing or empty", len(missing), missing)
    paths = pl.DataFrame(
        {"item": list(kept), "images": list(kept.values())},
        schema={"item": pl.String, "images": pl.List(pl.String)},
    )
    return items.drop("images").join(paths, on="item", how="left", maintain_order="left")
