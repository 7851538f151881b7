"""Any table by its suffix: CSV, TSV, JSON lines or parquet, compressed or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data.raw.delimited import AUTO, read_delimited
from recllm.data.raw.findings import Findings
from recllm.data.raw.json_lines import objects, parse_object, scan_json_lines
from recllm.data.raw.lines import inner_name, open_bytes, packing, scan_parquet_file, unpack
from recllm.data.raw.tables import LINE, RawTable, existing_file
from recllm.data.raw.values import Record, as_json, as_text, as_texts
from recllm.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
JSON = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
MAX_FIELDS = 1000  # more names than this over a file's objects are data in the place of names


def suffix_of(path: Path) -> str:
    """Returns the suffix that tells a file's format, not its packing: `.csv` for `x.csv.gz`.

    Parquet is known by its first bytes, whatever its name.
    """
    if packing(path) == "":
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                return ".parquet"
    return Path(inner_name(path)).suffix.lower()


def read_table(
    path: Path,
    findings: Findings,
    workspace: Path,
    *,
    separator: str | None = None,
    quote: str | None = AUTO,
    escape: str | None = None,
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
) -> RawTable:
    """Reads a table in the format that its suffix names.

    Args:
        path: A .csv, .tsv, .jsonl (.ndjson, .json: one object a line, or one array of objects) or .parquet
            file, also packed by gzip, bzip2, xz or zip.
        findings: Where malformed lines are counted.
        workspace: A folder for intermediate files.
        separator: What stands between the fields of delimited text, by default by its suffix.
        quote: The quote character of delimited text; None where it has none, "auto" to find out.
        escape: The character that escapes quotes in delimited text; None where they are doubled.
        header: The column names of delimited text without a header line.
        encoding: The encoding of text.

    Raises:
        DataError: The file is missing, damaged, or of no known format.
    """
    existing_file(path, "the file")
    suffix = suffix_of(path)
    if suffix in JSON:
        return RawTable(path, read_json_table(path, findings, workspace, encoding))
    if suffix in PARQUET:
        return RawTable(path, scan_parquet_file(unpack(path, workspace)))
    separator = separator or SEPARATORS.get(suffix)
    if separator is None:
        raise DataError(
            f"{path}: the suffix {suffix!r} tells no format; expected .csv, .tsv, .jsonl or .parquet "
            f"(also .gz, .bz2, .xz, .zip), or say which separator it has"
        )
    return read_delimited(
        path,
        findings,
        workspace,
        separator=separator,
        quote=quote,
        escape=escape,
        header=header,
        encoding=encoding,
    )


def is_delimited(path: Path) -> bool:
    """Tells whether a file is read as delimited text."""
    return suffix_of(path) not in (*JSON, *PARQUET)


def has_separator(path: Path, separator: str | None) -> bool:
    """Tells whether the first line of a delimited file has a separator in it."""
    if separator is None or not path.is_file() or not is_delimited(path):
        return False
    with open_bytes(path) as file:
        return separator.encode() in file.readline(100_000)


def read_json_table(path: Path, findings: Findings, workspace: Path, encoding: str = "utf-8") -> pl.LazyFrame:
    """Reads objects whose fields are not known beforehand: once for the fields and their types, once for the
    values.

    Numbers stay numbers where a field holds nothing else. Lists become lists of text, where some of a field's
    values are single ones or nest deeper as well; objects become JSON text.
    """
    kinds: dict[str, set[str]] = {}
    first = ""
    for _, line in objects(path):
        try:
            content = parse_object(line, encoding)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            content = None  # counted when the values are read
        if not isinstance(content, dict):
            first = first or line[:80].decode("utf-8", errors="replace").strip()
            continue
        for name, value in content.items():
            kinds.setdefault(name, set()).add(_kind(value))
        if len(kinds) > MAX_FIELDS:
            raise DataError(
                f"{path}: more than {MAX_FIELDS:,} different field names, such as {name[:60]!r}; expected "
                "one object a line, all with the same fields"
            )
    if not kinds:
        raise DataError(
            f"{path}: no line of it is a JSON object with fields; it begins with {first!r}; expected one "
            "object a line, or an array of objects"
        )
    kinds.pop(LINE, None)
    chosen = {name: _column(found) for name, found in kinds.items()}
    types = {name: dtype for name, (dtype, _) in chosen.items()}
    converters = {name: convert for name, (_, convert) in chosen.items()}

    def row(content: Record) -> dict[str, Any]:
        return {name: convert(content.get(name)) for name, convert in converters.items()}

    return scan_json_lines(path, row, types, findings, workspace, encoding=encoding)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "huge"
    if isinstance(value, int) and abs(value) > 2**53:
        return "long"  # a float could not hold it
    if isinstance(value, list):
        if _holds_object(value):
            return "objects"
        return "nested" if any(isinstance(entry, list) for entry in value) else "list"
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "objects")


def _holds_object(value: Any) -> bool:
    if isinstance(value, list):
        return any(_holds_object(entry) for entry in value)
    return isinstance(value, dict)


def _column(kinds: set[str]) -> tuple[pl.DataType, Callable[[Any], Any]]:
    found = kinds - {"null"}
    if "objects" in found or found == {"nested"}:
        return pl.String(), as_json_or_text
    if found & {"list", "nested"}:
        return pl.List(pl.String()), lambda value: None if value is None else as_texts(value)
    if found == {"bool"}:
        return pl.Boolean(), lambda value: value
    if found in ({"int"}, {"long"}, {"int", "long"}):
        return pl.Int64(), lambda value: value
    if found and found <= {"int", "float"}:
        return pl.Float64(), lambda value: None if value is None else float(value)
    return pl.String(), as_text


def as_json_or_text(value: Any) -> str | None:
    """Returns a list or an object as JSON text, and anything else as text."""
    return as_json(value) if isinstance(value, (list, dict)) else as_text(value)
