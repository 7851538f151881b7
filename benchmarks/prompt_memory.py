"""Peak memory of reading some users' prompts from a part of instructions, for scoring and for validation.

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
from recllm.runs import describe_machine, describe_run

USERS = 100
LIST = 21
CASES = ("imports", "scoring", "validation")


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
        prompt=pl.concat_str(pl.lit("seen: a striped mug. " * 440), pl.col("row").cast(pl.String)),
    )
    table.filter(pl.col("user").cast(pl.Int64) < rows // LIST).sink_parquet(path, row_group_size=4096)


def peak_mb(case: str, path: Path) -> int:
    """Returns the peak memory of one case."""
    command = [sys.executable, __file__, "--case", case, "--file", str(path)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def read(case: str, path: Path) -> None:
    """Reads the rows of `USERS` users as the library does."""
    from recllm.mllm.scoring.command import rows_to_score
    from recllm.training.validation import Validation

    rows = None
    if case == "scoring":
        rows = rows_to_score(SimpleNamespace(path=path), USERS)
    elif case == "validation":
        rows = Validation(None, SimpleNamespace(path=path), users=USERS).rows
    if rows is not None and rows.height != USERS * LIST:
        raise SystemExit(f"{rows.height} rows were read, expected {USERS * LIST}")
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024 // 10**6)


if __name__ == "__main__":
    main()
