"""Files that are whole or absent: folders and files are written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recllm.errors import BusyError, DataError

MANIFEST = "manifest.json"
"""The name of the file that says what a folder holds."""
DATASET = "dataset"
"""The kind of a dataset's folder, whose manifest has a `format` instead."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def refuse_nested(folder: Path, own: Collection[str] = ()) -> None:
    """Raises a `DataError` if a folder holds further folders that recllm made, such as a run with an export.

    Args:
        folder: The folder that would be deleted.
        own: Names of folders in it that belong to it.
    """
    inner = (path.parent.relative_to(folder) for path in sorted(folder.glob("*/**/manifest.json")))
    theirs = (name for name in inner if name.parts[0] not in own and not name.parts[0].startswith("."))
    if names := ", ".join(map(str, theirs)):
        raise DataError(
            f"{folder} holds {names}, made by other commands, which would be deleted with it; "
            "move that away first, or give another folder."
        )


@contextmanager
def staged_folder(
    out: Path,
    *,
    kind: str | None = None,
    overwrite: bool = False,
    refuse: Callable[[Path], None] | None = refuse_nested,
    keep: Sequence[str] = (),
) -> Iterator[Path]:
    """Yields an empty folder beside `out` that becomes `out` when the block ends without an exception.

    The staging folder is `.<name>.partial`. It is locked while in use, so a second writer of the same `out`
    fails at once; what a killed run left there is removed by the next one. `out` itself is only ever touched
    by a rename.

    Args:
        out: The folder to make.
        kind: What is made, as its `manifest.json` says; a folder of another kind is not replaced. None where
            `out` cannot be anything else.
        overwrite: Replace `out` where it exists: an empty folder, or one with a `manifest.json`, which recllm
            made; nothing else is ever replaced. Its old content stays in place until the new one is complete.
        refuse: Called with the folder that would be replaced; raises a `DataError` if that would delete what
            other commands made. None deletes it.
        keep: Entries of the replaced folder that move into the new one, if they exist.

    Raises:
        DataError: `out` exists and may not be replaced, another process is writing it, or it cannot be
        written.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a symbolic link at `out`
    _check_free(out, kind, overwrite, refuse)
    made_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = out.parent / f".{out.name}.partial"
        lock = _lock_folder(staging, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror} ({error.filename})") from None
    try:
        if _restore(out):
            _check_free(out, kind, overwrite, refuse)
        _empty(staging)
        yield staging
        _link_entries(out, staging, keep)
        _sync_tree(staging)
        _check_free(out, kind, overwrite, refuse)
        if out.exists():
            old = _exchange(staging, out)
            with contextlib.suppress(OSError):
                _link_entries(old, out, keep)  # what another process has added in between
            shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(out)
        _sync(out.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise DataError(
                f"{out}: the disk is full; nothing was written. Free some and run it again."
            ) from error
        raise
    finally:
        os.close(lock)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file through `write(temporary_path)` and renames it; a failure leaves `path` as it was."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise DataError(f"{path}: the disk is full; nothing was written.") from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object; `what` says in an error what the file should have been.

    Raises:
        DataError: The file is missing, is not JSON, or is not an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} is missing: {Path(path).parent} is not {what}, or it was not written to its end."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not readable as JSON ({error}); make {what} again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold one JSON object; make {what} again.")
    return content


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link_entries(old: Path, new: Path, names: Sequence[str]) -> None:
    """Adds entries of `old` to `new` as hard links: a kill at any moment leaves them in one of the two."""
    for name in names:
        entry = old / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / name, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        elif entry.is_symlink() and not (new / name).is_symlink():
            (new / name).symlink_to(entry.readlink())


def _link(source: str, target: str) -> None:
    if Path(target).exists():
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _exchange(new: Path, old: Path) -> Path:
    """Swaps two folders in one step, so that a kill leaves either the old or the new one at `old`.

    Returns:
        Where the old one is now.
    """
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return new
    # File systems that cannot swap: two renames, with the old folder beside its place for a moment.
    retired = _retired(old)
    shutil.rmtree(retired, ignore_errors=True)
    old.rename(retired)
    new.rename(old)
    return retired


def _retired(out: Path) -> Path:
    return out.parent / f".{out.name}.retired"


def _restore(out: Path) -> bool:
    """Puts back the old folder if a kill came between the two renames of `_exchange`."""
    if out.exists() or not _retired(out).is_dir():
        return False
    _retired(out).rename(out)
    return True


def _check_free(
    out: Path, kind: str | None, overwrite: bool, refuse: Callable[[Path], None] | None = None
) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise DataError(f"{out} exists already; give another folder, or --overwrite to replace it.")
    ours = (
        out.is_dir()
        and not out.is_symlink()
        and ((out / "manifest.json").is_file() or not any(out.iterdir()))
    )
    if not ours:
        raise DataError(
            f"{out} was not made by recllm (no manifest.json in it, or it is a link), so --overwrite does "
            "not replace it; remove it yourself, or give another folder."
        )
    if kind is not None and any(out.iterdir()):
        manifest = read_json(out / "manifest.json", "a folder that recllm made")
        found = manifest.get("kind", DATASET if "format" in manifest else "folder of another kind")
        if found != kind:
            raise DataError(
                f"{out} is a {found}, which --overwrite does not replace by a {kind}; give another folder."
            )
    if refuse is not None:
        refuse(out)


def _lock_folder(staging: Path, out: Path) -> int:
    """Makes and locks the staging folder; the kernel drops the lock however the process ends."""
    while True:
        staging.mkdir(exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BusyError(
                f"{out} is being written by another process; wait for it, or end it first."
            ) from None
        try:
            same = os.stat(staging).st_ino == os.fstat(descriptor).st_ino  # noqa: PTH116
        except FileNotFoundError:
            same = False
        if same:
            return descriptor
        os.close(descriptor)  # the folder was renamed to its place between our open and our lock


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_tree(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) > 100:  # an image folder: one pass over the disk's cache instead of a wait for each file
        os.sync()
        return
    for path in (*files, folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
