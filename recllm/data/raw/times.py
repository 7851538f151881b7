"""Times as UTC seconds, from numbers of any unit and from dates as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.tables import LINE
from recllm.errors import DataError

TimestampUnit = Literal["auto", "s", "ms", "us", "ns"]

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Seconds stay below 1e11 until the year 5138, milliseconds since 1973 lie above it, and so on by 1,000.
_UNIT_BOUNDS = {"s": (0, 10**11), "ms": (10**11, 10**14), "us": (10**14, 10**17), "ns": (10**17, 2**63)}
_SAMPLE = 1000
_YEAR_1990 = 631_152_000
_ISO_FORMATS = (
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M%#z",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d",
    "%m %d, %Y",
)
_CLOCKS = (" %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p", "")
_OTHER_FORMATS = (
    *("%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%d/%b/%Y:%H:%M:%S %z"),
    *("%a %b %d %H:%M:%S %Y", "%Y%m%dT%H%M%S"),
    *(day + clock for day in ("%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y") for clock in _CLOCKS),
    *("%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y", "%d-%b-%Y", "%B %d %Y", "%b %d %Y"),
)
_SLASHED = [("%m" + mark + "%d" + mark + "%Y", "%d" + mark + "%m" + mark + "%Y") for mark in ("/", "-")]
_COMPACT = {
    "%Y%m%d": r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$",
    "%Y%m%d%H%M%S": r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])([01]\d|2[0-3])([0-5]\d){2}$",
}


@dataclass(frozen=True)
class TimeReading:
    """How times are written, as far as the user says it.

    Attributes:
        unit: The unit of numbers; "auto" tells it from their size.
        form: The format of dates, in the signs of strftime; None to find it.
    """

    unit: TimestampUnit = "auto"
    form: str | None = None


def seconds(frame: pl.LazyFrame, reading: TimeReading, findings: Findings, source: Path) -> pl.Expr:
    """Returns the column `timestamp` as UTC seconds (int64, rounded down); what is no time becomes null.

    Raises:
        DataError: Numbers are in several units, or dates are in no known format or have two readings.
    """
    dtype = frame.collect_schema()["timestamp"]
    column = pl.col("timestamp")
    if dtype in (pl.Time, pl.Duration):
        raise DataError(f"{source}: the timestamp column is of type {dtype}; expected dates or numbers")
    if dtype.is_temporal():
        if getattr(dtype, "time_zone", None):
            column = column.dt.convert_time_zone("UTC")
        return column.dt.epoch("s").alias("timestamp")
    if reading.form is not None:
        return _in_format(frame, reading.form, source).alias("timestamp")
    if dtype == pl.String:
        column = column.str.strip_chars()
        sample = frame.select(column).filter(pl.col("timestamp") != "").head(_SAMPLE).collect()["timestamp"]
        if sample.cast(pl.Float64, strict=False).null_count() == len(sample) > 0:
            return _dates(frame, sample, findings, source).alias("timestamp")
    if reading.unit == "auto" and (form := _compact(frame, dtype)) is not None:
        findings.note(f"timestamps in {source.name} are dates, read as {form}")
        return _in_format(frame, form, source).alias("timestamp")
    whole = column.cast(pl.Int64, strict=False)
    if dtype == pl.String or dtype.is_float():
        # Text such as "1.5e9" or "964982703.25"; far slower than a cast to integers, so only where that
        # fails.
        broken = column.cast(pl.Float64, strict=False).floor().cast(pl.Int64, strict=False)
        whole = pl.when(whole.is_not_null()).then(whole).otherwise(broken)
    unit = reading.unit
    if unit == "auto":
        unit = _detect_unit(frame.select(whole.alias("timestamp")), source, findings)
    return (whole if unit == "s" else whole.floordiv(PER_SECOND[unit])).alias("timestamp")


def _detect_unit(frame: pl.LazyFrame, source: Path, findings: Findings) -> str:
    size = pl.col("timestamp").abs()
    ranges = {unit: ((size >= low) & (size < high)).sum() for unit, (low, high) in _UNIT_BOUNDS.items()}
    times = frame.filter(pl.col("timestamp") != 0)
    counts = (
        times.select(latest=pl.col("timestamp").max(), **ranges)
        .collect(engine="streaming")
        .row(0, named=True)
    )
    latest = counts.pop("latest")
    found = [unit for unit, count in counts.items() if count]
    if len(found) > 1:
        told = ", ".join(f"{counts[unit]:,} look like {unit}" for unit in found)
        raise DataError(
            f"{source}: timestamps in several units ({told}); mend the file, or say --timestamp-unit"
        )
    unit = found[0] if found else "s"
    if unit != "s":
        findings.note(f"timestamps in {source.name} are in {unit}; they were divided by {PER_SECOND[unit]:,}")
    elif latest is not None and latest < _YEAR_1990:
        findings.note(
            f"timestamps in {source.name} end at {latest:,}, which in seconds lies before 1990; if they are "
            "dates or days, write them as YYYY-MM-DD (only their order is used as long as they are numbers)"
        )
    return unit


def _compact(frame: pl.LazyFrame, dtype: pl.DataType) -> str | None:
    """Returns the format of dates written as one number, such as 20160509; None for other numbers."""
    if not (dtype == pl.String or dtype.is_integer()):
        return None
    text = pl.col("timestamp").cast(pl.String).str.strip_chars()
    texts = frame.select(text).filter(~pl.col("timestamp").is_in(["", "0"]))
    sample = texts.head(_SAMPLE).collect()["timestamp"]
    for form, pattern in _COMPACT.items():
        if len(sample) and sample.str.contains(pattern).all():
            matches = texts.select(pl.col("timestamp").str.contains(pattern).all())
            return form if matches.collect(engine="streaming").item() else None
    return None


def _epoch(text: pl.Expr, form: str) -> pl.Expr:
    zoned = form.endswith("z") or "%z" in form
    clocked = any(sign in form for sign in ("%H", "%I", "%T", "%R", "%s"))
    dtype = pl.Datetime("us", "UTC" if zoned else None) if clocked else pl.Date()
    return text.str.strptime(dtype, form, strict=False).dt.epoch("s")


def _in_format(frame: pl.LazyFrame, form: str, source: Path) -> pl.Expr:
    reading = _epoch(pl.col("timestamp").cast(pl.String).str.strip_chars(), form)
    try:
        found = frame.select(reading.is_not_null().any()).collect(engine="streaming").item()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"--time-format {form!r} is no format of dates ({str(error)[:120]})") from None
    if not found:
        shown = frame.select(pl.col("timestamp").cast(pl.String)).drop_nulls().head(1).collect()
        example = repr(shown.item()) if len(shown) else "nothing"
        raise DataError(f"{source}: no time has the format {form!r}; the first is {example}")
    return reading


def _dates(frame: pl.LazyFrame, sample: pl.Series, findings: Findings, source: Path) -> pl.Expr:
    """Dates as text (UTC where no zone is given); formats beside ISO 8601 are noted.

    Args:
        frame: The table.
        sample: Texts of the column. Formats beside ISO 8601 that read none of them are not tried.
        findings: Where formats are noted.
        source: The file, for messages.
    """
    text = (
        pl.col("timestamp")
        .str.strip_chars()
        .str.replace(r"^(\d{4}-\d\d-\d\d)T", "$1 ")
        .str.replace(r"\s*(Z|UTC)$", "+00:00")
    )
    few = sample.to_frame("timestamp")
    thoroughly = LINE in frame.collect_schema()  # the exact reader's table: every ISO format on every row
    readings, found = [], False
    for form in _ISO_FORMATS:
        reads = bool(few.select(_epoch(text, form).count()).item())
        found |= reads
        if reads or thoroughly:
            readings.append(_epoch(text, form))
    # Steam: "Posted November 5, 2011."
    worded = text.str.replace(r"^Posted ", "").str.strip_chars_end(".")
    forms = [form for form in _OTHER_FORMATS if few.select(_epoch(worded, form).count()).item()]
    for month_first, day_first in _SLASHED:
        both = (month_first, day_first)
        clocks = [
            clock
            for clock in _CLOCKS
            if few.select(pl.coalesce(_epoch(worded, f + clock) for f in both).count()).item()
        ]
        for clock in clocks:
            forms.append(_day_or_month_first(frame, worded, month_first + clock, day_first + clock, source))
    if forms:
        findings.note(f"timestamps in {source.name} are dates, read as {' or '.join(forms)}")
    if not found and not forms:
        raise DataError(
            f"{source}: timestamps such as {sample[0]!r} are neither numbers nor dates in a format that is "
            "known; --time-format names it, for example '%d.%m.%Y %H:%M'"
        )
    return pl.coalesce([*readings, *(_epoch(worded, form) for form in forms)])


def _day_or_month_first(
    frame: pl.LazyFrame, text: pl.Expr, month_first: str, day_first: str, source: Path
) -> str:
    counts = frame.select(months=_epoch(text, month_first).count(), days=_epoch(text, day_first).count())
    months, days = counts.collect(engine="streaming").row(0)
    if months == days:
        example = frame.select(text).drop_nulls().head(1).collect().item()
        raise DataError(
            f"{source}: dates such as {example!r} may begin with the "
            f"day or the month; say --time-format '{day_first}' or '{month_first}'"
        )
    return month_first if months > days else day_first
