"""The graph of nearest items, 384 dims, k = 10: peak memory as the catalog grows, and time beside LATTICE's
dense way.

    python benchmarks/rankers_graph.py
    python benchmarks/rankers_graph.py --smoke      small sizes, nothing written

From vectors to the normalized graph: `nearest_neighbors`, the sparse matrix, D^-1/2 A D^-1/2. The dense way
is written here in the manner of LATTICE, not taken from it: the cosines of all pairs, topk, a dense matrix
with the k of each row, and two products with diagonal matrices. At 10,000 items both run in turn, each in a
process of its own, and must give the same graph; figures are medians. Memory is the peak of the resident set
above what there is with the vectors.
"""

import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from recllm.files import write_json
from recllm.graphs.knn import nearest_neighbors
from recllm.graphs.propagation import symmetric_normalized
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "rankers_graph.json"
SMOKE = "--smoke" in sys.argv
DIMS, K, ROUNDS = 384, 10, 1 if SMOKE else 5
PAIRED = 2_000 if SMOKE else 10_000
SIZES = (2_000, 4_000) if SMOKE else (8_000, 16_000, 32_000, 63_000)
CLUSTERS = 500  # a catalog has many items that are alike


def vectors_of(items: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    centers = torch.randn(CLUSTERS, DIMS, generator=random)
    own = torch.randint(CLUSTERS, (items,), generator=random)
    return centers[own].add_(torch.randn(items, DIMS, generator=random))


# ------------------------------------------------------------------------------------------- the contenders


def ours(vectors: Tensor):
    present = torch.ones(len(vectors), dtype=torch.bool)
    return symmetric_normalized(nearest_neighbors(vectors, present, K).matrix())


def dense(vectors: Tensor) -> Tensor:
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    similar = unit @ unit.T
    values, columns = similar.topk(K, dim=1)
    adjacency = torch.zeros_like(similar).scatter_(1, columns, values)
    scale = torch.diag(adjacency.sum(1).pow(-0.5))
    return scale @ adjacency @ scale


CONTENDERS = {"recllm": ours, "dense": dense}


# ---------------------------------------------------------------------------------------------- the measure


def serve(name: str, items: int, pipe) -> None:
    """Builds the graph once for every message, and sends time, peak memory and a sample of the graph."""
    vectors = vectors_of(items)
    CONTENDERS[name](vectors[:200])  # imports and threads
    while pipe.recv():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
        started = time.perf_counter()
        graph = CONTENDERS[name](vectors)
        seconds = time.perf_counter() - started
        peak = (resident("VmHWM") - before) / 2**20
        rows = graph[:50].todense() if name == "recllm" else graph[:50].numpy()
        pipe.send((seconds, peak, rows))
        del graph


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def start(name: str, items: int):
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=serve, args=(name, items, theirs), daemon=True).start()
    theirs.close()  # a contender that fails then ends the benchmark
    return pipe


def ask(pipe) -> tuple:
    pipe.send(True)
    return pipe.recv()


def main() -> None:
    pipes = {name: start(name, PAIRED) for name in CONTENDERS}
    rounds = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            time.sleep(0.5)  # the threads of the contender before spin on for a while
            rounds[name].append(ask(pipe))
    for pipe in pipes.values():
        pipe.send(False)
    graphs = [torch.from_numpy(runs[0][2]).float() for runs in rounds.values()]
    torch.testing.assert_close(*graphs, atol=1e-5, rtol=0)
    figures = {
        name: {"seconds": statistics.median(run[0] for run in runs), "peak_mib": runs[0][1]}
        for name, runs in rounds.items()
    }
    paired = zip(rounds["dense"], rounds["recllm"], strict=True)
    ratio = statistics.median(theirs[0] / own[0] for theirs, own in paired)
    for name, figure in figures.items():
        print(f"{PAIRED:,} items, {name:7} {figure['seconds']:8.2f} s {figure['peak_mib']:8.0f} MiB")
    print(f"dense / recllm: {ratio:.1f}x")
    growth = []
    for items in SIZES:
        pipe = start("recllm", items)
        seconds, peak, _ = ask(pipe)
        pipe.send(False)
        growth.append({"items": items, "seconds": seconds, "peak_mib": peak})
        growth[-1]["vectors_mib"] = items * DIMS * 4 / 2**20
        print(f"{items:,} items, recllm  {seconds:8.2f} s {peak:8.0f} MiB", flush=True)
    if SMOKE:
        return
    content = {
        "benchmark": "rankers_graph",
        "machine": describe_machine(),
        "run": describe_run(),
        "setting": {"dims": DIMS, "k": K, "rounds": ROUNDS, "items": PAIRED},
        "figures": figures,
        "ratio": ratio,
        "growth": growth,
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
