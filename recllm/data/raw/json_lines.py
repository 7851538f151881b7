"""Objects of JSON lines, of a JSON array, of Python literals or of nested parquet as columns.

Malformed lines are counted and named. Python writes `NaN` for what is missing, and it is null here. Bytes
that are not in the file's encoding, and halves of surrogate pairs, become U+FFFD.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.lines import is_utf8, new_file, open_bytes, scan_parquet_file
from recllm.data.raw.tables import LINE
from recllm.data.raw.values import Record
from recllm.errors import DataError

BATCH = 200_000
LITERAL_LIMIT = 1_000_000
ELEMENT_LIMIT = 1 << 26
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


def parse_object(line: bytes, encoding: str = "utf-8") -> Any:
    """Parses one object: JSON, JSON as Python writes it, or a Python literal (never code).

    Raises:
        ValueError, SyntaxError, MemoryError, RecursionError: It is none of them.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        wrong = error
    text = line.decode(encoding, errors="replace").strip()
    if "[" * 1000 in text or "{" * 1000 in text:
        raise wrong
    try:
        return _mended(json.loads(text, parse_constant=lambda _: None))
    except (ValueError, RecursionError):
        pass
    if not text.startswith(("{", "[", "(")) or "'" not in text:
        raise wrong
    if len(line) > LITERAL_LIMIT:
        raise ValueError(f"longer than {LITERAL_LIMIT:,} bytes")
    with warnings.catch_warnings():
        # An unknown escape such as \\d in a description is no concern of the user's.
        warnings.simplefilter("ignore")
        return _mended(ast.literal_eval(text))


def _mended(value: Any) -> Any:
    """Replaces halves of surrogate pairs by U+FFFD, and numbers that are not finite by None."""
    if isinstance(value, str):
        return (
            value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, (list, tuple, set)):
        return [_mended(entry) for entry in value]
    if isinstance(value, dict):
        return {_mended(str(name)): _mended(entry) for name, entry in value.items()}
    return value


def objects(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number, text) of each object of a file: its lines, or the elements of its one JSON array.

    Raises:
        DataError: The file is UTF-16, or an array that cannot be read to its end.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    with open_bytes(path) as file:
        first = file.readline(_CHUNK)
        if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16 text, not UTF-8; convert it")
        first = first.removeprefix(_BOM)
        number = 1
        while first and not first.strip():
            first, number = file.readline(_CHUNK), number + 1
        if _begins_array(first):
            yield from _elements(path, first, file)
            return
        if not first.endswith(b"\n"):
            first += file.readline()
        if first:
            yield number, first
        for line in file:
            number += 1
            if line.strip():
                yield number, line


def _begins_array(line: bytes) -> bool:
    """Tells whether a line begins an array of objects."""
    text = line.strip()
    return text == b"[" or (text.startswith(b"[") and text[1:].lstrip().startswith(b"{"))


def _elements(path: Path, start: bytes, file: Any) -> Iterator[tuple[int, bytes]]:
    """Yields the elements of a JSON array, of which only one is in memory."""
    decoder = json.JSONDecoder()
    buffer = start.decode("utf-8", errors="surrogateescape").lstrip()[1:]
    pending, number, tried = b"", 0, 0
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("]"):
            return
        try:
            if len(buffer) < tried:
                raise ValueError
            _, end = decoder.raw_decode(buffer)
            if end == len(buffer):
                raise ValueError  # a number may go on
        except (ValueError, RecursionError):
            more = file.read(_CHUNK)
            if not more or len(buffer) > ELEMENT_LIMIT:
                raise DataError(
                    f"{path} is a JSON array that cannot be read from element {number + 1} on: "
                    f"{buffer[:80]!r}; expected objects and a closing bracket"
                ) from None
            more = pending + more
            cut = len(more)
            while cut and cut > len(more) - 4 and more[cut - 1] & 0xC0 == 0x80:
                cut -= 1
            cut -= bool(cut and more[cut - 1] >= 0xC0)
            pending, more = more[cut:], more[:cut]
            buffer += more.decode("utf-8", errors="surrogateescape")
            tried = min(2 * tried, len(buffer)) if tried else 1
            continue
        number, tried = number + 1, 0
        yield number, buffer[:end].encode("utf-8", errors="surrogateescape")
        buffer = buffer[end:]


