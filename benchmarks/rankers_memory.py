"""Peak memory of training with cross-entropy over the whole catalog, from 10 thousand to 1 million items.

    python benchmarks/rankers_memory.py
    python benchmarks/rankers_memory.py --smoke      two small sizes, nothing written

A step of SASRec (d 64, 2 layers) as `fit` makes it: 256 sequences with six targets each, as on Beauty, loss,
backward pass, Adam. `blocked` is recllm's criterion, which holds 2^20 scores at a time; `plain` is
`torch.nn.functional.cross_entropy` on all scores, where these take less than 8 GB with what torch makes of
them. Memory is the peak of the resident set over three steps, above what there is before the model, less
parameters, gradients and Adam's moments. Each size runs in a process of its own; both must have equal losses.

Writes results/rankers_memory.json, and results/rankers_memory.svg, a plot of the memory.
"""

import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from recllm.files import write_json
from recllm.rankers.batches import Epochs
from recllm.rankers.criteria import BLOCK, Criterion
from recllm.rankers.models.sasrec import SASRec
from recllm.rankers.training_data import Histories, TrainingData
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "rankers_memory.json"
PLOT = RESULTS.with_suffix(".svg")
SMOKE = "--smoke" in sys.argv
SIZES = (4_000, 16_000) if SMOKE else (10_000, 30_000, 100_000, 300_000, 1_000_000)
BATCH, TARGETS, STEPS = 256, 6, 3
LIMIT = 8e9
COPIES = 3  # of the scores: themselves, their log-softmax, its gradient


def plain(states, items, targets, negatives=None, score=None):
    return F.cross_entropy(states @ items.T, targets)


LOSSES = {"blocked": Criterion("ce"), "plain": plain}


def train(items: int, loss: str, pipe) -> None:
    """Trains three steps on a catalog, and sends memory, seconds and losses."""
    run_steps(make_data(300), loss)  # imports and threads
    data = make_data(items)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    kept, seconds, losses = run_steps(data, loss)
    peak = resident("VmHWM") - before
    pipe.send(
        {"above_mib": (peak - kept) / 2**20, "kept_mib": kept / 2**20, "seconds": seconds, "losses": losses}
    )


def make_data(items: int) -> TrainingData:
    random = np.random.default_rng(0)
    users = BATCH * STEPS
    offsets = np.arange(users + 1) * (TARGETS + 1)
    sequences = random.integers(1, items + 1, offsets[-1])
    return TrainingData(users, items, Histories(np.arange(users), offsets, sequences))


def run_steps(data: TrainingData, loss: str) -> tuple[int, float, list[float]]:
    """Returns the bytes of parameters, gradients and moments, the seconds of a step, and the losses."""
    torch.manual_seed(0)
    model = SASRec(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    epochs = Epochs(data, model.examples, batch_size=BATCH)
    seconds, losses = [], []
    for batch, _ in epochs.epoch(0):
        started = time.perf_counter()
        found = model.loss(batch, LOSSES[loss])
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        losses.append(found.item())
    parameters = sum(each.numel() * each.element_size() for each in model.parameters())
    return 4 * parameters, statistics.median(seconds), losses


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measure(items: int, loss: str) -> dict:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=train, args=(items, loss, theirs), daemon=True).start()
    theirs.close()  # a contender that fails then ends the benchmark
    found = pipe.recv()
    print(f"{items:9,} items, {loss:8} {found['above_mib']:8.0f} MiB above", end=" ")
    print(f"{found['kept_mib']:6.0f}, {found['seconds']:7.2f} s a step", flush=True)
    return found


def plot(lines: list[dict]) -> None:
    """Draws memory over the size of the catalog."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for loss, marker in (("plain", "s-"), ("blocked", "o-")):
        drawn = [(line["items"], line[loss]["above_mib"]) for line in lines if line[loss]]
        axes.plot(*zip(*drawn, strict=True), marker, label=f"{loss} cross-entropy")
    kept = [line["blocked"]["kept_mib"] for line in lines]
    axes.plot([line["items"] for line in lines], kept, ":", color="gray", label="parameters, gradients, Adam")
    axes.set(xscale="log", yscale="log", xlabel="items of the catalog", ylabel="MiB")
    axes.set_title(f"Peak memory of a step with {BATCH * TARGETS:,} targets", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    lines = []
    for items in SIZES:
        line = {"items": items, "blocked": measure(items, "blocked"), "plain": None}
        if COPIES * BATCH * TARGETS * items * 4 <= LIMIT:
            line["plain"] = measure(items, "plain")
            np.testing.assert_allclose(line["plain"]["losses"], line["blocked"]["losses"], rtol=1e-4)
        lines.append(line)
    if SMOKE:
        return
    content = {
        "benchmark": "rankers_memory",
        "machine": describe_machine(),
        "run": describe_run(),
        "setting": {"width": 64, "layers": 2, "batch": BATCH, "targets": BATCH * TARGETS, "block": BLOCK},
        "block_mib": BLOCK * 4 / 2**20,
        "figures": lines,
    }
    write_json(RESULTS, content)
    plot(lines)


if __name__ == "__main__":
    main()
