"""Import, 5-core and leave-one-out split of a generated log: recllm against the same steps in pandas, in one
run.

python benchmarks/data_pipeline.py --rows 1000000 5000000 20000000

Each contender runs in a process of its own on the same CSV (user, item, timestamp, rating; a tenth as many
users, a fortieth as many items), reads it, cleans it, writes parquet after each of the three steps, and is
measured
whole: wall time and peak resident memory by the operating system. pandas does the steps as its users write
them: `read_csv` with ids as text, `to_numeric`, a stable sort by time and `drop_duplicates`,
`value_counts().map` until nothing changes, `sort_values` and `groupby().cumcount`. Both must arrive at the
same counts. Figures go to results/data_pipeline.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from recllm.config import parse_config
from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "data_pipeline.json"


@dataclass
class Options:
    """Compares recllm's data pipeline with pandas."""

    rows: tuple[int, ...] = (1_000_000, 5_000_000, 20_000_000)
    """Log sizes."""
    repeats: int = 1
    """Runs of each contender at each size, in turn; the median counts."""
    contender: str = ""
    """Run one contender (recllm or pandas) in this process; used by the benchmark itself."""
    folder: Path | None = None
    """Where the log lies and the contender writes; used by the benchmark itself."""
    write: bool = True
    """Write results/data_pipeline.json."""


def main() -> None:
    """Runs the benchmark, or one contender of it."""
    options = parse_config(Options)
    if options.contender:
        print(json.dumps({"recllm": run_recllm, "pandas": run_pandas}[options.contender](options.folder)))
        return
    figures = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="recllm-benchmark-") as folder:
            write_log(Path(folder) / "log.csv", rows)
            figures.append({"rows": rows, **compare(Path(folder), options.repeats)})
        line = figures[-1]
        ours, theirs = line["recllm"], line["pandas"]
        print(
            f"{rows:>12,} rows: recllm {ours['seconds']:.1f} s, {ours['peak_gb']:.2f} GB; "
            f"pandas {theirs['seconds']:.1f} s, {theirs['peak_gb']:.2f} GB; "
            f"time ratio {line['time_ratio']:.3f}",
            flush=True,
        )
    if options.write:
        content = {
            "benchmark": "data_pipeline",
            "machine": describe_machine(),
            "run": describe_run(),
            "figures": figures,
        }
        write_json(RESULTS, content)


def write_log(path: Path, rows: int) -> None:
    """Writes a log with long-tailed items, a few repeated pairs, and rows in no order."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)
    users = rng.integers(0, rows // 10, rows)
    items = (rng.random(rows) ** 2 * (rows // 40)).astype(np.int64)
    frame = pl.DataFrame(
        {
            "user": users,
            "item": items,
            "timestamp": 1_500_000_000 + rng.integers(0, 10**8, rows),
            "rating": rng.integers(1, 6, rows),
        }
    )
    frame.with_columns(
        pl.format("u{}", "user").alias("user"), pl.format("i{}", "item").alias("item")
    ).write_csv(path)


def compare(folder: Path, repeats: int) -> dict:
    """Runs both contenders in turn; returns medians, the ratio, and the counts that both found."""
    measured: dict[str, list[dict]] = {"recllm": [], "pandas": []}
    for _ in range(repeats):
        for name, runs in measured.items():
            runs.append(measure(name, folder))
    counts = [run["counts"] for runs in measured.values() for run in runs]
    if any(count != counts[0] for count in counts):
        raise SystemExit(f"the contenders disagree: {counts}")
    line = {
        name: {key: round(statistics.median(run[key] for run in runs), 3) for key in ("seconds", "peak_gb")}
        | {"steps": runs[0]["steps"]}
        for name, runs in measured.items()
    }
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(*measured.values(), strict=True)]
    return {**line, "time_ratio": round(statistics.median(ratios), 4), "counts": counts[0]}


def measure(contender: str, folder: Path) -> dict:
    """Runs one contender as a process; returns its wall time, peak memory and what it printed."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--contender", contender, "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{contender} failed with status {process.returncode}")
    told = json.loads(output.strip().splitlines()[-1])
    return {"seconds": time.perf_counter() - started, "peak_gb": usage.ru_maxrss * 1024 / 1e9, **told}


