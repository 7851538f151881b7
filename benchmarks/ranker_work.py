"""Work of rankers that was done for nothing: before and after, each measured in a process of its own.

    python benchmarks/ranker_work.py BEFORE
    python benchmarks/ranker_work.py BEFORE --smoke      small sizes, nothing written

BEFORE is a checkout of an earlier version (`git worktree add BEFORE <commit>`); after is this one. Each runs
the same code of this script, alternately, three times; the table has medians.

batch      what a step waits for the next batch of 16,384 rows (50 items, one negative each) over 8 processes,
           where a step takes 60 ms: each process made the whole batch, between the steps
ce         cross-entropy over the catalog under no_grad: it computed gradients
make       making FREEDOM again, as each scoring does: it looked for all nearest items again
lattice    an epoch's begin and validation of LATTICE: it looked for nearest items in both
refusal    until HM4SR refuses a dataset without times: it embedded the texts of all items first

Writes results/ranker_work.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SMOKE = "--smoke" in sys.argv
ROWS, PROCESSES, STEP = (1024, 8, 0.01) if SMOKE else (16_384, 8, 0.06)
ITEMS = 1_000 if SMOKE else 10_000
TEXTS = 20 if SMOKE else 200
ROUNDS = 1 if SMOKE else 3


def batch() -> float:
    """Seconds that a step waits for its batch; the median of five."""
    from recllm.rankers.batches import Epochs

    epochs = Epochs(data(ROWS * 6), "positions", batch_size=ROWS, negatives=1, part=(0, PROCESSES))
    running, waits = epochs.epoch(0), []
    next(running)
    for _ in range(5):
        time.sleep(STEP)  # a step on an accelerator
        started = time.perf_counter()
        next(running)
        waits.append(time.perf_counter() - started)
    return statistics.median(waits)


def ce() -> float:
    """Seconds of the loss of 2,048 states."""
    from recllm.rankers.criteria import blocked_cross_entropy

    random = torch.Generator().manual_seed(0)
    states, items = torch.randn(2048, 64, generator=random), torch.randn(ITEMS, 64, generator=random)
    states.requires_grad_(), items.requires_grad_()
    targets = torch.randint(ITEMS, (2048,), generator=random)
    with torch.no_grad():
        blocked_cross_entropy(states, items, targets)
        started = time.perf_counter()
        blocked_cross_entropy(states, items, targets)
    return time.perf_counter() - started


def make() -> float:
    """Seconds of making FREEDOM a second time."""
    from recllm.rankers.models.freedom import FREEDOM

    with tempfile.TemporaryDirectory() as folder:
        known = data(100, features=Path(folder))
        FREEDOM(known)
        started = time.perf_counter()
        FREEDOM(known)
        return time.perf_counter() - started


def lattice() -> float:
    """Seconds of what an epoch's begin and its validation cost beside the steps, in the second epoch."""
    from recllm.rankers.models.lattice import LATTICE

    with tempfile.TemporaryDirectory() as folder:
        model = LATTICE(data(100, features=Path(folder)))
    seconds = 0.0
    for number in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3  # a step
            started = time.perf_counter()
            model.eval().vectors()
            model.train().begin_epoch(np.random.default_rng(number))
        seconds = time.perf_counter() - started
    return seconds


def refusal() -> float:
    """Seconds until the recipe's first function raises."""
    import polars as pl

    from recllm.data.dataset import write_dataset
    from recllm.data.splits import SplitOptions, make_split
    from recllm.errors import DataError
    from recllm.rankers.options import options_class
    from recllm.rankers.run_folder import make_ranker, open_run

    with tempfile.TemporaryDirectory() as folder:
        ids = [f"i{item}" for item in range(TEXTS)]
        log = pl.DataFrame({"user": [f"u{n // 5}" for n in range(TEXTS)], "item": ids})
        items = pl.DataFrame({"item": ids, "title": [f"thing {item} " * 30 for item in ids]})
        dataset = write_dataset(
            Path(folder) / "data",
            items=items,
            interactions=log,
            users=log.select("user").unique(),
            source={},
        )
        split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
        image = Path(folder) / "image.npy"
        np.save(image, np.ones((TEXTS, 8), np.float32))
        image.with_suffix(".items.txt").write_text("\n".join(ids) + "\n")
        options = options_class("hm4sr")(ranker="hm4sr", split=split.folder, image=str(image))
        options.out = Path(folder) / "run"
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                make_ranker(options, open_run(options).data)
        except DataError:
            return time.perf_counter() - started
    raise AssertionError("data without times were taken")


def data(users: int, features: Path | None = None) -> Any:
    """Returns users with 51 items each of `ITEMS`, and texts and images of these."""
    from recllm.rankers.features import Features
    from recllm.rankers.training_data import Histories, TrainingData

    random = np.random.default_rng(0)
    items = random.integers(1, ITEMS + 1, users * 51)
    known = {}
    if features is not None:
        cache = {"cache": features} if "cache" in Features.__dataclass_fields__ else {}
        present = np.ones(ITEMS, bool)
        for name in ("text", "image"):
            vectors = random.standard_normal((ITEMS, 384)).astype(np.float32)
            known[name] = Features(vectors, present, "drawn", **cache)
    return TrainingData(users, ITEMS, Histories(np.arange(users), np.arange(users + 1) * 51, items), known)


MEASURES = {each.__name__: each for each in (batch, ce, make, lattice, refusal)}


def measured(tree: Path, name: str) -> float:
    """Returns the seconds of one measure in another process, with the library of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    flags = ["--smoke"] if SMOKE else []
    command = [sys.executable, __file__, "--measure", name, *flags]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def vector_instructions() -> list[str]:
    """Returns the CPU's vector instructions that matter here, as Linux names them."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return sorted(set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16)\b", flags)))


def main() -> None:
    from recllm.files import write_json
    from recllm.runs.provenance import describe_machine, describe_run

    trees = {"before": Path(sys.argv[1]).resolve(), "after": ROOT}
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for name in MEASURES:
            for tree, folder in trees.items():
                seconds.setdefault(name, {}).setdefault(tree, []).append(measured(folder, name))
    figures = {
        name: {tree: round(statistics.median(times), 5) for tree, times in each.items()}
        for name, each in seconds.items()
    }
    for name, each in figures.items():
        print(f"{name:9} {each['before'] * 1e3:10.1f} ms before {each['after'] * 1e3:10.1f} ms after")
    if SMOKE:
        return
    content = {
        "what": "work of rankers that was done for nothing, in seconds; medians of rounds in turn",
        "sizes": {"rows": ROWS, "processes": PROCESSES, "step": STEP, "items": ITEMS, "texts": TEXTS},
        "rounds": ROUNDS,
        "figures": figures,
        "machine": describe_machine(),
        "vector_instructions": vector_instructions(),
        "threads": torch.get_num_threads(),
        "run": {**describe_run(), "command": ["ranker_work.py", "BEFORE"]},
    }
    write_json(ROOT / "results" / "ranker_work.json", content)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(MEASURES[sys.argv[sys.argv.index("--measure") + 1]]()))
    else:
        main()
