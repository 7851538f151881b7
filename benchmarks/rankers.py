"""SASRec, BERT4Rec and LightGCN on Beauty against RecBole 1.2.1, epoch by epoch in turn in one run.

    python benchmarks/rankers.py DATA WORK --make-env     also makes RecBole's environment in WORK/recbole-env
    python benchmarks/rankers.py DATA WORK --models sasrec --minutes 60

DATA holds `amazon-beauty-sequences`. recllm trains by its recipes with `fit`, RecBole with its own trainer,
learning rate, batches (2,048 prefixes or pairs) and loss (`benchmarks/recbole_run.py`), in an environment
with the same torch. Both have the sizes and dropout of recllm's recipe, the same log, the same parts (checked
target by target), the same threads, and NDCG@10 over the whole catalog on the same validation lists with
training items masked. RecBole does not mask them for its sequential models; its own figure is kept as
`own_ndcg@10`. An epoch is each training target once, for RecBole's BERT4Rec each prefix once.

Every round is one epoch of RecBole and some of recllm, each contender in a process of its own, so that other
load on the machine hits both. RecBole ends after ten validations without a gain, or after --minutes of
training (`ended` says which); recllm when its recipe stops it, or when RecBole has ended and it is as good.
`seconds_to_best` is RecBole's training time until its best validation, `our_seconds_to_it` recllm's until it
is as good. Validation is no part of any time. Stopped and started again, the benchmark goes on where it was.

    python benchmarks/rankers.py DATA WORK --smoke --epochs 1       300 users, nothing written
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from recbole_side import RECBOLE, check_parts, make_environment, recbole_settings, start, write_log
from tyro.conf import Positional, arg

from recllm.config import parse_config, run_command
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.files import read_json, write_file, write_json
from recllm.rankers import ranker_class
from recllm.rankers.fit import LOG, fit, seed_weights
from recllm.rankers.options import TrainRankerOptions, options_class
from recllm.rankers.training_data import TrainingData
from recllm.runs.log import read_log
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "rankers.json"
METRIC = "ndcg@10"
PATIENCE = 10  # RecBole's `stopping_step`
EPOCHS_A_ROUND = {"sasrec": 6, "bert4rec": 12, "lightgcn": 3}
"""Of recllm, for one of RecBole: about a quarter of its time, as far as that was known beforehand."""


@dataclass
class Config:
    """Compares training with RecBole's."""

    data: Positional[Annotated[Path, arg(metavar="DATA")]]
    """The folder of the raw data."""
    work: Positional[Annotated[Path, arg(metavar="WORK")]]
    """The folder to work in."""
    models: tuple[Literal["sasrec", "bert4rec", "lightgcn"], ...] = ("sasrec", "bert4rec", "lightgcn")
    """Which models."""
    minutes: float = 60
    """RecBole's training time for each model at most."""
    epochs: int = 1000
    """RecBole's epochs at most."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads of each contender."""
    make_env: bool = False
    """Make RecBole's environment in WORK where there is none; it takes minutes and 5 GB."""
    smoke: bool = False
    """300 users, nothing written to results."""


# -------------------------------------------------------------------------------------- what both are given


def open_split(config: Config) -> Split:
    """Imports and splits the log, as far as that has not been done."""
    folder = config.work / ("smoke" if config.smoke else "beauty")
    source = config.data.resolve() / "amazon-beauty-sequences"
    if config.smoke:
        source = config.work.resolve() / "smoke-raw" / "sequences.txt"
        lines = (config.data / "amazon-beauty-sequences" / "sequences.txt").read_text().splitlines()[:300]
        write_file(source, lambda path: path.write_text("\n".join(lines) + "\n"))
    if not (folder / "splits" / "loo").exists():
        for command in (["import", "sequences", str(source), str(folder)], ["split", str(folder), "loo"]):
            subprocess.run([sys.executable, "-m", "recllm.cli", "data", *command], check=True)
    return Split.open(folder / "splits" / "loo")


