"""MLLMRec's refined item graph, 384 dims, K_s = K_c = 10: time and peak memory as the catalog grows.

    OMP_NUM_THREADS=2 python benchmarks/graph_refinement.py
    python benchmarks/graph_refinement.py --smoke      small sizes, nothing written

From vectors and interactions to the normalized graph: nearest neighbors, the threshold, Jaccard neighbors by
users, their sum, D^-1/2 S D^-1/2. Vectors are random clusters; 1.6 users an item have 8 interactions each
with items drawn by popularity (Zipf). Each size runs once, in a process of its own. Memory is the peak of the
resident set above what there is with the vectors. CPU seconds are those of all threads: beside other work,
they say more than the clock does.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from recllm.files import write_json
from recllm.graphs.knn import nearest_neighbors
from recllm.graphs.propagation import symmetric_normalized
from recllm.graphs.refinement import audience_graph, refined_graph
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "graph_refinement.json"
SMOKE = "--smoke" in sys.argv
DIMS, K, THRESHOLD, CLUSTERS = 384, 10, 0.4, 500
USERS_AN_ITEM, INTERACTIONS_A_USER = 1.6, 8
SIZES = (2_000, 4_000) if SMOKE else (8_000, 16_000, 32_000, 63_000)


def world(items: int) -> tuple[torch.Tensor, sparse.csr_array]:
    random = torch.Generator().manual_seed(0)
    centers = torch.randn(CLUSTERS, DIMS, generator=random)
    own = torch.randint(CLUSTERS, (items,), generator=random)
    vectors = centers[own].add_(torch.randn(items, DIMS, generator=random))
    users, draws = int(USERS_AN_ITEM * items), np.random.default_rng(0)
    popularity = 1 / (np.arange(items) + 20.0)
    columns = draws.choice(items, users * INTERACTIONS_A_USER, p=popularity / popularity.sum())
    rows = np.repeat(np.arange(users), INTERACTIONS_A_USER)
    pairs = np.unique(rows * items + columns)
    ones = np.ones(len(pairs), np.float32)
    return vectors, sparse.csr_array((ones, (pairs // items, pairs % items)), shape=(users, items))


def measure(items: int, pipe) -> None:
    vectors, interactions = world(items)
    present = torch.ones(items, dtype=torch.bool)
    nearest_neighbors(vectors[:200], present[:200], K)  # imports and threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, figures = resident("VmRSS"), {}
    clock, cpu = time.perf_counter(), time.process_time()

    def lap(name: str) -> None:
        figures[name] = round(time.perf_counter() - clock - sum(figures.values()), 2)

    near = nearest_neighbors(vectors, present, K)
    lap("seconds_neighbors")
    audience = audience_graph(interactions, K)
    lap("seconds_audience")
    graph = symmetric_normalized(refined_graph(near, THRESHOLD, audience))
    lap("seconds_rest")
    figures["seconds"] = round(time.perf_counter() - clock, 2)
    figures["cpu_seconds"] = round(time.process_time() - cpu, 2)
    figures["peak_mib"] = round((resident("VmHWM") - before) / 2**20, 1)
    figures |= {"items": items, "interactions": int(interactions.nnz), "edges": int(graph.nnz)}
    figures["load_of_the_machine"] = round(os.getloadavg()[0], 1)
    pipe.send(figures)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def main() -> None:
    found = []
    for items in SIZES:
        pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(items, theirs))
        process.start()
        theirs.close()  # a process that fails then ends the benchmark
        found.append(pipe.recv())
        process.join()
        print(found[-1], flush=True)
    if SMOKE:
        return
    setting = {"dims": DIMS, "neighbors": K, "audience_neighbors": K, "threshold": THRESHOLD}
    setting |= {"clusters": CLUSTERS, "threads": torch.get_num_threads()}
    content = {"benchmark": "graph_refinement", "machine": describe_machine(), "run": describe_run()}
    write_json(RESULTS, {**content, "setting": setting, "figures": found})


if __name__ == "__main__":
    main()
