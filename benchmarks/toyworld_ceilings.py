"""Measures what each observer of the toy world scores: the ceilings that tests and models are held against.

    python benchmarks/toyworld_ceilings.py --out results/toyworld.json

Default world, leave-one-out, 1+20 uniform negatives; mean and standard deviation over five worlds.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recllm.config import run_command
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.splits import SplitOptions, make_split
from recllm.data.toyworld import OBSERVERS, Parameters, generate, observer_scores
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import rank_candidates
from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run

METRICS = ("auc", "hr@1", "hr@10", "ndcg@10", "mrr")


@dataclass
class Config:
    """Measures the observers of the toy world."""

    out: Path = Path("results/toyworld.json")
    """Where the figures go."""
    users: int = Parameters.users
    """Users of each world."""
    items: int = Parameters.items
    """Items of each world."""
    seeds: int = 5
    """Worlds are made with the seeds 0, 1, ... below this."""


def main(config: Config) -> None:
    # ---- measure: one world a seed ----
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for seed in range(config.seeds):
        with tempfile.TemporaryDirectory() as folder:
            world = generate(config.users, config.items, seed)
            dataset = world.write(Path(folder) / "world")
            split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
            options = CandidateOptions(split.folder)
            candidate_folder = make_candidates(split, options)
            protocol = f"{split.protocol}/{options.name}"
            for part in ("valid", "test"):
                candidates = pl.read_parquet(candidate_folder / f"{part}.parquet")
                for observer in OBSERVERS:
                    scores = observer_scores(world, candidates, observer)
                    means = compute_metrics(rank_candidates(candidates, scores), names=METRICS).mean()
                    into = found.setdefault(part, {}).setdefault(observer, {name: [] for name in METRICS})
                    for name in METRICS:
                        into[name].append(means[name])

    # ---- write and print ----
    figures = {
        part: {
            observer: {name: _summary(values) for name, values in metrics.items()}
            for observer, metrics in observers.items()
        }
        for part, observers in found.items()
    }
    parameters = dataclasses.asdict(Parameters(users=config.users, items=config.items))
    del parameters["seed"]
    write_json(
        config.out,
        {
            "what": "scores of the toy world's observers, mean and standard deviation over worlds",
            "protocol": protocol,
            "parameters": parameters,
            "seeds": list(range(config.seeds)),
            "figures": figures,
            "machine": describe_machine(),
            "run": describe_run(),
        },
    )
    for part, observers in figures.items():
        for observer, metrics in observers.items():
            line = "  ".join(
                f"{name} {value['mean']:.3f} ± {value['sd']:.3f}" for name, value in metrics.items()
            )
            print(f"{part:5}  {observer:11}  {line}")


def _summary(values: list[float]) -> dict[str, float | list[float]]:
    rounded = [round(value, 5) for value in values]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 5), "sd": round(sd, 5), "per_seed": rounded}


if __name__ == "__main__":
    run_command(Config, main)
