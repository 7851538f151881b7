"""Which datasets have been checked: a whole check is made once, then sizes and time stamps are compared."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl

from recllm.data import schema
from recllm.errors import DataError
from recllm.files import write_json

CHECKED = ".checked.json"
"""Name of the note in a dataset's folder; it may be deleted at any time."""
_RULES = 1
"""To be raised when `Dataset.validate` checks more."""
_SETTLED_NS = 2 * 10**9  # what has just changed may change again without a new time stamp
_TABLES = frozenset(f"{name}.parquet" for name in schema.TABLES)


@dataclass(frozen=True)
class Note:
    """What a dataset's folder says of its last check.

    Attributes:
        folder: The dataset's folder.
        files: The tables as the manifest describes them.
        found: The note; None where there is none that can be read.
    """

    folder: Path
    files: dict[str, Any] | None
    found: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path, manifest: dict[str, Any]) -> Note:
        """Reads the note of a dataset."""
        found = None
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((folder / CHECKED).read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("rules") == _RULES:
                found = content
        return cls(folder, manifest.get("files"), found)

    def holds(self) -> bool:
        """Tells whether the dataset was valid, and no table and no folder of images has changed since."""
        if self.found is None or self.found.get("files") != self.files:
            return False
        state = self.found.get("state")
        return isinstance(state, dict) and state.keys() >= _TABLES and state == self._state(state)

    def write(self, images: pl.Series, begun: int) -> None:
        """Notes that the dataset is valid; a folder that cannot be written is checked again next time.

        Args:
            images: The relative paths of each item's images.
            begun: When the check began, in nanoseconds; what changed shortly before may change unnoticed.
        """
        parents = images.explode().drop_nulls().str.replace(r"/?[^/]*$", "").unique()
        if "" in parents:
            return  # images beside the tables, in a folder that changes with all that is made of a dataset
        folders = {str(each) for path in parents for each in (path, *PurePosixPath(path).parents)} - {"."}
        state = self._state([*sorted(_TABLES), *sorted(folders)])
        if state is not None and begun - max(changed for *_, changed in state.values()) > _SETTLED_NS:
            with contextlib.suppress(OSError, DataError):
                write_json(self.folder / CHECKED, {"rules": _RULES, "files": self.files, "state": state})

    def _state(self, names: Iterable[str]) -> dict[str, list[int]] | None:
        """Returns size, inodes (of a link itself, too) and time of files and folders.

        A folder's time changes when a file in it is added, removed, renamed or replaced.
        """
        state = {}
        try:
            for name in names:
                path = os.path.join(self.folder, name)  # noqa: PTH118
                found, itself = os.stat(path), os.lstat(path)  # noqa: PTH116
                size = found.st_size if name in _TABLES else 0
                state[name] = [size, found.st_ino, itself.st_ino, found.st_mtime_ns]
        except OSError:
            return None
        return state
