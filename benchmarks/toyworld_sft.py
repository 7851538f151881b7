"""Fine-tunes the embedded model on toy worlds, by the quickstart's commands, with text, pictures, and both.

    python benchmarks/toyworld_sft.py OUT

A world a seed, leave-one-out, 1+20 uniform negatives, each way by its own instruction rows and QLoRA run:
four-step chain of thought, plain question, and for the ablation (MLLM-SRec, table 4) the plain question with
all that pictures tell left out, or all that texts tell. Untrained: the model as it comes, on the same rows.
Everything is kept in OUT, and what is there is not made again. Takes about an hour on two cores.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from tyro.conf import Positional

from recllm.config import run_command
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import rank_candidates
from recllm.files import read_json, write_json
from recllm.recipe_files import recipe_path
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
METRICS = ("auc", "hr@1", "hr@10", "ndcg@10", "mrr")
LISTS = "1+20-uniform-seed42"
BATCH = 32
PLAIN = "--form plain --history 3"
WAYS = {
    "cot": ("--form cot --history 3", "cot"),
    "plain": (PLAIN, "yes_no"),
    "text": (f"{PLAIN} --history-as title --preference none --no-target-image", "yes_no"),
    "image": (
        f"{PLAIN} --summaries viu --preference none --no-profile --no-target-text",
        "yes_no",
    ),
}
"""What rows are built with, and which recipe they are trained by."""
UNTRAINED = ("cot", "plain")


@dataclass
class Config:
    """Fine-tunes the embedded model on toy worlds."""

    work: Positional[Path] = Path("toyworlds")
    """Folder to work in."""
    out: Path = Path("results/toyworld_sft.json")
    """Where the figures go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the worlds, and of training."""
    rows: int = 9600
    """Training rows that a run sees."""


def main(config: Config) -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for seed in config.seeds:
        folder = config.work / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for command, makes in commands(seed, config.rows):
            if not (folder / makes).exists():
                call(command, folder)
        candidates = pl.read_parquet(folder / f"toys/splits/loo/candidates/{LISTS}/test.parquet")
        for path in sorted((folder / "scores").glob("*.parquet")):
            means = compute_metrics(rank_candidates(candidates, pl.read_parquet(path)), names=METRICS).mean()
            figures = found.setdefault(path.stem, {name: [] for name in METRICS})
            for name in METRICS:
                figures[name].append(round(float(means[name]), 5))
        for way in WAYS:
            metrics = read_json(folder / "runs" / way / "metrics.json", "metrics of a run")
            found[way].setdefault("valid auc", []).append(round(metrics["valid"]["auc"], 5))
    figures = {
        system: {name: summary(values) for name, values in metrics.items()}
        for system, metrics in found.items()
    }
    write_json(
        config.out,
        {
            "what": "the embedded model on toy worlds, mean and standard deviation over worlds",
            "protocol": f"loo/{LISTS}",
            "seeds": list(config.seeds),
            "rows": config.rows,
            "figures": figures,
            "commands": [shlex.join(line).replace(f"{ROOT}/", "") for line, _ in commands(0, config.rows)],
            "machine": describe_machine(),
            "run": describe_run(),
        },
    )
    for system, metrics in figures.items():
        print(
            f"{system:16}",
            *(f"{name} {each['mean']:.3f} ± {each['sd']:.3f}" for name, each in metrics.items()),
        )


def commands(seed: int, rows: int) -> list[tuple[list[str], str]]:
    """Returns the commands of a world, and what each makes."""
    split = "toys/splits/loo"
    lines = [
        (f"recllm data toyworld --users 500 --items 200 --seed {seed} toys", "toys"),
        ("recllm data split toys loo", split),
        (f"recllm data candidates {split} --negatives 20", f"{split}/candidates/{LISTS}/test.parquet"),
        ("recllm build items toys --model tiny", "toys/texts/imsg.parquet"),
        (
            "recllm build users toys --model tiny --split loo --parts train valid test",
            "toys/texts/tubc-test.parquet",
        ),
        (f"recllm score popularity {split} --candidates {LISTS}", "scores/popularity.parquet"),
        (
            f"recllm score profile {split} --candidates {LISTS} --history 0 --name text-profile",
            "scores/text-profile.parquet",
        ),
    ]
    for way, (options, recipe) in WAYS.items():
        config = recipe_path(f"configs/tiny/{recipe}.yaml")
        name, steps = f"toys/instructions/{way}", rows // BATCH
        lines += [
            (
                f"recllm build instructions toys --split loo {options} --targets-per-user 6 "
                f"--negatives 3 --parts train valid test --candidates {LISTS} --name {way}",
                f"{name}/manifest.json",
            ),
            (
                f"accelerate launch --config_file {recipe_path('launch/cpu.yaml')} {recipe_path('sft.py')} "
                f"--config {config} --instructions {name} --out runs/{way} --seed {seed} "
                f"--batch-size {BATCH} --max-steps {steps} --valid-every {steps // 4} --resume auto",
                f"runs/{way}/metrics.json",
            ),
            (
                f"recllm score yes-no {name} --run runs/{way} --visual-store auto --name {way}",
                f"scores/{way}.parquet",
            ),
        ]
        if way in UNTRAINED:
            lines.append(
                (
                    f"recllm score yes-no {name} --model tiny --name untrained-{way}",
                    f"scores/untrained-{way}.parquet",
                )
            )
    return [(shlex.split(line), makes) for line, makes in lines]


def call(command: list[str], folder: Path) -> None:
    modules = {"recllm": "recllm.cli", "accelerate": "accelerate.commands.accelerate_cli"}
    print(f"{folder}$ {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", modules[command[0]], *command[1:]], cwd=folder, check=True)


def summary(values: list[float]) -> dict[str, float | list[float]]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 5), "sd": round(sd, 5), "per_seed": values}


if __name__ == "__main__":
    run_command(Config, main)
