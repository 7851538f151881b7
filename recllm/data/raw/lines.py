"""Files as bytes, compressed or not: what a file is says its content, and a cut archive is an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import polars as pl

from recllm.errors import DataError
from recllm.progress import Progress

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_STARTS = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zip": b"PK\x03\x04"}
_STRANGERS = {
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself: fetch it with `git lfs pull`",
    b"<!doctype html": "a web page, perhaps of a failed download: fetch the file again",
    b"<html": "a web page, perhaps of a failed download: fetch the file again",
    b"\x28\xb5\x2f\xfd": "packed with zstandard: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"rar!": "a rar archive: unpack it first",
    b"sqlite format 3": "a SQLite database: export its tables as CSV",
    b"\x93numpy": "a NumPy array: write it as a table",
    b"\x89hdf": "an HDF5 file: write its tables as parquet",
    b"%pdf": "a PDF document",
}
_CUT = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile)


class _Metered(io.FileIO):
    """A file that moves a progress bar as it is read."""

    def __init__(self, path: Path, bar: Progress) -> None:
        super().__init__(path, "rb")
        self._bar = bar

    def readinto(self, buffer: bytearray) -> int | None:
        count = super().readinto(buffer)
        self._bar.update(count or 0)
        return count


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Opens a plain, .gz, .bz2, .xz or .zip file (with one data file in it) for reading bytes.

    Its first bytes say how it is packed, whatever its name. On a terminal, a progress bar tells how much of
    the file has been read.

    Raises:
        DataError: The file is missing, is cut short or damaged, is of a kind that holds no table, or a zip
            holds more than one data file.
    """
    try:
        suffix = packing(path)
        with (
            Progress(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar,
            io.BufferedReader(_Metered(path, bar), 1 << 18) as packed,
        ):
            if suffix == ".zip":
                with zipfile.ZipFile(packed) as archive, archive.open(_only_member(path, archive)) as file:
                    yield file
            elif suffix in _OPENERS:
                with _OPENERS[suffix](packed, "rb") as file:
                    yield file
            else:
                yield packed
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except _CUT as error:
        raise DataError(
            f"{path} is cut short or damaged ({error}); nothing was imported: fetch the file again"
        ) from None
    except (NotImplementedError, RuntimeError) as error:  # a zip that is encrypted, or packed in another way
        raise DataError(f"{path} cannot be unpacked ({error}); unpack it and give the file in it") from None
    except OSError as error:
        if suffix == ".bz2" and error.errno is None:
            raise DataError(
                f"{path} is damaged ({error}); nothing was imported: fetch the file again"
            ) from None
        raise


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    members = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    members = [name for name in members if not name.rpartition("/")[2].startswith(".")]
    if "xl/workbook.xml" in members:
        raise DataError(f"{path} is an Excel workbook; save the sheet as CSV")
    if len(members) != 1:
        raise DataError(f"{path} holds {len(members)} files; unpack it and give the one to read")
    return members[0]


def packing(path: Path) -> str:
    """Returns how a file is packed (`.gz`, `.bz2`, `.xz`, `.zip`) by its first bytes; "" for a plain one.

    Raises:
        DataError: The file is named as packed and is not (damaged), or is of a kind that holds no table.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    for suffix, mark in _STARTS.items():
        if start.startswith(mark):
            return suffix
    lowered = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, what in _STRANGERS.items():
        if lowered.startswith(mark.lower()):
            raise DataError(f"{path} is {what}")
    named = path.suffix.lower()
    if named not in _STARTS:
        return ""
    if start and all(byte >= 0x20 or byte in b"\t\r\n" for byte in start):
        return ""  # unpacked by a download tool that kept the name
    raise DataError(f"{path} is damaged (no {named} file by its first bytes): fetch the file again")


def inner_name(path: Path) -> str:
    """Returns a file's name without the suffix of its packing; for a zip, that of the file in it."""
    packed = packing(path)
    if packed == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                held = Path(_only_member(path, archive)).name
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is cut short or damaged ({error}); fetch the file again") from None
        return held if Path(held).suffix else Path(path.name).stem
    return path.stem if path.suffix.lower() in _STARTS else path.name


def is_compressed(path: Path) -> bool:
    """Tells whether `open_bytes` would unpack this file."""
    return packing(path) != ""


def unpack(path: Path, workspace: Path) -> Path:
    """Returns a plain file with the bytes of `path`: itself, or an unpacked copy in `workspace`."""
    if not is_compressed(path):
        return path
    target = new_file(workspace, path.name + ".unpacked")
    with open_bytes(path) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return target


def is_utf8(encoding: str) -> bool:
    """Tells whether an encoding's name means UTF-8."""
    return encoding.lower().replace("-", "").replace("_", "") in ("utf8", "utf8sig")


def new_file(workspace: Path, name: str) -> Path:
    """Returns a path in `workspace` that does not exist yet."""
    workspace.mkdir(parents=True, exist_ok=True)
    return workspace / f"{sum(1 for _ in workspace.iterdir())}-{name[-80:]}"


def scan_parquet_file(path: Path) -> pl.LazyFrame:
    """Scans a parquet file.

    Raises:
        DataError: It is missing, cut short or no parquet file.
    """
    try:
        frame = pl.scan_parquet(path, glob=False)
        frame.collect_schema()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            f"{path} is no parquet file, or cut short ({str(error)[:120]}); nothing was imported: "
            "fetch it again"
        ) from None
    return frame
