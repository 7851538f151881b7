"""Full-catalog evaluation, 22,363 users x 12,101 items x 64 dims: recllm and the usual evaluator, paired in
one run.

    python benchmarks/full_ranking.py

The usual evaluator is written here in the manner of RecBole and MMRec, not taken from them: for each batch of
4,096 users all scores, seen items set to -inf by index, torch.topk(50), then a Python loop over the users
that marks hits, and recall and NDCG from the marks. Its loop asks of each listed item whether it is in the
user's array of positives, as MMRec's does; `usual, sets` is a kinder one, with lists and sets. recllm
computes rank records and the same metrics, exact under ties. Rounds are interleaved, figures are medians,
each contender runs in its own process. Then recllm's peak memory as the users and the items grow; beyond the
embeddings it must stay near one block of scores.
"""

import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "full_ranking.json"
USERS, ITEMS, DIMS, ROUNDS, KS = 22_363, 12_101, 64, 11, (5, 10, 20, 50)
SIZES = ((22_363, 12_101), (89_452, 12_101), (22_363, 48_404), (2_000, 500_000))


def world(users: int, items: int):
    """Embeddings, one positive per user, and about seven seen items per user that are not the positive."""
    rng = np.random.default_rng(0)
    embeddings = tuple(rng.standard_normal((size, DIMS), dtype=np.float32) for size in (users, items))
    positives = rng.integers(0, items, users)
    counts = rng.integers(3, 13, users)
    owner = np.repeat(np.arange(users), counts)
    seen = (positives[owner] + rng.integers(1, items, len(owner))) % items
    return embeddings, positives, np.concatenate([[0], np.cumsum(counts)]), seen


# ------------------------------------------------------------------------------------------- the contenders


def ours(embeddings, positives, seen_ptr, seen):
    from recllm.evaluation import compute_metrics, rank_full

    target = np.arange(len(positives) + 1), positives
    records = rank_full(embeddings, target, len(embeddings[1]), seen=(seen_ptr, seen))
    return compute_metrics(records, names=[f"{name}@{k}" for k in KS for name in ("recall", "ndcg")]).mean()


def usual(embeddings, positives, seen_ptr, seen):
    listed = list_top(embeddings, seen_ptr, seen)
    return measure([positives[i : i + 1] for i in range(len(positives))], listed)


def usual_with_sets(embeddings, positives, seen_ptr, seen):
    listed = list_top(embeddings, seen_ptr, seen)
    return measure([{int(item)} for item in positives], listed.tolist())


def list_top(embeddings, seen_ptr, seen):
    import torch

    of_users, of_items = map(torch.from_numpy, embeddings)
    owner = torch.from_numpy(np.repeat(np.arange(len(of_users)), np.diff(seen_ptr)))
    listed = []
    for start in range(0, len(of_users), 4096):
        scores = of_users[start : start + 4096] @ of_items.T
        part = slice(seen_ptr[start], seen_ptr[min(start + 4096, len(of_users))])
        scores[owner[part] - start, torch.from_numpy(seen[part])] = -torch.inf
        listed.append(torch.topk(scores, max(KS), dim=-1).indices)
    return torch.cat(listed).numpy()


def measure(relevant, listed):
    hits = []
    for wanted, items in zip(relevant, listed, strict=True):
        hits.append([item in wanted for item in items])
    hits = np.array(hits)
    size = np.array([len(wanted) for wanted in relevant])
    discount = 1 / np.log2(np.arange(2, max(KS) + 2))
    recall = (hits.cumsum(1) / size[:, None]).mean(0)
    ideal = discount.cumsum()[np.minimum(size[:, None], np.arange(1, max(KS) + 1)) - 1]
    ndcg = ((hits * discount).cumsum(1) / ideal).mean(0)
    return {f"{name}@{k}": float(x[k - 1]) for k in KS for name, x in (("recall", recall), ("ndcg", ndcg))}


CONTENDERS = {"recllm": ours, "usual": usual, "usual, sets": usual_with_sets}

# ---------------------------------------------------------------------------------------------- the measure


def serve(name, users, items, pipe):
    """One contender in its own process: runs once for every message."""
    inputs = world(users, items)
    CONTENDERS[name](*world(64, 200))  # imports and threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while pipe.recv():
        started = time.perf_counter()
        found = CONTENDERS[name](*inputs)
        seconds = time.perf_counter() - started
        pipe.send((found, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def start(name, users=USERS, items=ITEMS):
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=serve, args=(name, users, items, theirs), daemon=True).start()
    return pipe


def ask(pipe):
    pipe.send(True)
    return pipe.recv()


def main() -> None:
    pipes = {name: start(name) for name in CONTENDERS}
    runs = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            time.sleep(0.5)  # the threads of the contender before spin on for a while
            runs[name].append(ask(pipe))
    for pipe in pipes.values():
        pipe.send(False)
    for metric, value in runs["usual"][0][0].items():
        assert abs(value - runs["recllm"][0][0][metric]) < 1e-5, (
            metric
        )  # float32 scores of two BLAS libraries
    figures = {
        name: {"seconds": statistics.median(one[1] for one in rounds), "peak_mib": rounds[-1][2]}
        for name, rounds in runs.items()
    }
    for name, figure in figures.items():
        figure["ratio"] = figure["seconds"] / figures["recllm"]["seconds"]
        print(f"{name:8}", *(f"{key} {value:9.3f}" for key, value in figure.items()), sep="  ")
    growth = []
    for users, items in SIZES:
        pipe = start("recllm", users, items)
        ask(pipe)  # the first run pays for touching memory
        _, seconds, peak = ask(pipe)
        pipe.send(False)
        growth.append({"users": users, "items": items, "seconds": seconds, "peak_mib": peak})
        growth[-1]["dense_mib"] = users * items * 4 / 2**20
        print("recllm  ", *(f"{key} {value:9.2f}" for key, value in growth[-1].items()), sep="  ")
    content = {
        "benchmark": "full_ranking",
        "machine": describe_machine(),
        "run": describe_run(),
        "setting": {"users": USERS, "items": ITEMS, "dims": DIMS, "rounds": ROUNDS},
        "figures": figures,
        "growth": growth,
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
