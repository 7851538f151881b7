"""Files line by line, compressed or not: malformed lines are counted and named, a cut archive is an error."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import lzma
import math
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson
import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.tables import LINE
from recllm.errors import DataError
from recllm.progress import Progress

BATCH = 200_000
LITERAL_LIMIT = 1_000_000
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
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

    On a terminal, a progress bar tells how much of the file has been read.

    Raises:
        DataError: The file is missing, is cut short or damaged, or a zip holds more than one data file.
    """
    suffix = path.suffix.lower()
    try:
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
    except OSError as error:
        if suffix == ".bz2" and error.errno is None:
            raise DataError(
                f"{path} is damaged ({error}); nothing was imported: fetch the file again"
            ) from None
        raise


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    members = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    if len(members) != 1:
        raise DataError(f"{path} holds {len(members)} files; unpack it and give the one to read")
    return members[0]


def is_compressed(path: Path) -> bool:
    """Tells whether `open_bytes` would unpack this file."""
    return path.suffix.lower() in (*_OPENERS, ".zip")


def unpack(path: Path, workspace: Path) -> Path:
    """Returns a plain file with the bytes of `path`: itself, or an unpacked copy in `workspace`."""
    if not is_compressed(path):
        return path
    target = new_file(workspace, path.name + ".unpacked")
    with open_bytes(path) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return target


def new_file(workspace: Path, name: str) -> Path:
    """Returns a path in `workspace` that does not exist yet."""
    workspace.mkdir(parents=True, exist_ok=True)
    return workspace / f"{sum(1 for _ in workspace.iterdir())}-{name[-80:]}"


def parse_json(line: bytes) -> Any:
    """Parses one line of JSON."""
    return orjson.loads(line)


def parse_json_or_literal(line: bytes) -> Any:
    """Parses one line of JSON, or of a Python literal as the Amazon 2014 metadata has it (never code)."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if len(line) > LITERAL_LIMIT:
            raise ValueError(f"longer than {LITERAL_LIMIT:,} bytes") from None
    with warnings.catch_warnings():
        # An unknown escape such as \\d in a description is no concern of the user's.
        warnings.simplefilter("ignore")
        value = ast.literal_eval(line.decode("utf-8").strip())
    if b"\\u" in line or b"\\U" in line:
        orjson.dumps(value)  # half a surrogate pair is no text: TypeError
    return value


def scan_json_lines(
    path: Path,
    row: Callable[[dict[str, Any]], dict[str, Any] | None],
    types: dict[str, pl.DataType],
    findings: Findings,
    workspace: Path,
    *,
    parse: Callable[[bytes], Any] = parse_json,
) -> pl.LazyFrame:
    """Reads a file with one object a line into columns, in bounded memory.

    Args:
        path: The file, compressed or not.
        row: Turns an object into the values of `types`, or None to skip it. It raises `KeyError`,
            `ValueError` or `TypeError` for an object without what is needed.
        types: The columns.
        findings: Where malformed lines are counted: no JSON, no object, a field missing.
        workspace: A folder for what was read so far.
        parse: How a line is parsed.

    Returns:
        A lazy frame of `types` and `LINE` (from 1), in input order.
    """
    writer = _PartWriter(path, row, types, findings, workspace)
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                writer.add(number, lambda line=line: parse(line), line)
    return writer.scan()


def scan_parquet_objects(
    path: Path,
    row: Callable[[dict[str, Any]], dict[str, Any] | None],
    types: dict[str, pl.DataType],
    findings: Findings,
    workspace: Path,
) -> pl.LazyFrame:
    """Reads a parquet file whose rows nest as `scan_json_lines` reads objects, in bounded memory.

    `LINE` is the row's number, from 1. Arguments and result are those of `scan_json_lines`.
    """
    writer = _PartWriter(path, row, types, findings, workspace)
    frame = scan_parquet_file(path)
    for start in range(0, frame.select(pl.len()).collect().item(), BATCH):
        batch = frame.slice(start, BATCH).collect()
        for number, values in enumerate(batch.iter_rows(named=True), start=start + 1):
            writer.add(number, lambda values=values: values)
    return writer.scan()


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


class _PartWriter:
    """Collects rows, and writes them to parquet files part by part."""

    def __init__(
        self,
        path: Path,
        row: Callable[[dict[str, Any]], dict[str, Any] | None],
        types: dict[str, pl.DataType],
        findings: Findings,
        workspace: Path,
    ) -> None:
        self.path, self.row, self.findings, self.workspace = path, row, findings, workspace
        self.types = {**types, LINE: pl.Int64()}
        self.parts: list[Path] = []
        self.rows: list[dict[str, Any]] = []

    def add(self, number: int, parse: Callable[[], Any], line: bytes = b"") -> None:
        """Adds one object, or counts its line as malformed."""
        try:
            content = parse()
            if not isinstance(content, dict):
                raise TypeError(f"expected an object, found {type(content).__name__}")
            values = self.row(content)
        except KeyError as error:
            self.findings.malformed(self.path, number, f"no field {error}", _shown(line))
            return
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            problem = f"{type(error).__name__}: {str(error)[:120]}"
            self.findings.malformed(self.path, number, problem, _shown(line))
            return
        if values is not None:
            values[LINE] = number
            self.rows.append(values)
        if len(self.rows) == BATCH:
            self._flush()

    def scan(self) -> pl.LazyFrame:
        """Returns all that was added."""
        if self.rows or not self.parts:
            self._flush()
        return pl.scan_parquet(self.parts, glob=False)

    def _flush(self) -> None:
        self.parts.append(new_file(self.workspace, f"{self.path.name}.parquet"))
        frame = pl.DataFrame(self.rows, schema=self.types, orient="row", strict=False)
        frame.write_parquet(self.parts[-1], compression="lz4")
        self.rows.clear()


def as_text(value: Any) -> str | None:
    """Returns a scalar as text: whole floats without their `.0`; None and "" as None."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected text or a number, found {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def as_number(value: Any) -> float | None:
    """Returns a number, also one written as text (`"1,234"`); None and "" as None."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"expected a number, found {type(value).__name__}")
    return float(value.replace(",", "")) if isinstance(value, str) else float(value)


def as_whole(value: Any) -> int | None:
    """Returns a whole number, rounded down; None, "" and what does not fit into 64 bits as None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -(2**63) <= value < 2**63 else None
    number = as_number(value)
    if number is None or not -(2.0**63) <= number < 2.0**63:
        return None
    return math.floor(number)


def as_texts(value: Any) -> list[str]:
    """Returns a list of scalars, nested lists included, as a flat list of non-empty texts."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [text for entry in value for text in as_texts(entry)]
    text = as_text(value)
    return [text] if text is not None else []


def _shown(line: bytes) -> str:
    return line[:200].decode("utf-8", errors="replace").strip()
