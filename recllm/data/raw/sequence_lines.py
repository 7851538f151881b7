"""Item sequences: one line a user, `user item item item ...`, in time order and without times."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recllm.data.raw.findings import Findings
from recllm.data.raw.lines import new_file, open_bytes
from recllm.data.raw.tables import LINE, RawTable

BATCH_IDS = 1_000_000


def read_sequences(path: Path, findings: Findings, workspace: Path) -> RawTable:
    """Reads a sequence file, compressed or not, in bounded memory.

    Args:
        path: The file. Spaces or tabs stand between ids.
        findings: Where lines with a user but without items are counted.
        workspace: A folder for intermediate files.

    Returns:
        One row an interaction, in the order of the file: `user`, `item`.
    """
    parts: list[Path] = []
    users: list[str] = []
    items: list[list[str]] = []
    lines: list[int] = []
    held = 0

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
            ids = line.decode("utf-8", errors="replace").removeprefix("\ufeff").split()
            if len(ids) == 1:
                findings.malformed(path, number, "a user without items", ids[0])
            if len(ids) < 2:
                continue
            users.append(ids[0])
            items.append(ids[1:])
            lines.append(number)
            held += len(ids)
            if held >= BATCH_IDS:
                flush()
    if users or not parts:
        flush()
    return RawTable(path, pl.scan_parquet(parts, glob=False))
