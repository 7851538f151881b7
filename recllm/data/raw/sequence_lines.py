"""Item sequences: one line a user, `user item item item ...`, in time order and without times."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.lines import new_file, open_bytes
from recllm.data.raw.tables import LINE, RawTable
from recllm.errors import DataError

BATCH_IDS = 1_000_000


def read_sequences(
    path: Path, findings: Findings, workspace: Path, *, separator: str | None = None
) -> RawTable:
    """Reads a sequence file, compressed or not, in bounded memory.

    Args:
        path: The file.
        separator: What stands between ids, beside spaces and tabs.
        findings: Where lines with a user but without items are counted.
        workspace: A folder for intermediate files.

    Raises:
        DataError: Most items have commas in them, and no separator is given.

    Returns:
        One row an interaction, in the order of the file: `user`, `item`.
    """
    parts: list[Path] = []
    users: list[str] = []
    items: list[list[str]] = []
    lines: list[int] = []
    held = total = commas = 0
    example = ""

    def flush() -> None:
        nonlocal held
        types = {"user": pl.String(), "item": pl.List(pl.String()), LINE: pl.Int64()}
        frame = pl.DataFrame({"user": users, "item": items, LINE: lines}, schema=types)
        parts.append(new_file(workspace, f"{path.name}.parquet"))
        frame.explode("item").write_parquet(parts[-1], compression="lz4")
        users.clear(), items.clear(), lines.clear()
        held = 0

    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            ids = line.decode("utf-8", errors="replace").removeprefix("\ufeff")
            ids = (ids.replace(separator, " ") if separator else ids).split()
            if len(ids) == 1:
                findings.malformed(path, number, "a user without items", ids[0])
            if len(ids) < 2:
                continue
            users.append(ids[0])
            items.append(ids[1:])
            lines.append(number)
            held += len(ids)
            total += len(ids) - 1
            with_comma = [item for item in ids[1:] if "," in item]
            commas, example = commas + len(with_comma), example or (with_comma or [""])[0]
            if held >= BATCH_IDS:
                flush()
    if 2 * commas > total:
        raise DataError(
            f"{path}: most item ids have commas in them, such as {example[:60]!r}; expected `user item ...` "
            "in time order. Say --separator , if commas stand between ids, and leave out lists of negatives"
        )
    if commas:
        findings.note(f"{path.name}: {commas:,} item ids have commas in them, such as {example[:60]!r}")
    if users or not parts:
        flush()
    return RawTable(path, pl.scan_parquet(parts, glob=False))
