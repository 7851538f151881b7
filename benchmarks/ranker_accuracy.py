"""Trains rankers on real data by their recipes, and keeps what they reach.

    python benchmarks/ranker_accuracy.py DATA WORK --world beauty --seeds 1 2 3
    python benchmarks/ranker_accuracy.py DATA WORK --world movielens --rankers sasrec hm4sr --seeds 1

DATA is the folder of the raw data (`amazon-beauty-sequences`, `amazon-baby-interactions`,
`ml-latest-small-posters`). Every run is `recipes/train_ranker.py` with its YAML; the epoch is chosen on
validation lists. All runs and rank records stay in WORK; what is there is not made again, and a run that was
interrupted goes on. Beauty: leave-one-out, seen items masked and not; LightGCN also over a
graph with the validation interactions (`--graph known`). Baby: the 8:1:1 parts that the data came with,
training items masked. MovieLens: leave-one-out, 1+20 candidates and the whole catalog.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from recllm.config import run_command
from recllm.data.candidate_files import Candidates
from recllm.data.candidates import Mask
from recllm.evaluation.inputs import read_system
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.significance import bootstrap_means
from recllm.files import read_json, write_json
from recllm.rankers import RANKERS, ranker_class
from recllm.rankers.fit import LOG
from recllm.runs.log import read_log
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
LISTS = "1+20-uniform-seed42"
OF_LISTS = ("auc", "hr@1", "hr@5", "ndcg@5", "hr@10", "ndcg@10")


@dataclass(frozen=True)
class World:
    """How a dataset is made from raw files, and what is trained on it."""

    commands: tuple[str, ...]
    split: str
    masks: tuple[Mask, ...]
    rankers: tuple[str, ...]
    flags: dict[str, tuple[str, ...]]
    """Flags beside a ranker's recipe; under "" those of every ranker that reads texts or images."""
    candidates: bool = False
    also_known_graph: tuple[str, ...] = ()
    """Rankers that also rank with `--graph known`, with the first mask."""
    tuned: dict[str, str] = field(default_factory=dict)
    """Rankers that were tuned on this data's validation lists, and which options; no others were."""
    images: str = ""
    """What the image features of `flags` are."""

    def flags_of(self, ranker: str) -> list[str]:
        """Returns the flags beside a ranker's recipe."""
        shared = self.flags.get("", ()) if ranker_class(ranker).modalities else ()
        return [*shared, *self.flags.get(ranker, ())]

    def ways(self, ranker: str) -> dict[str, tuple[str, ...]]:
        """Returns the flags of each way to rank the whole catalog, by its name."""
        ways: dict[str, tuple[str, ...]] = {mask: ("--mask", mask) for mask in self.masks}
        if ranker in self.also_known_graph:
            ways["known-graph"] = ("--mask", self.masks[0], "--graph", "known")
        return ways