def recipe(model: str) -> TrainRankerOptions:
    """Returns the options of a model's recipe."""
    path = ROOT / "recipes" / "configs" / "rankers" / f"{model}.yaml"
    return parse_config(options_class(model), ["--config", str(path)])


# ------------------------------------------------------------------------------------------- the contenders


@contextlib.contextmanager
def ours(model: str, split: Path, run: Path, threads: int) -> Iterator[Connection]:
    """Starts recllm's run."""
    context = multiprocessing.get_context("spawn")
    pipe, remote = context.Pipe()
    process = context.Process(target=serve, args=(model, split, run, threads, remote))
    process.start()
    remote.close()
    try:
        yield pipe
    finally:
        pipe.close()
        process.join()


def serve(model: str, split: Path, run: Path, threads: int, pipe: Connection) -> None:
    """Trains as many epochs as each message says, and sends their lines; fewer where the recipe stops it."""
    import torch

    torch.set_num_threads(threads)
    options, opened = recipe(model), Split.open(split)
    data = TrainingData.of(opened)
    seed_weights(options.seed)
    ranker = ranker_class(model)(data, options.config())
    run.mkdir(parents=True, exist_ok=True)
    done = read_log(run / LOG)
    pipe.send({"parameters": sum(each.numel() for each in ranker.parameters()), "lines": done})
    while True:
        try:
            epochs = len(done) + pipe.recv()
        except (EOFError, ConnectionError):
            return
        with contextlib.redirect_stdout(io.StringIO()):
            log = fit(ranker, data, opened, replace(options, epochs=epochs), run, resume=True).log
        pipe.send(log[len(done) :])
        done = log


# ---------------------------------------------------------------------------------------------- the measure


def measure(config: Config, model: str, split: Split) -> dict[str, Any]:
    """Trains both in turn, and returns the figures."""
    place = config.work / "recbole" / split.dataset.folder.name
    log = place / f"{place.name}.inter"
    write_log(split, log)
    options, settings = recipe(model), place / f"{model}.json"
    told = {
        **recbole_settings(options, log, split, config.threads),
        "recllm": {name: value for name, value in options.as_json().items() if value is not None},
    }
    if settings.exists() and read_json(settings, "settings") != told:
        raise DataError(f"{settings}: begun with other settings; give another WORK, or remove {place}")
    write_json(settings, told)
    python, run = config.work / "recbole-env" / "bin" / "python", place / f"{model}-recllm"
    with (
        start(python.absolute(), settings.absolute()) as recbole,
        ours(model, split.folder, run, config.threads) as recllm,
    ):
        abouts = {"recbole": answer(recbole), "recllm": answer(recllm)}
        check_parts(split, model, abouts["recbole"])
        other, own = (about.pop("lines") for about in abouts.values())
        del abouts["recbole"]["targets"]
        going = True
        while True:
            ended = why_ended(other, config)
            wanted = EPOCHS_A_ROUND[model] * len(other) - len(own)
            if ended and first_as_good(own, best(other)) is None:
                wanted = max(wanted, EPOCHS_A_ROUND[model])
            time.sleep(0.5)  # the threads of the contender before spin on for a while
            if going and wanted > 0:
                new = ask(recllm, wanted)
                going = len(new) == wanted
                own += new
            elif not ended:
                other.append(ask(recbole, True))
            else:
                break
            print(f"{model}: {tell('RecBole', other)}; {tell('recllm', own)}", flush=True)
    figures = compare(other, own, EPOCHS_A_ROUND[model])
    return {"ended": ended, "about": abouts, "settings": told, **figures}


def ask(pipe: Connection, what: Any) -> Any:
    pipe.send(what)
    return answer(pipe)


