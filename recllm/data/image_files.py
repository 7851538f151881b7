"""Where a dataset's images may lie, and how they get there: as plain files inside its folder."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from recllm.errors import DataError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2"),
)
UNREADABLE = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw")
"""Suffixes of images that the image loader cannot read; an import counts them."""


def is_inside(relative: str) -> bool:
    """Tells whether a relative path, read as text, stays below the folder it starts from."""
    if not relative or "\0" in relative or "\\" in relative or relative.startswith(("/", "~")):
        return False
    parts = PurePosixPath(relative).parts
    return bool(parts) and ".." not in parts and ":" not in parts[0]


def is_plain_file(path: Path) -> bool:
    """Tells whether `path` is a file; one that cannot even be looked up (a name too long) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_image_paths(folder: Path, paths: Iterable[tuple[str, str]]) -> None:
    """Checks that every image path is a plain file below `folder`, also after symbolic links are followed.

    Args:
        folder: The dataset folder.
        paths: Pairs of (item id, relative path).

    Raises:
        DataError: A path leaves the folder, is missing, or is not a file. The item and the path are named.
    """
    root = os.path.realpath(folder)
    safe_parents: dict[str, bool] = {}
    for item, path in paths:
        if not is_inside(path):
            raise DataError(
                f"items.parquet: item {item!r}: the image path {path!r} leaves the dataset folder"
            )
        parent, full = os.path.dirname(path), os.path.join(root, path)  # noqa: PTH118, PTH120 - 60,000 paths a second
        if parent not in safe_parents:
            real = os.path.realpath(os.path.join(root, parent))  # noqa: PTH118
            safe_parents[parent] = real == root or real.startswith(root + os.sep)
        try:
            mode = os.lstat(full).st_mode
        except OSError:
            raise DataError(
                f"items.parquet: item {item!r}: the image {path!r} is missing in {folder}"
            ) from None
        if not safe_parents[parent] or not stat.S_ISREG(mode):
            raise DataError(f"items.parquet: item {item!r}: the image {path!r} is a link or no plain file")


def copy_image(source: Path, target: Path, *, link: bool) -> None:
    """Copies one image, or makes a hard link to it where `link` is set and both lie on one disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another disk, or a file system without hard links: a copy serves as well
    shutil.copyfile(source, target)