def scan_json_lines(
    path: Path,
    row: Callable[[Record], dict[str, Any] | None],
    types: dict[str, pl.DataType],
    findings: Findings,
    workspace: Path,
    *,
    encoding: str = "utf-8",
) -> pl.LazyFrame:
    """Reads a file with one object a line, or one array of objects, into columns, in bounded memory.

    Args:
        path: The file, compressed or not.
        row: Turns an object into the values of `types`, or None to skip it. It raises `KeyError`,
            `ValueError` or `TypeError` for an object without what is needed.
        types: The columns.
        findings: Where malformed lines are counted: no JSON, no object, a field missing.
        workspace: A folder for what was read so far.
        encoding: The encoding of lines that are not UTF-8.

    Returns:
        A lazy frame of `types` and `LINE` (from 1), in input order.
    """
    writer = _PartWriter(path, row, types, findings, workspace)
    replaced = 0
    for number, line in objects(path):
        writer.add(number, lambda line=line: parse_object(line, encoding), line)
        replaced += not line.isascii() and not _is_utf8(line)
    if replaced and is_utf8(encoding):
        findings.note(
            f"{path.name}: {replaced:,} lines have bytes that are not utf-8; each such byte became U+FFFD "
            "(--encoding names another encoding)"
        )
    frame = writer.scan()
    if writer.added == 0 and writer.refused:
        raise DataError(f"{path}: no line of it is an object with the fields expected; {writer.refused}")
    return frame


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def scan_parquet_objects(
    path: Path,
    row: Callable[[Record], dict[str, Any] | None],
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


class _PartWriter:
    """Collects rows, and writes them to parquet files part by part."""

    def __init__(
        self,
        path: Path,
        row: Callable[[Record], dict[str, Any] | None],
        types: dict[str, pl.DataType],
        findings: Findings,
        workspace: Path,
    ) -> None:
        self.path, self.row, self.findings, self.workspace = path, row, findings, workspace
        self.types = {**types, LINE: pl.Int64()}
        self.parts: list[Path] = []
        self.rows: list[dict[str, Any]] = []
        self.added, self.refused = 0, ""

    def add(self, number: int, parse: Callable[[], Any], line: bytes = b"") -> None:
        """Adds one object, or counts its line as malformed."""
        try:
            content = parse()
            if not isinstance(content, dict):
                raise TypeError(f"expected an object, found {type(content).__name__}")
            record = Record(content)
            values = self.row(record)
        except KeyError as error:
            self._refuse(number, f"no field {error}", line)
            return
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            problem = f"{type(error).__name__}: {str(error)[:120]}"
            self._refuse(number, problem, line)
            return
        if record.unread:
            examples = (f"{self.path.name}, line {number}: {field}" for field in record.unread)
            self.findings.spoil(
                f"fields of {self.path.name} that cannot be read", len(record.unread), examples
            )
        self.added += 1
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

    def _refuse(self, number: int, problem: str, line: bytes) -> None:
        shown = _shown(line)
        self.refused = self.refused or f"line {number}: {problem}: {shown[:80]!r}"
        self.findings.malformed(self.path, number, problem, shown)

    def _flush(self) -> None:
        self.parts.append(new_file(self.workspace, f"{self.path.name}.parquet"))
        frame = pl.DataFrame(self.rows, schema=self.types, orient="row", strict=False)
        frame.write_parquet(self.parts[-1], compression="lz4")
        self.rows.clear()


def _shown(line: bytes) -> str:
    return line[:200].decode("utf-8", errors="replace").strip()
