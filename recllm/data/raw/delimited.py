"""CSV, TSV and their kin as columns of text: Polars where the file is clean, line by line where it is not.

Nothing is inferred: an id that looks like a number stays the text that it is. A file that Polars cannot read,
or in which a row may be short, is read again by a line reader that counts every malformed line with its
number.
"""

from __future__ import annotations

import codecs
import csv
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.lines import new_file, unpack
from recllm.data.raw.tables import LINE, RawTable, check_names, existing_file
from recllm.errors import DataError

RECORD_LINES = 500  # a quoted field that runs on for more lines than this is a stray quote, not a text
_OPEN = "a quote that is never closed"


def read_delimited(
    path: Path,
    findings: Findings,
    workspace: Path,
    *,
    separator: str = ",",
    quote: str | None = '"',
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    join_last: bool = False,
) -> RawTable:
    """Reads a delimited file, compressed or not, as text columns.

    Args:
        path: The file.
        findings: Where malformed lines are counted.
        workspace: A folder for unpacked and cleaned copies.
        separator: What stands between fields; may be longer than one character (`::`).
        quote: The quote character; None where the format has none.
        header: The column names of a file without a header line; None to read them from the first line.
        encoding: The file's encoding. Bytes that are not valid in it become U+FFFD and are counted.
        join_last: The last column is text that may hold separators although it is not quoted.

    Raises:
        DataError: The file is missing, empty, or a compressed file is cut short.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise DataError(
            f"{encoding!r} is no encoding that Python knows; try utf-8, latin-1 or cp1252"
        ) from None
    if quote is not None and len(quote) != 1:
        raise DataError(f"the quote character {quote!r} is not one character")
    plain = unpack(existing_file(path, "the file"), workspace)
    if plain.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    reader = _LineReader(path, plain, separator, quote, header, encoding, join_last)

    def exactly() -> pl.LazyFrame:
        return reader.scan(findings, workspace)

    if len(separator) > 1 or encoding.lower().replace("-", "") != "utf8":
        return RawTable(path, exactly())
    names = reader.names
    try:
        frame = pl.scan_csv(
            plain,
            separator=separator,
            quote_char=quote,
            has_header=header is None,
            new_columns=names,
            infer_schema=False,
            glob=False,
        )
        # A short row ends in a null, as an empty last field does: only the line reader can tell the two
        # apart.
        facts = frame.select(pl.col(names[-1]).null_count()).collect(engine="streaming")
    except pl.exceptions.PolarsError:
        return RawTable(path, exactly())
    if facts.item():
        return RawTable(path, exactly())
    return RawTable(path, frame, exactly)


class _LineReader:
    """Reads records one by one, and keeps the number of the line that each begins on."""

    def __init__(
        self,
        path: Path,
        plain: Path,
        separator: str,
        quote: str | None,
        header: Sequence[str] | None,
        encoding: str,
        join_last: bool = False,
    ) -> None:
        self.path, self.plain, self.separator, self.quote = path, plain, separator, quote
        self.encoding, self.has_header, self.join_last = encoding, header is None, join_last
        self.names = list(header) if header is not None else self._read_names()

    def scan(self, findings: Findings, workspace: Path) -> pl.LazyFrame:
        """Writes the well-formed records to a clean file, counts the others, and scans the clean one."""
        clean = new_file(workspace, self.path.name + ".clean.csv")
        replaced = 0
        with clean.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writerow(
                range(len(self.names) + 1)
            )  # Polars would keep the quotes of a name that needs some
            records = self._records()
            if self.has_header:
                next(records)
            for number, text, fields, problem in records:
                replaced += "\ufffd" in text
                if problem:
                    findings.malformed(self.path, number, problem, text)
                else:
                    writer.writerow([number, *fields])
        if replaced:
            findings.note(
                f"{self.path.name}: {replaced:,} lines have bytes that are not {self.encoding}; "
                "each such byte became U+FFFD"
            )
        frame = pl.scan_csv(clean, infer_schema=False, glob=False, new_columns=[LINE, *self.names])
        filled = pl.when(pl.col(self.names) != "").then(pl.col(self.names))  # as Polars reads an empty field
        return frame.with_columns(pl.col(LINE).cast(pl.Int64), filled.name.keep())

    def _read_names(self) -> list[str]:
        with self.plain.open("rb") as file:
            start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff") and self.encoding.lower().replace("-", "") == "utf8":
            raise DataError(
                f"{self.path} is UTF-16 text, not UTF-8; convert it, or name its encoding (utf-16)"
            )
        self.names = []
        _, _, fields, problem = next(self._records(), (0, "", [], "no line"))
        names = [name.strip() for name in fields]
        if any("\r" in name for name in names):
            raise DataError(
                f"{self.path}: lines end in carriage returns alone; expected line feeds: convert the file"
            )
        if problem or not names or "" in names or len(set(names)) != len(names):
            raise DataError(
                f"{self.path}: the first line must name each column once; "
                f"found: {', '.join(names) or problem}"
            )
        check_names(self.path, names)
        return names

    def _records(self) -> Iterator[tuple[int, str, list[str], str]]:
        """Yields (line number, text, fields, problem) for each record but blank ones; no problem is ""."""
        with self.plain.open(encoding=self.encoding, errors="replace", newline="\n") as file:
            lines = _Lines(file)
            for number, line in lines:
                text = line.rstrip("\r\n")
                if not text.strip():
                    continue
                fields, problem = self._split(line, lines)
                if self.join_last and self.names and len(fields) > len(self.names):
                    kept = len(self.names) - 1
                    fields = [*fields[:kept], self.separator.join(fields[kept:])]
                if not problem and self.names and len(fields) != len(self.names):
                    problem = f"expected {len(self.names)} fields, found {len(fields)}"
                yield number, text, fields, problem

    def _split(self, line: str, lines: _Lines) -> tuple[list[str], str]:
        """Splits a record into fields; a quoted field may run on into the next lines."""
        text = line.rstrip("\r\n")
        if self.quote is None or len(self.separator) > 1:
            return text.split(self.separator), ""
        fields, problem = self._parse(text)
        if problem != _OPEN:
            return fields, problem
        following: list[tuple[int, str]] = []
        for number, more in lines:
            following.append((number, more))
            if self.quote in more:
                fields, problem = self._parse((line + "".join(text for _, text in following)).rstrip("\r\n"))
                if not problem and (not self.names or len(fields) == len(self.names)):
                    return fields, ""
            if len(following) == RECORD_LINES:
                break
        # The quote was a stray one: this line is bad, those behind it may be good.
        lines.push_back(following)
        return [], _OPEN

    def _parse(self, text: str) -> tuple[list[str], str]:
        if "\r" in text:
            # A carriage return inside a record is part of a field, as Polars has it; csv would refuse it.
            stand_in = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
            fields, problem = self._parse(text.replace("\r", stand_in))
            return [field.replace(stand_in, "\r") for field in fields], problem
        try:
            fields = next(csv.reader([text], delimiter=self.separator, quotechar=self.quote, strict=True))
        except csv.Error as error:
            return [], _OPEN if "unexpected end of data" in str(error) else str(error)
        return fields, ""


class _Lines:
    """Numbered lines of a text file that can be pushed back."""

    def __init__(self, file: Iterable[str]) -> None:
        self._lines = enumerate(file, start=1)
        self._pushed: deque[tuple[int, str]] = deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> tuple[int, str]:
        number, line = self._pushed.popleft() if self._pushed else next(self._lines)
        return number, line.removeprefix("\ufeff") if number == 1 else line

    def push_back(self, lines: list[tuple[int, str]]) -> None:
        """Puts lines back, to be read again in the same order."""
        self._pushed.extendleft(reversed(lines))
