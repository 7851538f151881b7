"""Peak memory of reading prompts from a part of instructions: some users', and those of all rows in turn.

    python benchmarks/prompt_memory.py --rows 20000 80000 --out results/prompt_memory.json

Each case runs in a process of its own. Run it on two versions of the code to compare them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import polars as pl

from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run

USERS = 100
LIST = 21
CASES = ("imports", "scoring", "validation", "scoring all rows", "validation on all rows")


def main() -> None:
    """Measures every case, or runs one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    if options.case is not None:
        read(options.case, options.file)
        return
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            path = Path(folder) / f"{rows}.parquet"
            write(path, rows)
            peaks = {case: peak_mb(case, path) for case in CASES}
            measured.append({"rows": rows, "file_mb": round(path.stat().st_size / 1e6), "peak_mb": peaks})
            print(measured[-1], flush=True)
    if options.out is not None:
        figures = {"users_read": USERS, "measured": measured}
        write_json(options.out, {"run": describe_run(), "machine": describe_machine(), "figures": figures})


def write(path: Path, rows: int) -> None:
    """Writes lists of 21 candidates, with a prompt of about 9 kB a row."""
    numbers = pl.int_range(rows, eager=True)
    table = pl.LazyFrame({"row": numbers}).select(
        id=pl.col("row").cast(pl.String),
        user=(pl.col("row") // LIST).cast(pl.String),
        item=(pl.col("row") % LIST).cast(pl.String),
        target=pl.lit("0"),
        label=(pl.col("row") % LIST == 0).cast(pl.Int8),
        images=pl.lit([], pl.List(pl.String)),
        prompt=pl.concat_str(pl.lit("seen: a striped mug. " * 440), pl.col("row").cast(pl.String)),
    )
    table.filter(pl.col("user").cast(pl.Int64) < rows // LIST).sink_parquet(path, row_group_size=2048)


def peak_mb(case: str, path: Path) -> int:
    """Returns the peak memory of one case."""
    command = [sys.executable, __file__, "--case", case, "--file", str(path)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def read(case: str, path: Path) -> None:
    """Reads rows as the library does, and their prompts a unit at a time, as they are scored."""
    from recllm.data.prompt_files import PromptFile
    from recllm.mllm.scoring.command import rows_to_score
    from recllm.mllm.scoring.prompts import group_rows, units_of
    from recllm.mllm.scoring.tables import unit_reader
    from recllm.training.validation import Validation

    part, users = SimpleNamespace(path=path), None if "all rows" in case else USERS
    if case != "imports":
        if case.startswith("scoring"):
            rows = rows_to_score(part, users)
        else:
            rows = Validation(None, part, users=users).rows
        reader = SimpleNamespace(read=lambda row, content: len(content["prompt"]))
        prompts, units = PromptFile(path), units_of(group_rows(rows, prompts_on_disk=True))
        found = sum(len(group) for unit in units for group in unit_reader(reader, rows, unit, prompts)())
        expected = rows.height if users is None else users * LIST
        if found != expected:
            raise SystemExit(f"{found} rows were read, expected {expected}")
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024 // 10**6)


if __name__ == "__main__":
    main()
