"""What every reader returns, and the small things that readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from recllm.data.raw.findings import Findings
from recllm.errors import DataError

LINE = "__line"
"""Name of the column that holds a row's line number in its source file, where a reader knows it."""
FILE = "__file"
"""Name of the column that holds a row's source file, where a table is read from several."""
_OWN = (LINE, FILE, "__problem", "__row", "__keep", "__part")


@dataclass
class RawTable:
    """One table as it stands in the source, before ids, times and numbers are checked.

    Attributes:
        path: The source file, for messages.
        frame: The rows, in input order; columns carry recllm's names. Values may still be text. `LINE` and
            `FILE` are columns for messages and are left out of the dataset.
        with_lines: Reads the table once more, slowly, with a `LINE` column, to name the lines of bad rows.
            None where `frame` has that column already.
    """

    path: Path
    frame: pl.LazyFrame
    with_lines: Callable[[], pl.LazyFrame] | None = None


@dataclass
class RawDataset:
    """What a reader returns.

    Attributes:
        interactions: `user`, `item`, and where there are any `timestamp`, `rating`, `review` and extra
            columns.
        items: `item`, and where there are any `title`, `text`, `categories`, `images` and extra columns; None
            where the source has no items table. `images` holds paths relative to `image_folder`.
        users: `user` and extra columns; None where the source has no users table.
        image_folder: The folder of the source images.
        find_images: Look in that folder for images of the items, by id, once the items are known.
        image_pattern: Where an item's image is in that folder; see `images_by_item`.
        only_touched: The items table was made from the interactions, so it holds no other items.
        source: What the manifest says of the source; `order: time` where the order of the rows stands for
            times.
    """

    interactions: RawTable
    items: RawTable | None = None
    users: RawTable | None = None
    image_folder: Path | None = None
    find_images: bool = False
    image_pattern: str | None = None
    only_touched: bool = False
    source: dict[str, str] = field(default_factory=dict)


def find_file(folder: Path, *names: str, what: str) -> Path:
    """Returns the first of `names` (glob patterns allowed) that exists in `folder`.

    Raises:
        DataError: None exists; the message lists what the folder holds.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected the folder with {what}")
    for name in names:
        found = sorted(path for path in folder.glob(name) if path.is_file())
        if found:
            return found[0]
    raise DataError(f"{folder}: no {what} ({' or '.join(names)}); {_held(folder)}")


def existing_file(path: Path, what: str) -> Path:
    """Returns `path` if it is a file.

    Raises:
        DataError: It is a folder, or does not exist; the message lists what the folder holds.
    """
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{path} is a folder; give {what} in it ({_held(path)})")
    parent = path.parent
    raise DataError(f"{path}: no such file{f'; {parent}: ' + _held(parent) if parent.is_dir() else ''}")


def _held(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    return f"the folder holds: {', '.join(names[:12]) or 'nothing'}{more}"


def require_columns(path: Path, found: Iterable[str], needed: Iterable[str]) -> None:
    """Checks that a table has the columns a reader needs.

    Raises:
        DataError: One is missing; the message lists those found.
    """
    found = list(found)
    missing = [name for name in needed if name not in found]
    if missing:
        hint = ""
        if len(found) == 1 and (other := next((mark for mark in ";\t|" if mark in found[0]), "")):
            hint = f"; if {other!r} stands between the fields, say --separator"
        named = ", ".join(map(repr, missing))
        raise DataError(f"{path}: missing column {named}; found: {shown_names(found)}{hint}")


def shown_names(names: Iterable[str]) -> str:
    """Returns names for a message, which stays short where a file of another kind has names without end."""
    names = [name if len(name) <= 60 else f"{name[:60]}..." for name in names]
    more = f" and {len(names) - 30:,} more" if len(names) > 30 else ""
    return ", ".join(names[:30]) + more


def check_names(path: Path, names: Iterable[str]) -> None:
    """Checks that column names can be kept: Polars reads `*` and `^...$` as patterns, and some names are
    recllm's own.

    Raises:
        DataError: One cannot.
    """
    for name in names:
        if name == "*" or (name.startswith("^") and name.endswith("$")) or name in _OWN:
            raise DataError(f"{path}: the column name {name!r} cannot be kept; rename the column")


def check_image_search(folder: Path, pattern: str | None) -> None:
    """Checks what `images_by_item` is told.

    Raises:
        DataError: The folder is missing, or the pattern lacks `{item}`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected the images")
    if pattern is not None and "{item}" not in pattern:
        raise DataError(
            f"the image pattern {pattern!r} has no {{item}} in it, so it names one file for all items"
        )


