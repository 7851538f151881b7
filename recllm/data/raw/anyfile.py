"""Any table by its suffix: CSV, TSV, JSON lines or parquet, compressed or not."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from recllm.data.raw.delimited import AUTO, read_delimited
from recllm.data.raw.findings import Findings
from recllm.data.raw.lines import (
    as_text,
    as_texts,
    is_compressed,
    open_bytes,
    scan_json_lines,
    scan_parquet_file,
    unpack,
)
from recllm.data.raw.tables import LINE, RawTable, existing_file
from recllm.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
JSON = (".jsonl", ".ndjson", ".json")
MAX_FIELDS = 1000  # more names than this over a file's objects are data in the place of names


def suffix_of(path: Path) -> str:
    """Returns the suffix that tells a file's format, not its compression: `.csv` for `x.csv.gz`."""
    inner = path.with_suffix("") if is_compressed(path) else path
    if path.suffix.lower() == ".zip" and not inner.suffix and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.startswith("__MACOSX")]
        inner = Path(members[0]) if members else inner
    return inner.suffix.lower()


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
        path: A .csv, .tsv, .jsonl (.ndjson, .json with one object a line) or .parquet file, also .gz, .bz2,
            .xz or .zip.
        findings: Where malformed lines are counted.
        workspace: A folder for intermediate files.
        separator: Reads the file as delimited text with this separator, whatever its suffix.
        quote: The quote character of delimited text; None where it has none, "auto" to find out.
        escape: The character that escapes quotes in delimited text; None where they are doubled.
        header: The column names of delimited text without a header line.
        encoding: The encoding of delimited text.

    Raises:
        DataError: The file is missing, damaged, or of no known format.
    """
    existing_file(path, "the file")
    suffix = suffix_of(path)
    if separator is None and suffix in JSON:
        return RawTable(path, read_json_table(path, findings, workspace))
    if separator is None and suffix in (".parquet", ".pq"):
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


def read_json_table(path: Path, findings: Findings, workspace: Path) -> pl.LazyFrame:
    """Reads JSON lines whose fields are not known beforehand: once for the fields and their types, once for
    the values.

    Numbers stay numbers where a field holds nothing else; lists of scalars become lists of text; objects
    become JSON text.
    """
    kinds: dict[str, set[str]] = {}
    with open_bytes(path) as file:
        for line in file:
            try:
                content = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue  # counted when the values are read
            if not isinstance(content, dict):
                continue
            for name, value in content.items():
                kinds.setdefault(name, set()).add(_kind(value))
            if len(kinds) > MAX_FIELDS:
                raise DataError(
                    f"{path}: more than {MAX_FIELDS:,} different field names, such as {name!r}; expected one "
                    "object a line, all with the same fields"
                )
    kinds.pop(LINE, None)
    chosen = {name: _column(found) for name, found in kinds.items()}
    types = {name: dtype for name, (dtype, _) in chosen.items()}
    converters = {name: convert for name, (_, convert) in chosen.items()}

    def row(content: dict[str, Any]) -> dict[str, Any]:
        return {name: convert(content.get(name)) for name, convert in converters.items()}

    return scan_json_lines(path, row, types, findings, workspace)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "huge"
    if isinstance(value, int) and abs(value) > 2**53:
        return "long"  # a float could not hold it
    if isinstance(value, list):
        return (
            "list"
            if all(entry is None or isinstance(entry, (str, int, float)) for entry in value)
            else "deep"
        )
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "deep")


def _column(kinds: set[str]) -> tuple[pl.DataType, Callable[[Any], Any]]:
    found = kinds - {"null"}
    if "deep" in found or ("list" in found and found != {"list"}):
        return pl.String(), _as_json
    if found == {"list"}:
        return pl.List(pl.String()), lambda value: None if value is None else as_texts(_lowered(value))
    if found == {"bool"}:
        return pl.Boolean(), lambda value: value
    if found in ({"int"}, {"long"}, {"int", "long"}):
        return pl.Int64(), lambda value: value
    if found and found <= {"int", "float"}:
        return pl.Float64(), lambda value: value
    return pl.String(), lambda value: as_text(_lowered(value))


def _lowered(value: Any) -> Any:
    """Turns true and false, which stand among texts here, into their JSON names."""
    if isinstance(value, list):
        return [_lowered(entry) for entry in value]
    return str(value).lower() if isinstance(value, bool) else value


def _as_json(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()
