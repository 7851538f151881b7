"""From a source's columns to the schema's types: ids as text, times as UTC seconds, ratings as numbers.

A row that cannot be read so is *bad*: it is counted, named by its line, and left out; nothing is guessed.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recllm.data import schema
from recllm.data.raw.findings import SHOWN, Findings
from recllm.data.raw.tables import FILE, LINE, RawTable
from recllm.data.raw.times import TimeReading, seconds
from recllm.data.raw.values import MISSING, UNDECODED, WHOLE, number_column
from recllm.errors import DataError

PROBLEM = "__problem"
_SAMPLE = 1000
_POINTED = r"^(-?[0-9]+)\.0$"  # as `WHOLE`, with the number in a group


def write_interactions(raw: RawTable, path: Path, times: TimeReading, findings: Findings) -> pl.Series:
    """Streams a source's interactions to `path` in the schema's types.

    A row without a readable user or item is bad. One whose rating or time cannot be read is kept without it:
    the interaction took place. Such rows come first in a user's history and are never a validation or
    test target.

    Args:
        raw: The source table.
        path: The parquet file to write. Bad rows are in it, without user and item.
        times: How times are written, as far as the user says it.
        findings: Where bad rows, and rows without a time, are counted.

    Returns:
        True for each good row; shape [rows].

    Raises:
        DataError: Times are in several units, most cannot be read, or every row is bad.
    """
    schema_found = raw.frame.collect_schema()
    timed, rated = "timestamp" in schema_found, "rating" in schema_found
    try:
        quick = raw.with_lines is not None
        good, untimed, unrated = _write_typed(raw.frame, path, times, findings, raw.path, quick)
        clean = bool(good.all()) and not (timed and untimed) and not (rated and unrated)
    except pl.exceptions.PolarsError:
        if raw.with_lines is None:
            raise
        clean = False
    if not clean and raw.with_lines is not None:
        raw.frame, raw.with_lines = raw.with_lines(), None
        good, untimed, _ = _write_typed(raw.frame, path, times, findings, raw.path)
    if len(good) == 0:
        malformed = [line.strip() for line in findings.lines() if not line.startswith("note")]
        raise DataError(": ".join([f"{raw.path} has no rows that could be read", *malformed[:3]]))
    if not clean:
        _report(raw, times, findings, path)
    if not good.any():
        raise DataError(f"{raw.path}: no interaction could be read. " + "; ".join(findings.lines()[:3]))
    if timed and untimed > len(good) / 2:
        told = "; ".join(findings.lines()[:2])
        raise DataError(
            f"{raw.path}: {untimed:,} of {len(good):,} rows have no time that can be read. {told}"
        )
    return good


def read_side_table(raw: RawTable, key: str, findings: Findings) -> pl.DataFrame:
    """Reads an items or users table: ids as text, one row an id (the first counts), sorted by id.

    Args:
        raw: The source table.
        key: `item` or `user`.
        findings: Where rows without an id, and repeated ids, are counted.
    """
    try:
        frame = raw.frame.collect()
    except pl.exceptions.PolarsError:
        if raw.with_lines is None:
            raise
        frame = raw.with_lines().collect()
    frame = frame.with_columns(clean_id(frame.lazy(), key, findings))
    missing = frame.filter(pl.col(key).is_null())
    where = missing[LINE].head(SHOWN) if LINE in frame.columns else []
    findings.drop(
        f"rows of {raw.path.name} without {key} id", len(missing), [f"line {line}" for line in where]
    )
    frame = frame.filter(pl.col(key).is_not_null())
    repeated = frame.filter(~pl.col(key).is_first_distinct())[key]
    examples = [f"{key} {name!r}" for name in repeated.head(SHOWN)]
    findings.drop(f"repeated {key} ids in {raw.path.name} (the first counts)", len(repeated), examples)
    frame = frame.unique(key, keep="first", maintain_order=True).sort(key)
    return frame.drop(LINE, FILE, strict=False)


def _write_typed(
    frame: pl.LazyFrame, path: Path, times: TimeReading, findings: Findings, source: Path, quick: bool = False
) -> tuple[pl.Series, int, int]:
    typed = _typed(frame, times, findings, source, quick=quick)
    typed = typed.with_columns(pl.when(pl.col(PROBLEM).is_null()).then(pl.col("user", "item")).name.keep())
    schema.complete(typed.drop(PROBLEM, LINE, FILE, strict=False), "interactions").sink_parquet(
        path, engine="streaming", compression_level=1
    )
    written = pl.scan_parquet(path, glob=False)
    good = written.select(pl.col("user").is_not_null()).collect(engine="streaming")["user"]
    nulls = written.select(pl.col("timestamp", "rating").null_count()).collect(engine="streaming").row(0)
    return good, *nulls


def _report(raw: RawTable, times: TimeReading, findings: Findings, path: Path) -> None:
    """Counts bad rows, and rows without a time, with the numbers of their lines."""
    frame = _typed(raw.frame, times, Findings(), raw.path).with_row_index("__row", offset=1)
    number = LINE if LINE in frame.collect_schema() else "__row"
    what = number.strip("_")
    file = pl.col(FILE) if FILE in frame.collect_schema() else pl.lit(raw.path.name).alias(FILE)
    bad = frame.filter(pl.col(PROBLEM).is_not_null()).select(file, number, PROBLEM)
    bad = bad.collect(engine="streaming")
    examples = (f"{name}, {what} {row}: {problem}" for name, row, problem in bad.iter_rows())
    findings.drop(f"malformed lines in {raw.path.name}", len(bad), examples)
    if "rating" in raw.frame.collect_schema():
        _report_ratings(raw, frame, file, number, findings)
    if "timestamp" not in raw.frame.collect_schema():
        return
    untimed = pl.read_parquet(path, columns=["user", "timestamp"], glob=False).with_row_index(
        "__row", offset=1
    )
    untimed = untimed.filter(pl.col("timestamp").is_null() & pl.col("user").is_not_null()).select("__row")
    shown = raw.frame.with_row_index("__row", offset=1).join(
        untimed.head(SHOWN).lazy(), on="__row", how="semi"
    )
    rows = shown.select(file, number, pl.col("timestamp").cast(pl.String)).collect().iter_rows()
    examples = (f"{name}, {what} {row}: timestamp {text!r}" for name, row, text in rows)
    findings.spoil("interactions without a readable time", len(untimed), examples)


def _report_ratings(
    raw: RawTable, typed: pl.LazyFrame, file: pl.Expr, number: str, findings: Findings
) -> None:
    read = typed.select("__row", PROBLEM, read=pl.col("rating"))
    both = raw.frame.with_row_index("__row", offset=1).join(read, on="__row", how="left")
    text = pl.col("rating").cast(pl.String).str.strip_chars()
    unread = both.filter(pl.col("read").is_null() & ~text.is_in(MISSING) & pl.col(PROBLEM).is_null())
    rows = unread.select(file, number, text).collect(engine="streaming")
    what = number.strip("_")
    examples = (f"{name}, {what} {row}: rating {text[:40]!r}" for name, row, text in rows.iter_rows())
    findings.spoil("interactions without a readable rating", len(rows), examples)


def _typed(
    frame: pl.LazyFrame, times: TimeReading, findings: Findings, source: Path, *, quick: bool = False
) -> pl.LazyFrame:
    """Adds the schema's types, and `PROBLEM`: what is wrong with a row, null for a good one.

    `quick`: ratings are tried as plain numbers only; a null among them has the table read again.
    """
    types = frame.collect_schema()
    columns = [clean_id(frame, "user", findings), clean_id(frame, "item", findings)]
    user, item = pl.col("user"), pl.col("item")
    undecoded = user.str.contains("\ufffd", literal=True) | item.str.contains("\ufffd", literal=True)
    problem = pl.when(user.is_null()).then(pl.lit("no user id"))
    problem = problem.when(item.is_null()).then(pl.lit("no item id"))
    problem = problem.when(undecoded).then(pl.lit(UNDECODED))
    if "timestamp" in types:
        columns.append(seconds(frame, times, findings, source))
    if "rating" in types:
        columns.append(_rating(frame, findings, source, quick).alias("rating"))
    if "review" in types:
        text = pl.col("review").cast(pl.String)
        columns.append(pl.when(text != "").then(text).alias("review"))
    # In two steps, so that ids are cleaned once and not again for each condition.
    return frame.with_columns(columns).with_columns(problem.otherwise(None).alias(PROBLEM))


def clean_id(frame: pl.LazyFrame, name: str, findings: Findings) -> pl.Expr:
    """Returns an id as `recllm.data.raw.values.as_id` reads it: text without spaces around it.

    Markers of a missing value become null, and whole numbers lose the `.0` that nulls gave them.
    """
    dtype = frame.collect_schema()[name]
    column = pl.col(name)
    if dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        broken = pl.when(column.is_finite()).then(column.cast(pl.String))
        return pl.when(whole.cast(dtype) == column).then(whole.cast(pl.String)).otherwise(broken).alias(name)
    if dtype != pl.String:
        return column.cast(pl.String).alias(name)
    text = column.str.strip_chars()
    first = frame.select(text).head(_SAMPLE).filter(pl.col(name).str.contains(WHOLE)).head(1).collect()[name]
    if len(first):
        findings.note(
            f"{name} ids such as {first[0]!r} are whole numbers written with '.0', which was removed"
        )
    text = pl.when(text.str.ends_with(".0")).then(text.str.replace(_POINTED, "$1")).otherwise(text)
    return pl.when(~text.is_in(MISSING)).then(text).alias(name)


def _rating(frame: pl.LazyFrame, findings: Findings, source: Path, quick: bool) -> pl.Expr:
    """A rating as a finite number (float32); null where it is none. True and false are 1 and 0."""
    dtype = frame.collect_schema()["rating"]
    column = pl.col("rating")
    if dtype.is_numeric():
        number = column.cast(pl.Float32)
        return pl.when(number.is_finite()).then(number)
    text = column.cast(pl.String).str.strip_chars()
    words = text.str.to_lowercase()
    sample = frame.select(words).filter(pl.col("rating") != "").head(_SAMPLE).collect()["rating"]
    if len(sample) and sample.is_in(["true", "false"]).all():
        findings.note(f"ratings in {source.name} are true and false; they are 1 and 0 here")
        return words.replace_strict({"true": 1.0, "false": 0.0}, default=None, return_dtype=pl.Float32)
    number = text.cast(pl.Float32, strict=False)
    wrong = (number.is_null() & ~text.is_in(MISSING)).any()
    if not quick and frame.select(wrong).collect(engine="streaming").item():
        number = number_column(text).cast(pl.Float32)
    return pl.when(number.is_finite()).then(number)