def answer(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit("a contender ended; what it said stands above") from None


def why_ended(lines: list[dict[str, Any]], config: Config) -> str | None:
    """Returns why RecBole trains no more; None where it goes on."""
    if lines and len(lines) - first_as_good(lines, best(lines)) >= PATIENCE:
        return f"{PATIENCE} validations without a gain"
    if len(lines) >= config.epochs:
        return f"{len(lines)} epochs"
    if sum(line["seconds"] for line in lines) >= config.minutes * 60:
        return f"{config.minutes:g} minutes of training"
    return None


def validated(line: dict[str, Any]) -> float:
    """The NDCG@10 of an epoch of either."""
    return line[METRIC] if METRIC in line else line[f"valid_{METRIC}"]


def best(lines: list[dict[str, Any]]) -> float:
    return max(validated(line) for line in lines)


def first_as_good(lines: list[dict[str, Any]], value: float) -> int | None:
    """Returns the first epoch, from 1, whose validation reached a value; None where none did."""
    return next((number for number, line in enumerate(lines, 1) if validated(line) >= value), None)


def compare(other: list[dict[str, Any]], own: list[dict[str, Any]], epochs_a_round: int) -> dict[str, Any]:
    """Returns times per epoch and times to equal validation, from RecBole's epochs and recllm's.

    `epoch_ratio` is the median over the rounds, `time_ratio` RecBole's time to its best over recllm's to it.
    """
    figures, seconds = {}, {}
    for name, lines in (("recbole", other), ("recllm", own)):
        seconds[name] = np.cumsum([line["seconds"] for line in lines])
        figures[name] = {
            "seconds_an_epoch": statistics.median(line["seconds"] for line in lines),
            "epochs": len(lines),
            "seconds": float(seconds[name][-1]),
            f"best_{METRIC}": best(lines),
            "best_epoch": first_as_good(lines, best(lines)),
            "curve": [
                [round(float(at), 2), round(validated(line), 5)]
                for at, line in zip(seconds[name], lines, strict=True)
            ],
        }
    if "own_ndcg@10" in other[0]:
        figures["recbole"]["best_own_ndcg@10"] = max(line["own_ndcg@10"] for line in other)
    ratios = []
    for number, line in enumerate(other):
        paired = own[number * epochs_a_round : (number + 1) * epochs_a_round]
        if len(paired) == epochs_a_round:
            ratios.append(line["seconds"] / statistics.mean(each["seconds"] for each in paired))
    to_best = float(seconds["recbole"][first_as_good(other, best(other)) - 1])
    reached = first_as_good(own, best(other))
    ours_to_it = None if reached is None else float(seconds["recllm"][reached - 1])
    return {
        **figures,
        "epoch_ratio": statistics.median(ratios),
        "rounds": len(ratios),
        "seconds_to_best": to_best,
        "our_seconds_to_it": ours_to_it,
        "time_ratio": None if ours_to_it is None else to_best / ours_to_it,
    }


def tell(name: str, lines: list[dict[str, Any]]) -> str:
    if not lines:
        return f"{name} 0 epochs"
    return f"{name} {len(lines)} epochs, the latest {lines[-1]['seconds']:.1f} s, best {best(lines):.4f}"


def main(config: Config) -> None:
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    environment = config.work / "recbole-env"
    if not (environment / "made").exists():
        if not config.make_env:
            raise DataError(f"{environment}: no environment with RecBole; --make-env makes it")
        make_environment(environment)
    split = open_split(config)
    command = ["rankers.py", "DATA", "WORK", "--minutes", f"{config.minutes:g}"]
    content = {
        "benchmark": "rankers",
        "machine": describe_machine(),
        "run": {**describe_run(), "command": command},
        "setting": {"threads": config.threads, "minutes": config.minutes, "recbole": RECBOLE},
        "protocol": f"{split.protocol}/full/mask-seen/valid",
        "figures": {},
    }
    for model in config.models:
        figures = content["figures"][model] = measure(config, model, split)
        print(f"{model}: epoch {figures['epoch_ratio']:.1f}x, time to equal validation", end=" ")
        print(f"{figures['time_ratio'] or float('nan'):.1f}x; RecBole ended after {figures['ended']}")
        if not config.smoke:
            write_json(RESULTS, content)


if __name__ == "__main__":
    run_command(Config, main)
