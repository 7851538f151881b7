"""Tunes keywords of the embedded model on toy worlds by GRPO, and counts what they name before and after.

    python benchmarks/grpo_toyworld.py OUT

A world a seed. The prompt is in words that the embedded model was not taught, so that it answers variously;
it is paid for agreement with the picture, length, form and distinct words, and is judged on held-out items,
whose looks the answer key tells: which answers, decoded greedily, name the item's color, pattern and shape.
Everything is kept in OUT, and what is there is not made again. Takes about five minutes on two cores.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from recllm.config import run_command
from recllm.data.toyworld import ToyWorld
from recllm.files import read_json, write_json
from recllm.recipe_files import recipe_path
from recllm.runs.log import read_log
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
PROMPT = "List keywords for the image.\n"
LOOKS = ("color", "pattern", "shape")
FAULTS = ("empty", "truncated", "repeating", "copied")


@dataclass
class Config:
    """Tunes keywords on toy worlds."""

    work: Positional[Path] = Path("grpo-toyworlds")
    """Folder to work in."""
    out: Path = Path("results/grpo_toyworld.json")
    """Where the figures go."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the worlds, and of training."""
    steps: int = 20
    """Optimizer steps of a run."""


def main(config: Config) -> None:
    found: dict[str, dict[str, list[float]]] = {"before": {}, "after": {}}
    faults: dict[str, list[list[float]]] = {"first": [], "last": []}
    for seed in config.seeds:
        folder = config.work / f"seed{seed}"
        (folder / "templates").mkdir(parents=True, exist_ok=True)
        (folder / "templates" / "mmsrarec.image_keywords.txt").write_text(PROMPT)
        for command, makes in commands(seed, config.steps):
            if not (folder / makes).exists():
                call(command, folder)
        run = folder / "runs" / "keywords"
        metrics = read_json(run / "metrics.json", "metrics of a run")
        looks = {
            row["item"]: row for row in ToyWorld.open(folder / "toys").item_answers.iter_rows(named=True)
        }
        held_out = read_log(run / "held_out.jsonl")
        for when, step, kept in (("before", 0, "untrained"), ("after", metrics["best_step"], "valid")):
            answers = [line for line in held_out if line["step"] == step]
            measured = {name: float(value) for name, value in metrics[kept].items() if name != "seconds"}
            for name, value in {**measured, **named(answers, looks)}.items():
                found[when].setdefault(name, []).append(round(value, 5))
        lines = [line for line in read_log(run / "log.jsonl") if "loss" in line]
        quarter = max(1, len(lines) // 4)
        for when, some in (("first", lines[:quarter]), ("last", lines[-quarter:])):
            faults[when].append(
                [float(np.mean([line[f"faults/{name}"] for line in some])) for name in FAULTS]
            )
    figures: dict[str, Any] = {
        when: {name: summary(values) for name, values in measured.items()} for when, measured in found.items()
    }
    figures["gain"] = {name: paired(found["before"][name], values) for name, values in found["after"].items()}
    figures["faults of samples"] = {
        when: {name: round(float(value), 5) for name, value in zip(FAULTS, np.mean(rows, 0), strict=True)}
        for when, rows in faults.items()
    }
    write_json(
        config.out,
        {
            "what": "keywords of held-out toy items, decoded greedily, before and after GRPO of the embedded "
            "model; mean and standard deviation over worlds; faults: shares of sampled answers in the first "
            "and the last quarter of training",
            "prompt": PROMPT.strip(),
            "seeds": list(config.seeds),
            "steps": config.steps,
            "figures": figures,
            "commands": [shlex.join(line).replace(f"{ROOT}/", "") for line, _ in commands(0, config.steps)],
            "machine": describe_machine(),
            "run": describe_run(),
        },
    )
    for name, each in figures["after"].items():
        before, gain = figures["before"][name], figures["gain"][name]
        print(
            f"{name:14} {before['mean']:7.3f} -> {each['mean']:7.3f}   gain {gain['mean']:+.3f} "
            f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
        )
    print("faults of samples", figures["faults of samples"])


def commands(seed: int, steps: int) -> list[tuple[list[str], str]]:
    """Returns the commands of a world, and what each makes."""
    lines = [
        (f"recllm data toyworld --users 60 --items 120 --seed {seed} toys", "toys"),
        (
            f"accelerate launch --config_file {recipe_path('launch/cpu.yaml')} {recipe_path('grpo.py')} "
            f"--config {recipe_path('configs/tiny/keywords.yaml')} --dataset toys --out runs/keywords "
            f"--templates templates --prompts image --rewards agreement length form=0.5 distinctness=0.5 "
            f"--valid-items 32 --max-steps {steps} --valid-every {max(1, steps // 4)} "
            f"--learning-rate 1e-3 --seed {seed} --resume auto",
            "runs/keywords/metrics.json",
        ),
    ]
    return [(shlex.split(line), makes) for line, makes in lines]


def named(answers: Sequence[Mapping[str, Any]], looks: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """Returns the shares of answers that name the item's color, pattern and shape, and all three; and the
    share of their keywords that name none of the three."""
    shares: dict[str, list[float]] = {name: [] for name in (*LOOKS, "all three", "besides")}
    for answer in answers:
        look = looks[answer["item"]]
        words = {word for keyword in answer["keywords"] for word in keyword.casefold().split()}
        right = [look[name] in words for name in LOOKS]
        for name, value in zip(LOOKS, right, strict=True):
            shares[name].append(value)
        shares["all three"].append(all(right))
        wanted = {look[name] for name in LOOKS}
        besides = [not wanted & set(keyword.casefold().split()) for keyword in answer["keywords"]]
        shares["besides"].append(float(np.mean(besides)) if besides else 0.0)
    return {f"names {name}": float(np.mean(values)) for name, values in shares.items()}


def call(command: list[str], folder: Path) -> None:
    modules = {"recllm": "recllm.cli", "accelerate": "accelerate.commands.accelerate_cli"}
    print(f"{folder}$ {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", modules[command[0]], *command[1:]], cwd=folder, check=True)


def summary(values: list[float]) -> dict[str, float | list[float]]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 5), "sd": round(sd, 5), "per_seed": values}


def paired(before: list[float], after: list[float]) -> dict[str, float]:
    """Returns the mean difference over worlds with its 95 % interval (Student's t)."""
    from scipy.stats import t

    gaps = np.subtract(after, before)
    half = 0.0
    if len(gaps) > 1:
        half = float(t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps)))
    mean = float(gaps.mean())
    return {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}


if __name__ == "__main__":
    run_command(Config, main)
