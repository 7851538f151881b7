"""CSV, TSV and their kin as columns of text: Polars where the file is clean, line by line where it is not.

Nothing is inferred: an id that looks like a number stays the text that it is. A file that Polars cannot read,
in which a row may be short, or whose quotes are not well-formed on each line is read by a line reader that
counts every malformed line with its number.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.lines import is_utf8, new_file, unpack
from recllm.data.raw.quotes import look_at_quotes
from recllm.data.raw.tables import LINE, RawTable, check_names, existing_file, shown_names
from recllm.errors import DataError

RECORD_LINES = 500  # a quoted field that runs on for more lines than this is a stray quote, not a text
AUTO = "auto"  # double quotes, unless the lines of a tab-separated file say that they mean nothing
_OPEN = "a quote that is never closed"
_NAME = re.compile(r"[^\W\d][^\W\d]*(?:[ .:-][^\W\d]+)*")
_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?", re.IGNORECASE)


def read_delimited(
    path: Path,
    findings: Findings,
    workspace: Path,
    *,
    separator: str = ",",
    quote: str | None = AUTO,
    escape: str | None = None,
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
        quote: The quote character; None where the format has none; "auto" for double quotes, which are
            ordinary characters in a tab-separated file whose lines make sense only so.
        escape: The character that stands before a quote inside a quoted field; None where a quote is doubled.
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
    found_quote = quote == AUTO
    quote = '"' if found_quote else quote
    for mark, what in ((quote, "quote"), (escape, "escape")):
        if mark is not None and len(mark) != 1:
            raise DataError(f"the {what} character {mark!r} is not one character")
    plain = unpack(existing_file(path, "the file"), workspace)
    if plain.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    reader = _LineReader(path, plain, separator, quote, header, encoding, join_last, escape)
    for note in reader.notes:
        findings.note(note)

    def exactly() -> pl.LazyFrame:
        return reader.scan(findings, workspace)

    if len(separator) > 1 or not is_utf8(encoding):
        return RawTable(path, exactly())
    names = reader.names
    try:
        if quote is not None:
            quoting = look_at_quotes(plain, separator, quote, len(names))
            if found_quote and separator == "\t" and quoting.unquoted:
                findings.note(
                    f"{path.name}: quotes are read as ordinary characters, for each line has {len(names)} "
                    "fields only so"
                )
                reader.quote = quote = None
            elif not quoting.plain:
                return RawTable(path, exactly())
        frame = pl.scan_csv(
            plain,
            separator=separator,
            quote_char=quote,
            has_header=reader.has_header,
            new_columns=names,
            infer_schema=False,
            glob=False,
        )
        # A short row ends in a null, as an empty last field does: only the line reader can tell the two
        # apart.
        first, last = pl.col(names[0]), pl.col(names[-1])
        again = (first == names[0]) & (last == names[-1])
        short, headers = (
            frame.select(last.null_count().alias("short"), again.any().alias("again"))
            .collect(engine="streaming")
            .row(0)
        )
    except pl.exceptions.PolarsError:
        return RawTable(path, exactly())
    if short or headers:
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
        escape: str | None = None,
    ) -> None:
        self.path, self.plain, self.separator, self.quote = path, plain, separator, quote
        self.encoding, self.join_last, self.escape = encoding, join_last, escape
        self.notes: list[str] = []
        self.escaped = 0
        self.doubtful: list[int] = []
        self.has_header = header is None or self._header_stands_first(list(header))
        self.names = list(header) if header is not None else self._read_names()

    def scan(self, findings: Findings, workspace: Path) -> pl.LazyFrame:
        """Writes the well-formed records to a clean file, counts the others, and scans the clean one."""
        clean = new_file(workspace, self.path.name + ".clean.csv")
        replaced = headers = stray = 0
        self.escaped, self.doubtful = 0, []
        first = ""
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
                if not problem and [field.strip() for field in fields] == self.names:
                    headers, first = headers + 1, first or f"line {number}: {text[:80]!r}"
                elif problem:
                    findings.malformed(self.path, number, problem, text)
                    stray += self.quote is not None and self.quote in text
                else:
                    writer.writerow([number, *fields])
        if replaced:
            findings.note(
                f"{self.path.name}: {replaced:,} lines have bytes that are not {self.encoding}; "
                "each such byte became U+FFFD"
            )
        findings.drop(f"header lines inside {self.path.name}", headers, [first])
        if self.escaped:
            findings.note(f"{self.path.name}: {self.escaped:,} lines have quotes behind a backslash, read so")
        if self.doubtful:
            findings.note(
                f"{self.path.name}: {len(self.doubtful):,} quoted fields span lines that would be records by "
                f"themselves (from line {self.doubtful[0]}); if their quotes are stray ones, say --quote ''"
            )
        if stray:
            findings.note(
                f"{self.path.name}: {stray:,} of the malformed lines hold quotes; where quotes mean nothing "
                "in a file, `data import table` reads it with --quote '' (see also --escape)"
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
        for place in {0, len(names) - 1} if len(names) > 1 else ():
            if names[place] == "" and (unnamed := f"unnamed_{place + 1}") not in names:
                names[place] = unnamed  # pandas writes its index so
                self.notes.append(f"{self.path.name}: column {place + 1} has no name; it is {unnamed!r} here")
        if any("\r" in name for name in names):
            raise DataError(
                f"{self.path}: lines end in carriage returns alone; expected line feeds: convert the file"
            )
        if problem or not names or "" in names or len(set(names)) != len(names):
            raise DataError(
                f"{self.path}: the first line must name each column once; "
                f"found: {shown_names(names) or problem}"
            )
        check_names(self.path, names)
        return names

    def _header_stands_first(self, names: list[str]) -> bool:
        """Tells whether the first line names the columns, although their names were given."""
        self.names = []
        records = self._records()
        first, second = (next(records, (0, "", [], "no line"))[2] for _ in range(2))
        same = sum(one.strip().lower() == name.lower() for one, name in zip(first, names, strict=False))
        worded = bool(first) and all(_NAME.fullmatch(field.strip()) for field in first)
        found = len(first) == len(names) > 1 and (
            2 * same > len(names) or (worded and any(_NUMBER.fullmatch(field.strip()) for field in second))
        )
        if found:
            self.notes.append(
                f"{self.path.name}: the first line, {shown_names(first)}, looks like a header: left out"
            )
        return found

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
                    if self._are_records([line, *(held for _, held in following)]):
                        if len(self.names) > 2:
                            break
                        self.doubtful.append(following[0][0] - 1)
                    return fields, ""
            if len(following) == RECORD_LINES:
                break
        # The quote was a stray one: this line is bad, those behind it may be good.
        lines.push_back(following)
        return [], _OPEN

    def _are_records(self, lines: list[str]) -> bool:
        """Tells whether lines that a quoted field would span are records by themselves, each of them."""
        width = len(self.names)
        return width > 1 and all(line.count(self.separator) == width - 1 for line in lines)

    def _parse(self, text: str) -> tuple[list[str], str]:
        """Splits one record: first as it is, then with spaces before quotes, then with escaped quotes."""
        spaced = f"{self.separator} {self.quote}" in text
        for skip in (True, False) if spaced else (False,):
            fields, problem = self._parse_as(text, self.escape, skip)
            if not problem and (not self.names or len(fields) == len(self.names)):
                return fields, ""
        if self.escape is None and f"\\{self.quote}" in text:
            escaped, wrong = self._parse_as(text, "\\", False)
            if not wrong and len(escaped) == len(self.names):
                self.escaped += 1
                return escaped, ""
        return fields, problem

    def _parse_as(self, text: str, escape: str | None, skip: bool) -> tuple[list[str], str]:
        # What csv would take for a sign of its own stands aside: a carriage return inside a record is part of
        # a field, as Polars has it, and an escaped sign is that sign.
        free = (mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
        aside = {"\r": "\r"} if "\r" in text else {}
        if escape is not None:
            aside |= {escape + mark: mark for mark in (escape, self.quote) if escape + mark in text}
        stand_ins = {}
        for mark, meant in aside.items():
            stand_ins[stand_in := next(free)] = meant
            text = text.replace(mark, stand_in)
        try:
            fields = next(
                csv.reader(
                    [text],
                    delimiter=self.separator,
                    quotechar=self.quote,
                    strict=True,
                    skipinitialspace=skip,
                )
            )
        except csv.Error as error:
            return [], _OPEN if "unexpected end of data" in str(error) else str(error)
        for stand_in, meant in stand_ins.items():
            fields = [field.replace(stand_in, meant) for field in fields]
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
