"""Checkpoints that are whole or do not count: a mark is written last, and taken away first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from recllm.errors import DataError
from recllm.files import read_json, write_json

MARK = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Marks a checkpoint whose files are all written: their sizes, after they are on the disk."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files if path.name != MARK}
    write_json(checkpoint / MARK, {"files": sizes})


def step_of(checkpoint: Path) -> int:
    """Returns the step of `checkpoint-N`.

    Raises:
        DataError: The folder has another name.
    """
    number = checkpoint.name.removeprefix("checkpoint-")
    if not checkpoint.name.startswith("checkpoint-") or not number.isdecimal():
        raise DataError(f"{checkpoint}: not a checkpoint's folder, which is named checkpoint-N")
    return int(number)


def is_complete(checkpoint: Path) -> bool:
    """Returns whether a checkpoint has its mark and every file that the mark names, in its size."""
    if not (checkpoint / MARK).is_file():
        return False
    sizes = read_json(checkpoint / MARK, "a checkpoint")["files"]
    paths = [(checkpoint / name, size) for name, size in sizes.items()]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, the latest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and is_complete(path)]
    return sorted(found, key=step_of)


def drop_old(folder: Path, keep: int, best: Path | None) -> None:
    """Removes all checkpoints but the latest `keep` and the best, and what a killed save left."""
    stay = {*complete_checkpoints(folder)[-keep:], best}
    for path in folder.glob("checkpoint-*"):
        if path not in stay:
            (path / MARK).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
