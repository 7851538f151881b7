"""Runs the README's MovieLens commands as they stand there, and keeps what they took and what came out.

    python benchmarks/movielens.py ml-latest-small-posters WORK

The first argument is the folder of raw files (GroupLens' ml-latest-small with `posters/` and `plots.csv`);
WORK must be new. Seconds are wall time of each command, on whatever else the machine does meanwhile.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import polars as pl
from tyro.conf import Positional, arg

from recllm.config import run_command
from recllm.errors import DataError
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import rank_candidates
from recllm.files import read_json, write_json
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
HEADING = "## MovieLens with posters"
RAW = "ml-latest-small-posters"
METRICS = ("auc", "hr@1", "hr@10", "ndcg@10")
PROGRAMS = {"recllm": "recllm.cli", "accelerate": "accelerate.commands.accelerate_cli"}


@dataclass
class Config:
    """Runs the README's MovieLens commands."""

    raw: Positional[Annotated[Path, arg(metavar="RAW")]]
    """The folder of raw files."""
    work: Positional[Annotated[Path, arg(metavar="WORK")]]
    """The folder to work in."""
    out: Path = ROOT / "results" / "movielens.json"
    """Where the figures go."""


def main(config: Config) -> None:
    config.work.mkdir(parents=True)
    seconds = {}
    for line in commands():
        print(f"$ {line}", flush=True)
        words = [str(ROOT / word) if word.startswith("recipes/") else word for word in shlex.split(line)]
        words = [str(config.raw.resolve()) if word == RAW else word for word in words]
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", PROGRAMS[words[0]], *words[1:]], cwd=config.work, check=True)
        seconds[line] = round(time.monotonic() - started, 1)
        print(f"({seconds[line]} s)", flush=True)
    (lists,) = (config.work / "ml5/splits/loo/candidates").iterdir()
    candidates = pl.read_parquet(lists / "test.parquet")
    found = {
        path.stem: compute_metrics(rank_candidates(candidates, pl.read_parquet(path)), names=METRICS).mean()
        for path in sorted((config.work / "scores").glob("*.parquet"))
    }
    (run,) = (config.work / "runs").iterdir()
    content = {
        "what": "MovieLens with posters from raw files, by the README's commands",
        "protocol": f"loo/{lists.name}",
        "users": candidates["user"].n_unique(),
        "seconds": seconds,
        "validation": read_json(run / "metrics.json", "metrics of a run")["valid"],
        "validated_users": read_json(run / "manifest.json", "a run")["settings"]["valid_users"],
        "figures": {
            name: {key: round(float(each[key]), 5) for key in METRICS} for name, each in found.items()
        },
        "machine": describe_machine(),
        "run": describe_run(),
    }
    write_json(config.out, content)


def commands() -> list[str]:
    """Returns the lines of the first block below the README's heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(HEADING)[2]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    if block is None:
        raise DataError(f"README.md: no commands below {HEADING!r}")
    return block[1].splitlines()


if __name__ == "__main__":
    run_command(Config, main)