def run_recllm(folder: Path) -> dict:
    """The three steps with recllm."""
    from recllm.data.filtering import FilterOptions, filter_dataset
    from recllm.data.importing import import_dataset
    from recllm.data.readers import Table
    from recllm.data.splits import SplitOptions, make_split

    clock = Clock()
    dataset, _ = import_dataset(
        Table(folder / "log.csv", folder / "dataset", rating="rating", overwrite=True)
    )
    clock.lap("import")
    core = filter_dataset(
        dataset,
        FilterOptions(folder / "dataset", folder / "core", 5, 5, overwrite=True, discard_derived=True),
    )
    clock.lap("filter")
    split = make_split(core, SplitOptions(folder / "core", "loo"))
    clock.lap("split")
    counts = [dataset.manifest["counts"][key] for key in ("users", "items", "interactions")]
    counts += [core.manifest["counts"][key] for key in ("users", "items", "interactions")]
    return {
        "counts": counts + [split.manifest["counts"][part] for part in ("train", "valid", "test")],
        "steps": clock.laps,
    }


def run_pandas(folder: Path) -> dict:
    """The same three steps with pandas."""
    import pandas as pd

    clock = Clock()
    out = folder / "pandas"
    out.mkdir(exist_ok=True)
    log = pd.read_csv(folder / "log.csv", dtype={"user": str, "item": str, "timestamp": str, "rating": str})
    log["user"], log["item"] = log["user"].str.strip(), log["item"].str.strip()
    log["timestamp"] = pd.to_numeric(log["timestamp"], errors="coerce").astype("Int64")
    log["rating"] = pd.to_numeric(log["rating"], errors="coerce").astype("float32")
    log = log.dropna(subset=["user", "item"])
    firsts = log.sort_values("timestamp", kind="stable").drop_duplicates(["user", "item"]).index
    log = log.loc[firsts.sort_values()]
    tables = {
        name: pd.DataFrame({name: log[name].drop_duplicates().sort_values()}) for name in ("user", "item")
    }
    for name, table in tables.items():
        table.to_parquet(out / f"{name}s.parquet", index=False)
    log.to_parquet(out / "interactions.parquet", index=False)
    counts = [len(tables["user"]), len(tables["item"]), len(log)]
    clock.lap("import")

    while True:
        enough = log["user"].map(log["user"].value_counts()) >= 5
        enough &= log["item"].map(log["item"].value_counts()) >= 5
        if enough.all():
            break
        log = log[enough]
    core = {
        name: pd.DataFrame({name: log[name].drop_duplicates().sort_values()}) for name in ("user", "item")
    }
    for name, table in core.items():
        table.to_parquet(out / f"core-{name}s.parquet", index=False)
    log.to_parquet(out / "core-interactions.parquet", index=False)
    counts += [len(core["user"]), len(core["item"]), len(log)]
    clock.lap("filter")

    ordered = log.sort_values(["user", "timestamp"], kind="stable")
    groups = ordered.groupby("user", sort=False)
    from_end, size = groups.cumcount(ascending=False), groups["item"].transform("size")
    held_out = size >= 3
    parts = {"test": held_out & (from_end == 0), "valid": held_out & (from_end == 1)}
    parts["train"] = ~(parts["test"] | parts["valid"])
    for name, chosen in parts.items():
        ordered[chosen].sort_index().to_parquet(out / f"{name}.parquet")
    clock.lap("split")
    return {
        "counts": counts + [int(parts[name].sum()) for name in ("train", "valid", "test")],
        "steps": clock.laps,
    }


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a step."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now


if __name__ == "__main__":
    main()
