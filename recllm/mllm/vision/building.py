"""A store of vectors while it is built: what a killed build had finished is kept, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import torch

from recllm.errors import BusyError, DataError
from recllm.files import MANIFEST, staged_folder, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"float32": np.dtype("<u4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2")}
"""How numpy sees each type: it has no bfloat16."""
TOKENS, INDEX = "tokens.bin", "index.parquet"
_LINES = "journal.jsonl"


class Journal:
    """A build in progress: rows in `tokens.bin`, one line a finished batch in `journal.jsonl`, both synced.

    A line is written after its rows, so what a kill leaves behind the last whole line is cut off.

    Args:
        out: The folder to make; the build is in `.<name>.building` beside it.
        head: What is built, with `dtype`, the number type of rows; another build does not go on here.
        what: What is built, in words, for errors.
    """

    def __init__(self, out: Path, head: dict[str, Any], what: str = "visual store"):
        self._what = what
        self._folder = out.parent / f".{out.name}.building"
        self._dtype = head["dtype"]
        self._head = head
        self.layout: dict[str, Any] = {}
        self.index: dict[str, list[Any]] = {"key": [], "start": [], "tokens": [], "notes": []}
        self.keys: set[str] = set()

    def __enter__(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lines = (self._folder / _LINES).open("a+b")
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lines.close()
            raise BusyError(f"{self._folder} is in use: another process builds this {self._what}") from None
        _unshare(self._folder / TOKENS)
        self._rows = (self._folder / TOKENS).open("ab")
        try:
            self._resume()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._lines.close()

    def append(self, encoded: dict[str, Any]) -> None:
        """Writes one encoded batch, durably."""
        self.layout = encoded["layout"]
        images = []
        for key, rows, notes in zip(encoded["keys"], encoded["rows"], encoded["notes"], strict=True):
            stored = rows.to(DTYPES[self._dtype]).cpu().contiguous()
            if not torch.isfinite(stored).all():
                raise DataError(
                    f"{self._what}, {key}: a number that {self._dtype} cannot hold; use another dtype"
                )
            self._rows.write(stored.view(torch.uint8).numpy())
            images.append([key, len(rows), json.dumps(notes)])
        _sync(self._rows)
        self._write_line({"layout": self.layout, "images": images})
        self._take(images)

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """Makes the store out of the journal, and removes the journal."""
        with staged_folder(out) as staging:
            try:
                os.link(self._folder / TOKENS, staging / TOKENS)
            except OSError:  # a file system without hard links
                shutil.copyfile(self._folder / TOKENS, staging / TOKENS)
            schema = {"key": pl.String, "start": pl.Int64, "tokens": pl.Int64, "notes": pl.String}
            pl.DataFrame(self.index, schema).write_parquet(staging / INDEX)
            write_json(staging / MANIFEST, manifest)
        shutil.rmtree(self._folder)

    def _resume(self) -> None:
        self._lines.seek(0)
        *whole, _ = self._lines.read().split(b"\n")  # what stands behind the last line end, a kill tore
        kept = [self._parse(number, line) for number, line in enumerate(whole, 1)]
        if kept and kept[0] != self._head:
            if len(kept) > 1:
                raise DataError(
                    f"{self._folder} is an unfinished build with another model, image settings or dtype; "
                    "remove it to begin anew"
                )
            kept, whole = [], []
        for batch in kept[1:]:
            self.layout = batch["layout"]
            self._take(batch["images"])
        self._lines.truncate(sum(len(line) + 1 for line in whole))
        size = sum(self.index["tokens"]) * sum(self.layout.get("columns", ())) * BITS[self._dtype].itemsize
        if self._rows.tell() < size:
            raise DataError(f"{self._folder / TOKENS} is too short; remove {self._folder} to begin anew")
        self._rows.truncate(size)
        if not kept:
            self._write_line(self._head)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError:
            raise DataError(
                f"{self._folder / _LINES}: line {number} is damaged; remove {self._folder} to begin anew"
            ) from None

    def _take(self, images: list[list[Any]]) -> None:
        for key, tokens, notes in images:
            start = self.index["start"][-1] + self.index["tokens"][-1] if self.keys else 0
            for name, value in (("key", key), ("start", start), ("tokens", tokens), ("notes", notes)):
                self.index[name].append(value)
            self.keys.add(key)

    def _write_line(self, content: dict[str, Any]) -> None:
        self._lines.write(json.dumps(content).encode() + b"\n")
        _sync(self._lines)


def _unshare(path: Path) -> None:
    """Makes a file its own again: a build killed in `finish` may have left it linked into the store."""
    if path.exists() and path.stat().st_nlink > 1:
        copy = path.with_suffix(".copy")
        shutil.copyfile(path, copy)
        copy.replace(path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