WORLDS = {
    "beauty": World(
        ("data import sequences {data}/amazon-beauty-sequences beauty", "data split beauty loo"),
        "beauty/splits/loo",
        ("seen", "none"),
        ("sasrec", "stosa", "bert4rec", "lightgcn", "unisrec", "gru4rec"),
        # LightGCN: better than 64 on validation lists. UniSRec: the width of the others.
        {"unisrec": ("--width", "64"), "lightgcn": ("--width", "256")},
        also_known_graph=("lightgcn",),
        tuned={"lightgcn": "width, layers, regularization and negatives"},
    ),
    "baby": World(
        ("data import presplit {data}/amazon-baby-interactions baby", "data split baby given"),
        "baby/splits/given",
        ("train",),
        ("bpr", "lightgcn"),
        {},
    ),
    "movielens": World(
        (
            "data import movielens {data}/ml-latest-small-posters ml",
            "data filter ml ml5 --user-core 5 --item-core 5 --require-image",
            "data split ml5 loo",
            "data candidates ml5/splits/loo --negatives 20",
        ),
        "ml5/splits/loo",
        ("seen",),
        tuple(name for name in RANKERS if not ranker_class(name).reads_user_texts),  # an MLLM writes those
        {
            "": ("--image", "tiny", "--max-pixels", "12544"),
            "bpr": ("--regularization", "0.01"),  # best on validation lists, of 0.1 to 0.003
            # 610 users are 2,250 windows: nine steps of 256 an epoch would be too few to stop early by.
            **dict.fromkeys(("sasrec", "bert4rec", "gru4rec", "stosa", "stosa_m3"), ("--batch-size", "32")),
            **dict.fromkeys(("m3srec", "hm4sr"), ("--batch-size", "32")),
            "unisrec": ("--batch-size", "32", "--width", "64"),
            # It learns from each prefix, which are 88,000: an epoch takes minutes, and fewer are waited for.
            "mmsr": ("--patience", "2"),
            "missrec": ("--width", "64"),
            "mmsbr": ("--batch-size", "2048"),  # a step computes the whole catalog, whatever its rows
        },
        candidates=True,
        tuned={
            "bpr": "regularization, from 0.1 to 0.003",
            "smore": "learning rate, which is now its recipe's",
        },
        images="mean visual tokens of the embedded model, which knows the toy world alone",
    ),
}


@dataclass
class Config:
    """Trains rankers on real data."""

    data: Positional[Annotated[Path, arg(metavar="DATA")]]
    """The folder of the raw data."""
    work: Positional[Annotated[Path, arg(metavar="WORK")]]
    """The folder to work in."""
    world: Literal["beauty", "baby", "movielens"] = "beauty"
    """Which data."""
    rankers: tuple[str, ...] = ()
    """Which rankers; by default all that the world is for."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of training."""
    only_collect: bool = False
    """Train nothing; write down what is finished."""


def main(config: Config) -> None:
    world = WORLDS[config.world]
    config.work.mkdir(parents=True, exist_ok=True)
    if not (config.work / world.split).exists():
        for command in world.commands:
            recllm(config.work, *command.format(data=config.data.resolve()).split())
    rankers = config.rankers or world.rankers
    if not config.only_collect:
        for seed in config.seeds:
            for ranker in rankers:
                train(config, world, ranker, seed)
                run = Path("runs") / config.world / f"{ranker}-s{seed}"
                rank(config, world, ranker, run.name, "ranker", str(run))
    rank(config, world, "popularity", "popularity", "popularity", world.split)
    write_json(ROOT / "results" / f"rankers_{config.world}.json", collect(config, world))


def train(config: Config, world: World, ranker: str, seed: int) -> None:
    """Trains one run, as far as that has not been done."""
    run = f"runs/{config.world}/{ranker}-s{seed}"
    recipe = [str(ROOT / "recipes" / "train_ranker.py")]
    recipe += ["--config", str(ROOT / "recipes" / "configs" / "rankers" / f"{ranker}.yaml")]
    recipe += ["--split", world.split, "--out", run, "--seed", str(seed), "--resume", "auto"]
    recipe += world.flags_of(ranker)
    print("$", *recipe, flush=True)
    subprocess.run([sys.executable, *recipe], cwd=config.work, check=True)


def rank(config: Config, world: World, ranker: str, name: str, *score: str) -> None:
    """Ranks and scores with a system where that has not been done; `score` is the command's own words."""
    out = Path("out") / config.world
    for way, how in world.ways(ranker).items():
        if not (config.work / out / way / "ranks" / f"{name}.parquet").exists():
            recllm(config.work, "score", *score, *how, "--out", str(out / way))
    if world.candidates and not (config.work / out / "scores" / f"{name}.parquet").exists():
        recllm(config.work, "score", *score, "--candidates", LISTS, "--out", str(out))


