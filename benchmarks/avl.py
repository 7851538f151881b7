"""What an epoch with AVL (REVEAL) costs beside a plain one, on the four backbones of its tables.

    python benchmarks/avl.py
    python benchmarks/avl.py --smoke      one round, nothing written

The toy world's log with vectors of 384 (texts) and 512 numbers (images), which are drawn: the cost does not
depend on them. Each backbone has the sizes and batches of its recipe. A round is an epoch without AVL and one
with it, in turn in one process; `ratio` is the median over the rounds of the second over the first. All forms
cost the same: two passes without gradients. Seconds are those of the CPU, on one thread, so that other work
on the machine counts little. Validation is no part of an epoch; finding MISSRec's interests is. The first
round warms up and does not count.

Writes results/avl.json.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recllm.config import parse_config, run_command
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.data.toyworld import generate
from recllm.files import write_json
from recllm.rankers import ranker_class
from recllm.rankers.features import Features
from recllm.rankers.fit import fit, seed_weights
from recllm.rankers.options import TrainRankerOptions, options_class
from recllm.rankers.plugins import Plugin
from recllm.rankers.training_data import TrainingData
from recllm.reveal.avl import AVL
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
BACKBONES = ("missrec", "m3srec", "stosa_m3", "hm4sr")
WIDTHS = {"text": 384, "image": 512}


@dataclass
class Config:
    """Measures the cost of AVL."""

    users: int = 40
    """Users of the toy world."""
    items: int = 80
    """Items of the toy world."""
    rounds: int = 3
    """Rounds that count."""
    smoke: bool = False
    """One round; nothing is written."""


def features(items: int) -> dict[str, Features]:
    """Draws vectors of all items."""
    random, present = np.random.default_rng(0), np.ones(items, bool)
    return {
        name: Features(random.standard_normal((items, width), dtype=np.float32), present, "drawn")
        for name, width in WIDTHS.items()
    }


def recipe(ranker: str) -> TrainRankerOptions:
    """Returns the options of a backbone's recipe, for one epoch and little validation."""
    path = ROOT / "recipes" / "configs" / "rankers" / f"{ranker}.yaml"
    options = parse_config(options_class(ranker), ["--config", str(path)])
    return replace(options, epochs=1, valid_users=1)


class Timed(Plugin):
    """Takes the CPU seconds from before the first step to the end of the epoch."""

    seconds = 0.0

    def begin(self, *given: Any) -> None:
        """Starts the clock."""
        super().begin(*given)
        self._started = time.process_time()

    def numbers(self) -> dict[str, float]:
        """Stops the clock."""
        self.seconds = time.process_time() - self._started
        return super().numbers()


class TimedAVL(Timed, AVL):
    """AVL with a clock."""


def epoch(options: TrainRankerOptions, data: TrainingData, split: Split, plugin: Timed) -> float:
    """Trains an epoch from the initial weights, and returns its CPU seconds."""
    seed_weights(options.seed)
    ranker = ranker_class(options.ranker)(data, options.config())
    with contextlib.redirect_stdout(io.StringIO()):
        fit(ranker, data, split, options, plugin=plugin)
    return plugin.seconds


def measure(ranker: str, data: TrainingData, split: Split, rounds: int) -> dict[str, float]:
    """Returns the median seconds of both epochs, and the median of their ratio."""
    options, plain, with_avl = recipe(ranker), [], []
    for number in range(rounds + 1):
        pair = epoch(options, data, split, Timed()), epoch(options, data, split, TimedAVL())
        if number:
            plain.append(pair[0])
            with_avl.append(pair[1])
    figures = {
        "plain": round(statistics.median(plain), 3),
        "avl": round(statistics.median(with_avl), 3),
        "ratio": round(statistics.median(two / one for one, two in zip(plain, with_avl, strict=True)), 2),
    }
    print(f"{ranker:9} {figures}", flush=True)
    return figures


def main(config: Config) -> None:
    """Measures each backbone."""
    if config.smoke:
        config = replace(config, rounds=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = generate(config.users, config.items, 0).write(Path(folder) / "world")
        split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
        data = TrainingData.of(split, features(config.items))
        figures = {ranker: measure(ranker, data, split, config.rounds) for ranker in BACKBONES}
    if config.smoke:
        return
    content = {
        "what": "CPU seconds of a training epoch, plain and with AVL; medians of rounds in one process",
        "sizes": {
            "users": config.users,
            "items": config.items,
            "interactions": len(data.train.items),
            **{f"{name}_width": width for name, width in WIDTHS.items()},
        },
        "rounds": config.rounds,
        "figures": figures,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "run": describe_run(),
    }
    write_json(ROOT / "results" / "avl.json", content)


if __name__ == "__main__":
    run_command(Config, main)
