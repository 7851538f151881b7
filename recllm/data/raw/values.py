"""Values of one record as ids, texts, numbers and lists, whatever spelling the source has for them.

Two spellings are one id if they are the same text after the spaces around it are removed, and whole numbers
after their `.0` is. Markers of a missing value (`NA`, `null`, `\\N`, ...) are no id. A field that cannot be
read is null and counted; its record stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
import polars as pl

Value = TypeVar("Value")

MISSING = (
    *("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NAN", "-nan", "NaT"),
    *("null", "NULL", "Null", "None", "none", "NONE", "\\N", "nil", "undefined"),
)
WHOLE = r"^-?[0-9]+\.0$"
_SCALES = {
    **dict.fromkeys(("k", "tsd", "tys", "тыс", "千", "mil"), 1e3),
    **dict.fromkeys(("m", "mio", "mln", "млн", "mi"), 1e6),
    **dict.fromkeys(("b", "bn", "mrd", "mld", "млрд", "bi"), 1e9),
    **dict.fromkeys(("万", "萬", "만", "w"), 1e4),
    **dict.fromkeys(("亿", "億", "억"), 1e8),
}
_SCALED = re.compile(r"([-+]?[\d.,]*\d)\s*([^\W\d_]+)\.?", re.UNICODE)
_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
_POINTED = re.compile(r"[-+]?\d{1,3}(\.\d{3})+,\d*|[-+]?\d{1,3}(\.\d{3}){2,}")
_COMMA = re.compile(r"[-+]?\d+,\d+")
UNDECODED = "an id with bytes that are not in the file's encoding"


class Record(dict[str, Any]):
    """One object of a source file. Fields that cannot be read are null, and stand in `unread`."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.unread: list[str] = []

    def take(self, convert: Callable[[Any], Value], *names: str, empty: Value | None = None) -> Value | None:
        """Returns the first field of `names` that the record has, converted; `empty` if it cannot be."""
        name = next((name for name in names if name in self), names[0])
        value = self.get(name)
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError, RecursionError):
            self.unread.append(f"{name} {value!r:.60}")
            return empty


def as_id(value: Any) -> str | None:
    """Returns an id as text; None for a marker of a missing value.

    Raises:
        TypeError: The value is a list or an object.
        ValueError: The text has bytes that could not be decoded.
    """
    text = as_text(value)
    if text is not None and "\ufffd" in text:
        raise ValueError(UNDECODED)
    if text is None or (text := text.strip()) in MISSING:
        return None
    return text.partition(".")[0] if re.match(WHOLE, text) else text


def as_text(value: Any) -> str | None:
    """Returns a scalar as text: whole floats without their `.0`; None, NaN and "" as None."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (int, float)):
        raise TypeError(f"expected text or a number, found {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def as_number(value: Any) -> float | None:
    """Returns a finite number; None, NaN and markers of a missing value as None.

    Text may be grouped (`1,234.5`), have a decimal comma (`4,5` and `1.234,5`) or a word for its scale
    (`2.5K`, `1.2万`). `1,234` is grouped.

    Raises:
        TypeError: The value is a boolean, a list or an object.
        ValueError: The text is no number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"expected a number, found {type(value).__name__}")
    if isinstance(value, str):
        value = value.strip()
        if value in MISSING:
            return None
        number = _number(value)
    else:
        number = float(value)
    if number != number:
        return None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number


def _number(text: str) -> float:
    if _GROUPED.fullmatch(text):
        return float(text.replace(",", ""))
    if _POINTED.fullmatch(text):
        return float(text.replace(".", "").replace(",", "."))
    if _COMMA.fullmatch(text):
        return float(text.replace(",", "."))
    scaled = _SCALED.fullmatch(text)
    if scaled and scaled[2].lower() in _SCALES:
        return _number(scaled[1]) * _SCALES[scaled[2].lower()]
    return float(text)


def as_whole(value: Any) -> int | None:
    """Returns a whole number, rounded down; what does not fit into 64 bits as None.

    Raises:
        TypeError: The value is a boolean, a list or an object.
        ValueError: The text is no number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -(2**63) <= value < 2**63 else None
    number = as_number(value)
    if number is None or not -(2.0**63) <= number < 2.0**63:
        return None
    return math.floor(number)


def as_flag(value: Any) -> bool | None:
    """Returns true or false, also from 0, 1 and the words for them.

    Raises:
        ValueError: The value is neither.
    """
    if value is None or isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "t", "yes", "y", "1", "1.0"):
        return True
    if text in ("false", "f", "no", "n", "0", "0.0"):
        return False
    if text in map(str.lower, MISSING):
        return None
    raise ValueError(f"{value!r} is neither true nor false")


def as_texts(value: Any) -> list[str]:
    """Returns a list of scalars, nested lists included, as a flat list of non-empty texts.

    An object among them counts as its `name`, or its only text where it has no name.

    Raises:
        TypeError: An object has neither.
    """
    if value is None:
        return []
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [text for entry in entries for text in as_texts(entry)]
    if isinstance(value, dict):
        texts = [entry for entry in value.values() if isinstance(entry, str)]
        if "name" not in value and len(texts) != 1:
            raise TypeError("expected texts, found an object without a name")
        return as_texts(value.get("name", texts[0] if texts else None))
    text = as_text(value)
    return [text] if text is not None else []


def as_json(value: Any) -> str | None:
    """Returns an object as JSON text; text stays as it is; what is empty becomes None."""
    if value is None or value == "" or value == [] or value == {}:
        return None
    return value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def number_column(text: pl.Expr) -> pl.Expr:
    """Returns a column of text as numbers as `as_number` reads them; null for what is none.

    Args:
        text: Texts without spaces around them.
    """
    plain = text.cast(pl.Float64, strict=False)
    return (
        pl.when(plain.is_not_null() | text.is_in(MISSING))
        .then(plain)
        .otherwise(text.map_elements(_number_or_none, return_dtype=pl.Float64, skip_nulls=True))
    )


def _number_or_none(text: str) -> float | None:
    try:
        return as_number(text)
    except ValueError:
        return None
