"""Metrics of 100,000 lists of 50 candidates from score arrays: recllm, ranx and pytrec_eval, paired in one
run.

    python benchmarks/metrics.py

All start from the same arrays, scores [100000, 50] and labels [100000, 50] with one positive per row and no
ties, and end with the means of the same eight metrics. What each library needs first (dictionaries, Qrels and
Run) is timed apart, and ratios are given with and without it. ranx compiles in an untimed first call. Rounds
are interleaved; figures are medians. Each contender runs in its own process, whose peak memory is measured
over that of the arrays.
"""

import importlib.metadata
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "metrics.json"
LISTS, CANDIDATES, ROUNDS = 100_000, 50, 5
METRICS = ("hr@10", "recall@10", "precision@10", "ndcg@5", "ndcg@10", "mrr", "map@10", "map")

# ------------------------------------------------------------------------------------------- the contenders


def ours(scores, labels):
    from recllm.evaluation import compute_metrics, rank_score_matrix

    started = time.perf_counter()
    metrics = compute_metrics(rank_score_matrix(scores, labels), names=METRICS).mean()
    return metrics, 0.0, time.perf_counter() - started


def dictionaries(scores, labels):
    names = [str(item) for item in range(scores.shape[1])]
    queries = [str(query) for query in range(len(scores))]
    run = {q: dict(zip(names, row, strict=True)) for q, row in zip(queries, scores.tolist(), strict=True)}
    rows = zip(queries, labels, strict=True)
    return {q: {names[item]: 1 for item in np.flatnonzero(row)} for q, row in rows}, run


def ranx(scores, labels):
    import ranx

    names = {name: name.replace("hr", "hit_rate") for name in METRICS}
    ranx.evaluate(*_ranx_objects(scores[:8], labels[:8]), list(names.values()))  # compiles
    started = time.perf_counter()
    objects = _ranx_objects(scores, labels)
    built = time.perf_counter()
    found = ranx.evaluate(*objects, list(names.values()))
    done = time.perf_counter()
    return {name: float(found[theirs]) for name, theirs in names.items()}, built - started, done - built


def _ranx_objects(scores, labels):
    import ranx

    qrels, run = dictionaries(scores, labels)
    return ranx.Qrels(qrels), ranx.Run(run)


def pytrec_eval(scores, labels):
    import pytrec_eval

    theirs = [
        "success_10",
        "recall_10",
        "P_10",
        "ndcg_cut_5",
        "ndcg_cut_10",
        "recip_rank",
        "map_cut_10",
        "map",
    ]
    names = dict(zip(METRICS, theirs, strict=True))
    asked = {"success.10", "recall.10", "P.10", "ndcg_cut.5,10", "recip_rank", "map_cut.10", "map"}
    started = time.perf_counter()
    qrels, run = dictionaries(scores, labels)
    built = time.perf_counter()
    found = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate(run)
    means = {name: sum(one[theirs] for one in found.values()) / len(found) for name, theirs in names.items()}
    return means, built - started, time.perf_counter() - built


CONTENDERS = {"recllm": ours, "ranx": ranx, "pytrec_eval": pytrec_eval}

# ---------------------------------------------------------------------------------------------- the measure


def serve(name, pipe):
    """One contender in its own process: runs once for every message."""
    rng = np.random.default_rng(0)
    scores = np.tile(np.arange(CANDIDATES) / CANDIDATES, (LISTS, 1))
    rng.permuted(scores, axis=1, out=scores)  # in place, lest a copy raise the peak before the contender runs
    labels = np.zeros((LISTS, CANDIDATES), np.int8)
    labels[np.arange(LISTS), rng.integers(0, CANDIDATES, LISTS)] = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while pipe.recv():
        found = CONTENDERS[name](scores, labels)
        pipe.send((*found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, theirs), daemon=True))
        processes[-1].start()
    runs = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            pipe.send(True)
            runs[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    figures = {}
    for name, rounds in runs.items():
        for metric in METRICS:
            assert abs(rounds[0][0][metric] - runs["recllm"][0][0][metric]) < 1e-9, (name, metric)
        prepare, compute = (statistics.median(one[place] for one in rounds) for place in (1, 2))
        figures[name] = {"prepare_s": prepare, "compute_s": compute, "peak_mib": rounds[-1][3]}
    base = figures["recllm"]["compute_s"]
    for name, figure in figures.items():
        figure["ratio"] = (figure["prepare_s"] + figure["compute_s"]) / base
        figure["ratio_without_preparation"] = figure["compute_s"] / base
        print(f"{name:12}", *(f"{key} {value:9.3f}" for key, value in figure.items()), sep="  ")
    content = {
        "benchmark": "metrics",
        "machine": describe_machine(),
        "run": describe_run(),
        "versions": {name: importlib.metadata.version(name) for name in ("ranx", "pytrec-eval-terrier")},
        "setting": {"lists": LISTS, "candidates": CANDIDATES, "rounds": ROUNDS, "metrics": METRICS},
        "figures": figures,
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
