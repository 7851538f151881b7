"""Lists of a table's column, in whatever form a source writes them: the form is found over the whole column.

Forms are a list type (nested ones are flattened), lists written as text by JSON or Python (`["a", "b"]`,
`['a', 'b']`, `[{"name": "a"}]`), a Python set without its braces as RecBole has it (`'a b', 'c'`), and names
with a separator between them.
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import orjson
import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.values import MISSING, as_texts
from recllm.errors import DataError

_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_QUOTED = re.compile(
    r"""\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(?:,\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*)*"""
)
_EMPTY_SET = "et("  # str(set())[1:-1]
_LONGEST = 100_000


def list_column(frame: pl.LazyFrame, name: str, path: Path, separator: str, findings: Findings) -> pl.Series:
    """Returns a column of a table as lists of text, without spaces around entries and without empty ones.

    Args:
        frame: The table.
        name: The column.
        path: The file, for messages.
        separator: What stands between entries that are text; "" where a text is one entry.
        findings: Where the form is noted, and where texts that have another form are counted.

    Raises:
        DataError: The column holds objects.
    """
    column = frame.select(name).collect()[name]
    dtype = column.dtype
    if dtype.is_nested():
        inner = dtype
        while isinstance(inner, (pl.List, pl.Array)):
            inner = inner.inner
        if inner.is_nested():
            raise DataError(f"{path}: column {name!r} is of type {dtype}; expected text or a list of text")
        return pl.Series(
            name, [_stripped(as_texts(value)) for value in column.to_list()], dtype=pl.List(pl.String)
        )
    texts = column.cast(pl.String).str.strip_chars()
    filled = texts.filter(~texts.is_in(MISSING)).drop_nulls()
    literal, quoted = (
        filled.map_elements(test, return_dtype=pl.Boolean).sum() or 0 for test in (_bracketed, _is_quoted)
    )
    if 2 * max(literal, quoted) > len(filled):
        read, form = (_literal, "lists") if literal >= quoted else (_set_text, "sets")
        findings.note(f"{name} in {path.name} are {form} written as text, such as {filled[0][:60]!r}")
    else:
        if separator != ", " and len(filled) and not filled.str.contains(separator, literal=True).any():
            listed = filled.str.contains(", ", literal=True).sum()
            if 2 * listed > len(filled):
                findings.note(
                    f"{name} in {path.name} hold commas, such as {filled[0][:60]!r}; each is one entry, "
                    "unless --category-separator names what stands between several"
                )
        return pl.Series(
            name, [_split(text, separator) if text else [] for text in texts], dtype=pl.List(pl.String)
        )
    lists, odd = [], []
    for text in texts:
        found = [] if text is None or text in MISSING or text == _EMPTY_SET else read(text)
        if found is None:
            odd.append(f"{name} {text[:60]!r}")
            found = [text]
        lists.append(_stripped(found))
    findings.spoil(
        f"{name} of {path.name} in another form than the others (kept as one entry)", len(odd), odd
    )
    return pl.Series(name, lists, dtype=pl.List(pl.String))


def _split(text: str, separator: str) -> list[str]:
    return _stripped(text.split(separator) if separator else [text])


def _stripped(entries: list[str]) -> list[str]:
    return [entry.strip() for entry in entries if entry.strip()]


def _bracketed(text: str) -> bool:
    return len(text) > 1 and _BRACKETS.get(text[0]) == text[-1] and _literal(text) is not None


def _is_quoted(text: str) -> bool:
    return text == _EMPTY_SET or _QUOTED.fullmatch(text) is not None


def _literal(text: str) -> list[str] | None:
    """Reads a list, tuple, set or object in JSON or Python's spelling (never code)."""
    if len(text) > _LONGEST or _BRACKETS.get(text[:1]) != text[-1:]:
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    try:
        return as_texts(value) if isinstance(value, (list, tuple, set, dict)) else None
    except TypeError:
        return None


def _set_text(text: str) -> list[str] | None:
    return _literal(f"[{text}]") if _is_quoted(text) else None