def collect(config: Config, world: World) -> dict[str, Any]:
    """Returns the figures of popularity and of all finished runs in WORK."""
    figures: dict[str, Any] = {"popularity": {"test": over_seeds([tested(config, world, "popularity")])}}
    for ranker in sorted(RANKERS):
        seeds = {}
        for run in sorted((config.work / "runs" / config.world).glob(f"{ranker}-s*")):
            if (test := tested(config, world, ranker, run.name)) is None:
                continue
            metrics = read_json(run / "metrics.json", "a run")
            seconds = [epoch["seconds"] for epoch in read_log(run / LOG)]
            seeds[run.name.rpartition("-s")[2]] = {
                "best_epoch": metrics["best_epoch"],
                "epochs": metrics["epochs"],
                "seconds_an_epoch": round(statistics.median(seconds), 2),
                "valid": {key: round(value, 5) for key, value in metrics["valid"].items()},
                "test": test,
            }
        if seeds:
            mean = over_seeds([seed["test"] for seed in seeds.values()])
            figures[ranker] = {**settings_of(world, ranker), "seeds": seeds, "test": mean}
    split = read_json(config.work / world.split / "manifest.json", "a split")
    return {
        "what": f"rankers on {config.world}, by their recipes; epochs chosen on validation lists",
        "protocol": split["protocol"],
        "counts": split["counts"],
        "figures": figures,
        "machine": describe_machine(),
        "run": {**describe_run(), "command": ["ranker_accuracy.py", "DATA", "WORK", "--world", config.world]},
    }


def settings_of(world: World, ranker: str) -> dict[str, Any]:
    """Returns how a ranker was set: its flags, what of it was tuned, where its image features come from."""
    flags = world.flags_of(ranker)
    settings: dict[str, Any] = {"flags": flags, "tuned": ranker in world.tuned}
    if ranker in world.tuned:
        settings["tuned_options"] = world.tuned[ranker]
    if "--image" in flags:
        settings["images"] = world.images
    return settings


def tested(config: Config, world: World, ranker: str, name: str | None = None) -> dict[str, Any] | None:
    """Returns the metrics of a system's files, by the way it ranked; None where one is missing."""
    out, file = config.work / "out" / config.world, f"{name or ranker}.parquet"
    ranks = {way: out / way / "ranks" / file for way in world.ways(ranker)}
    scores = [out / "scores" / file] if world.candidates else []
    if not all(path.exists() for path in (*ranks.values(), *scores)):
        return None
    found = {way: means(RankRecords.load(path), METRICS) for way, path in ranks.items()}
    if world.candidates:
        lists = Candidates.read(config.work / world.split / "candidates" / LISTS / "test.parquet")
        found[LISTS] = means(read_system(scores[0], lists).records, OF_LISTS)
    return found


def means(records: RankRecords, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the mean of each metric with its bootstrap interval over users."""
    values = compute_metrics(records, names=list(names))
    ends = bootstrap_means(values.per_user().select(names).to_numpy())
    return {
        name: {"mean": round(float(mean), 5), "low": round(float(low), 5), "high": round(float(high), 5)}
        for (name, mean), (low, high) in zip(values.mean().items(), ends, strict=True)
    }


def over_seeds(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns mean and standard deviation over seeds; of one seed its interval over users."""
    found: dict[str, Any] = {}
    for protocol, metrics in tests[0].items():
        found[protocol] = {}
        for name in metrics:
            values = np.array([test[protocol][name]["mean"] for test in tests])
            spread = {"sd": round(float(values.std(ddof=1)), 5)} if len(tests) > 1 else metrics[name]
            found[protocol][name] = {**spread, "mean": round(float(values.mean()), 5), "seeds": len(tests)}
    return found


def recllm(work: Path, *words: str) -> None:
    """Runs a command of recllm in the folder."""
    print("$ recllm", *words, flush=True)
    subprocess.run([sys.executable, "-m", "recllm.cli", *words], cwd=work, check=True)


if __name__ == "__main__":
    run_command(Config, main)
