"""A run's folder: found, resumed, refused, locked. Fine-tuning, GRPO and the rankers all use it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from recllm.errors import BusyError, DataError
from recllm.files import MANIFEST, read_json

SFT, GRPO, RANKER = "sft run", "grpo run", "ranker run"
KINDS = (SFT, GRPO, RANKER)
"""The kinds of runs that a manifest names."""
FINISHED, TRAINING = "finished", "training"
_RECIPES = {SFT: "recipes/sft.py", GRPO: "recipes/grpo.py", RANKER: "recipes/train_ranker.py"}


def find_run(path: Path, kind: str) -> dict[str, Any] | None:
    """Returns the manifest of the run in a folder; None where the folder is empty or missing.

    Raises:
        DataError: The folder holds something else.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    manifest = read_json(path / MANIFEST, "a run") if (path / MANIFEST).is_file() else {}
    if manifest.get("kind") != kind:
        found = f"a {manifest['kind']}" if manifest.get("kind") else "other files"
        raise DataError(f"{path} exists and holds {found}, not a run of {_RECIPES[kind]}; give another --out")
    return manifest


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """Returns the manifest of a run, finished or not.

    Raises:
        DataError: The folder is not one of a run of this kind.
    """
    manifest = read_json(path / MANIFEST, f"the folder of a run of {_RECIPES[kind]}")
    if manifest.get("kind") != kind:
        raise DataError(
            f"{path} is not a run of {_RECIPES[kind]}: its manifest says kind {manifest.get('kind')!r}, "
            f"expected {kind!r}"
        )
    return manifest


def check_resumable(path: Path, *, resume: str, differences: Collection[str]) -> None:
    """Refuses to continue a run that was not asked for, or that has other settings.

    Args:
        path: The run's folder.
        resume: The option `--resume`; `none` continues nothing.
        differences: What `setting_differences` returned.

    Raises:
        DataError: `resume` is `none`, or there are differences.
    """
    if resume == "none":
        raise DataError(
            f"{path} exists already; give --resume auto to resume it, --overwrite to replace it, or "
            "another --out"
        )
    if differences:
        raise DataError(
            f"{path} was begun with other settings ({'; '.join(differences)}); resume it with its own, or "
            "give another --out"
        )


def settings_of(options: Any) -> dict[str, Any]:
    """Returns the options of a recipe, a dataclass, as a manifest keeps them: JSON types."""
    return {name: _plain(value) for name, value in asdict(options).items()}


def setting_differences(
    now: Mapping[str, Any], then: Mapping[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Returns the settings that would make a resumed run a different one, as `name: then, now`.

    Args:
        now: Settings of this command.
        then: Settings in the run's manifest.
        free: Names that may change.
    """
    return [
        f"{name}: {then.get(name)} then, {value} now"
        for name, value in now.items()
        if name not in free and then.get(name) != value
    ]


def lock_run(path: Path) -> BinaryIO:
    """Keeps other processes out of a run's folder, which need not exist yet and may be replaced as a whole.

    Returns:
        The lock, a file beside the folder, held until `release_run` or the end of this process.

    Raises:
        BusyError: Another process trains in the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.lock"
    while True:
        lock = beside.open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise BusyError(f"{path}: another process trains in it; wait for it, or end it first") from None
        if beside.exists() and beside.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
        lock.close()  # its last owner removed it between our opening and locking


def release_run(lock: BinaryIO | None) -> None:
    """Lets other processes have the folder."""
    if lock is not None and not lock.closed:
        Path(lock.name).unlink(missing_ok=True)
        lock.close()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
