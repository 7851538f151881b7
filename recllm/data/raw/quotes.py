"""Whether quotes mean anything in a delimited file, found by a look at all of its lines.

Polars trusts quotes: a stray one makes one field of all lines up to the next. So a file with quotes is handed
to Polars only where each line of it is a well-formed record by itself; any other file with quotes is read by
the line reader, which bounds a field that spans lines and counts what it cannot read.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl


@dataclass(frozen=True)
class Quoting:
    """What the lines of a delimited file say about its quotes.

    Attributes:
        plain: No line holds a quote, or each line is a well-formed record: Polars reads the file as the line
            reader does.
        unquoted: The lines make sense only if quotes are ordinary characters.
    """

    plain: bool
    unquoted: bool


def look_at_quotes(path: Path, separator: str, quote: str, fields: int) -> Quoting:
    """Looks at the quotes of an unpacked UTF-8 file.

    A file is unquoted if each of its lines has the right number of separators, at least one line is no
    well-formed record, and fewer lines hold well-formed quoted fields than stray quotes.

    Args:
        path: The file.
        separator: One character.
        quote: One character.
        fields: How many columns the file has.

    Raises:
        polars.exceptions.PolarsError: The file is not UTF-8.
    """
    if not _holds(path, quote.encode()):
        return Quoting(plain=True, unquoted=False)
    line = pl.col("line").str.strip_chars_end("\r")
    held = line.str.contains(quote, literal=True)
    formed = line.str.contains(record_pattern(separator, quote))
    separators = line.str.count_matches(separator, literal=True)
    counts = (
        pl.scan_lines(path, name="line")
        .filter(line.str.strip_chars() != "")
        .select(
            uneven=(separators != fields - 1).sum(),
            stray=(held & ~formed).sum(),
            quoted=(held & formed).sum(),
            header=held.first(),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    unquoted = counts["uneven"] == 0 and counts["stray"] > counts["quoted"] and not counts["header"]
    return Quoting(plain=counts["stray"] == 0, unquoted=unquoted)


def record_pattern(separator: str, quote: str) -> str:
    """Returns a pattern of lines in which each field is free of quotes, or quoted from end to end."""
    mark, between = re.escape(quote), re.escape(separator)
    field = rf"(?:[^{mark}{between}]*|{mark}[^{mark}]*(?:{mark}{mark}[^{mark}]*)*{mark})"
    return rf"^{field}(?:{between}{field})*$"


def _holds(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark) >= 0
