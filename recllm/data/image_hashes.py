"""Hashes of image files, computed once for a dataset and kept in its folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from recllm.errors import DataError
from recllm.files import write_file

CACHE = ".image-hashes.npy"
"""Name of the cache in a dataset's folder; it may be deleted at any time."""
_ENTRY = np.dtype(
    [("path", "S32"), ("bytes", "<i8"), ("changed", "<i8"), ("inode", "<u8"), ("sha256", "S64")]
)
_RECENT_NS = 2 * 10**9  # a file that has just changed may change again without a new time stamp


class ImageHashes:
    """SHA-256 of image files: each file is read once as long as its size, time stamp and inode stay the same.

    Args:
        folder: A dataset's folder. What is known of files in it is read from its cache, and `save` keeps it
            there; None remembers within this object alone.
        limit: Files whose hash is remembered in memory.
    """

    def __init__(self, folder: Path | None = None, limit: int = 65_536) -> None:
        self._of_version = lru_cache(limit)(self._hash)
        self._folder = None if folder is None else Path(folder)
        self._roots: tuple[str, ...] = ()
        self._known = np.empty(0, _ENTRY)
        self._new: dict[bytes, tuple[int, int, int, bytes]] = {}
        if self._folder is not None:
            self._roots = tuple({os.path.join(each, "") for each in (folder, os.path.realpath(folder))})  # noqa: PTH118
            self._known = _read(self._folder / CACHE)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageHashes, (self._folder,)  # what a worker process learns stays there

    def __call__(self, path: Path) -> str:
        """Returns the hash in hex.

        Raises:
            OSError: The file is missing or cannot be read.
        """
        found = os.stat(path)  # noqa: PTH116 - a third of the time of Path.stat
        return self._of_version(os.fspath(path), found.st_size, found.st_mtime_ns, found.st_ino)

    def save(self) -> None:
        """Keeps what is new in the dataset's folder, beside what other processes have kept there meanwhile.

        A folder that cannot be written is left as it is: then files are hashed again next time.
        """
        if self._folder is None or not self._new:
            return
        with contextlib.suppress(OSError, DataError), _alone(self._folder):
            entries = [(key, *entry) for key, entry in self._new.items()]
            merged = np.concatenate([np.array(entries, _ENTRY), _read(self._folder / CACHE)])
            _, first = np.unique(merged["path"], return_index=True)  # ours where both have a file
            self._known = merged[first]
            write_file(self._folder / CACHE, lambda temporary: _write(temporary, self._known))
            self._new = {}

    def _hash(self, path: str, size: int, changed: int, inode: int) -> str:
        key = self._key(path)
        if key is not None and (known := self._look_up(key, (size, changed, inode))) is not None:
            return known
        with open(path, "rb") as file:  # noqa: PTH123
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if key is not None and time.time_ns() - changed > _RECENT_NS:
            self._new[key] = size, changed, inode, found.encode()
        return found

    def _key(self, path: str) -> bytes | None:
        """Returns what stands for a path within the folder; None where it lies elsewhere."""
        for root in self._roots:
            if path.startswith(root):
                return hashlib.blake2b(os.fsencode(path[len(root) :]), digest_size=16).hexdigest().encode()
        return None

    def _look_up(self, key: bytes, version: tuple[int, int, int]) -> str | None:
        place = int(np.searchsorted(self._known["path"], np.bytes_(key)))
        if place == len(self._known):
            return None
        path, *known, found = self._known[place].item()
        if path != key:
            return None
        return found.decode() if tuple(known) == version else None


def _read(path: Path) -> np.ndarray:
    """Returns the entries of a cache, memory-mapped; none where there is no cache that can be read."""
    try:
        entries = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.empty(0, _ENTRY)
    return entries if entries.dtype == _ENTRY and entries.ndim == 1 else np.empty(0, _ENTRY)


def _write(path: Path, entries: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, entries)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process updates the cache of this folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