def images_by_item(
    folder: Path, items: pl.Series, findings: Findings, *, pattern: str | None = None
) -> pl.DataFrame:
    """Finds the images of items in a folder.

    Without a pattern, an image in the folder or below it belongs to the item whose id is the file's name
    without its suffix (`123.jpg`, `12/123.png`) or with a number behind it (`123_0.jpg`, `123_1.jpg`), or
    else the name of the folder that holds it with a number (`123/0.jpg`).

    Args:
        folder: The image folder.
        items: Item ids.
        findings: Where images without an item are noted.
        pattern: A path relative to `folder` with `{item}` in it, for example `{item}/cover.jpg`.

    Returns:
        Columns `item` and `images` (paths relative to `folder`), one row for each item that has one.

    Raises:
        DataError: The folder is missing, the pattern lacks `{item}`, or no item has an image.
    """
    from recllm.data.image_files import SUFFIXES, UNREADABLE, is_inside, is_plain_file

    check_image_search(folder, pattern)
    names: list[str] = []
    if pattern is not None:
        found = [(item, pattern.replace("{item}", item)) for item in items.unique().sort()]
        outside = [f"item {item!r}: {path!r}" for item, path in found if not is_inside(path)]
        findings.drop("image paths that leave the image folder", len(outside), outside)
        rows = [(item, [path]) for item, path in found if is_inside(path) and is_plain_file(folder / path)]
        without = len(found) - len(rows) - len(outside)
        if rows and without:
            findings.note(f"{without:,} of {len(found):,} items have no image by the pattern {pattern!r}")
    else:
        held = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
        names = [path.as_posix() for path in held if path.suffix.lower() in SUFFIXES]
        strange = [path.as_posix() for path in held if path.suffix.lower() in UNREADABLE]
        findings.drop("images in a format that cannot be read (convert them to JPEG)", len(strange), strange)
        known = set(items.to_list())
        by_item: dict[str, list[tuple[int, str]]] = {}
        for name in names:
            stem = name.rpartition("/")[2].rsplit(".", 1)[0]
            head, _, number = stem.rpartition("_")
            item = stem if stem in known else head if head in known and number.isdecimal() else None
            parent = name.rpartition("/")[0].rpartition("/")[2]
            if item is None and parent in known and stem.isdecimal():
                item = parent  # a folder for each item
            if item is not None:
                place = number if head == item and number.isdecimal() else stem if item == parent else ""
                by_item.setdefault(item, []).append((int(place) if place.isdecimal() else -1, name))
        unused = len(names) - sum(map(len, by_item.values()))
        if unused:
            findings.note(
                f"{unused:,} of {len(names):,} images in {folder.name} belong to no item and were not copied"
            )
        rows = [(item, [name for _, name in sorted(found)]) for item, found in by_item.items()]
    if not rows and len(items):
        told = f"{pattern!r} names none that is there" if pattern is not None else _images_held(names)
        raise DataError(
            f"no image in {folder} belongs to any item (item ids are such as {items[0]!r}); {told}; "
            "--image-pattern of `data import table` says where they are"
        )
    types = {"item": pl.String(), "images": pl.List(pl.String())}
    return pl.DataFrame(rows, schema=types, orient="row")


def _images_held(names: list[str]) -> str:
    return f"it holds {len(names):,} images" + (f" such as {names[0]!r}" if names else "")
