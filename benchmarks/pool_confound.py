"""How a metric grows when the pool shrinks: the same vectors, ranked among fewer and fewer candidates.

    python benchmarks/pool_confound.py PATH/TO/ml-latest-small-posters

VLM4Rec (arXiv 2603.12625) ranks its descriptions among the 4,708 items that have one, which were chosen by
popularity and recency, and its titles among all 38,493. Here nothing but the pool differs: profiles of MiniLM
vectors of title and plot, profiles of random vectors, and popularity, on MovieLens with posters (5-core,
leave-one-out), in pools of the most popular items and in pools of random items (mean of five draws), and in
the whole catalog with content for these items alone (--pool all).

Writes results/pool_confound.json, and results/pool_confound.svg, a plot of ndcg@10.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recllm.cli import main as recllm
from recllm.data.candidates import FullRanking, full_ranking
from recllm.data.splits import Split
from recllm.data.texts import item_texts
from recllm.evaluation import compute_metrics, rank_catalog
from recllm.evaluation.coverage import Coverage, fill_catalog, pool_columns
from recllm.files import write_file, write_json
from recllm.mllm.embedding import DEFAULT_ENCODER, stored_embeddings
from recllm.rankers.models.popularity import Popularity
from recllm.retrieval.profiles import MeanProfiles
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "pool_confound.json"
PLOT = RESULTS.with_suffix(".svg")
SHARES = (1.0, 0.5, 0.25, 4708 / 38493, 0.06)
DRAWS = 5
METRICS = ("hr@10", "ndcg@10")
LOOKS = {"text": "o-", "random vectors": "s--", "popularity": "^:"}
Systems = dict[str, Callable[[np.ndarray], object]]


def main() -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        raw, whole, core = sys.argv[1], f"{folder}/ml", f"{folder}/ml5"
        recllm(["data", "import", "movielens", raw, whole])
        recllm(["data", "filter", whole, core, "--user-core", "5", "--item-core", "5", "--require-image"])
        recllm(["data", "split", core, "loo"])
        split = Split.open(Path(core) / "splits" / "loo")
        vectors = stored_embeddings(Path(core) / "embeddings" / "catalog", item_texts(split.dataset)).vectors
        figures = measure(split, vectors)
    content = {
        "benchmark": "pool_confound",
        "machine": describe_machine(),
        "run": {**describe_run(), "command": ["pool_confound.py", Path(sys.argv[1]).name]},
        "setting": {
            **{"dataset": "MovieLens with posters, 5-core, loo, test", "history": 10, "mask": "seen"},
            **{"encoder": DEFAULT_ENCODER, "draws": DRAWS},
        },
        "seconds": time.perf_counter() - started,
        "figures": figures,
    }
    write_json(RESULTS, content)
    plot(figures)
    for line in figures:
        print(line)


def measure(split: Split, vectors: np.ndarray) -> list[dict]:
    """Returns each system's metrics in each pool: of popular items, of random ones, and of all."""
    count = len(split.dataset.items)
    ranking, popular = full_ranking(split, "test"), Popularity(split)
    noise = np.random.default_rng(0).normal(size=(count, 384)).astype(np.float32)
    everything = np.ones(count, dtype=bool)
    systems: Systems = {
        "text": MeanProfiles(split, "test", vectors, everything, history=10).for_ranking,
        "random vectors": MeanProfiles(split, "test", noise, everything, history=10).for_ranking,
        "popularity": lambda users: lambda part: popular.score_lists(part),
    }
    by_popularity = np.argsort(-popular.scores, kind="stable")
    lines = []
    for share in SHARES:
        size = round(share * count)
        draws = [np.random.default_rng(seed).permutation(count) for seed in range(DRAWS)]
        for kind, orders in (("popular", [by_popularity]), ("random", draws)):
            chosen = [np.isin(np.arange(count), order[:size]) for order in orders]
            for system, score in systems.items():
                for pool in ("covered", "all"):
                    if pool == "all" and (kind == "random" or system == "popularity"):
                        continue  # popularity lacks nothing; one of the two orders is enough
                    measured = [in_pool(ranking, score, members, pool) for members in chosen]
                    mean = {name: float(np.mean([each[name] for each in measured])) for name in measured[0]}
                    lines.append({"system": system, "of": kind, "pool": pool, "items": size, **mean})
    return lines


def in_pool(ranking: FullRanking, score: Callable, members: np.ndarray, pool: str) -> dict[str, float]:
    """Returns the metrics of one system in one pool, and how many targets it has."""
    if pool == "covered":
        coverage = Coverage.of(members, ranking.item_ids, ranking.positives, "covered")
        ranking = coverage.ranking(ranking, members)
        scores = pool_columns(score(ranking.users), members)
    else:
        scores = fill_catalog(score(ranking.users), members, ranking)
    records = rank_catalog(ranking, scores, system="pool")
    return {**compute_metrics(records, names=METRICS).mean(), "targets": len(records)}


def plot(lines: list[dict]) -> None:
    """Draws ndcg@10 over the size of the pool."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    panels = {
        "candidates: the most popular items": ("popular", "covered"),
        "candidates: random items": ("random", "covered"),
        "candidates: the catalog; content for the most popular": ("popular", "all"),
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    for panel, (title, (kind, pool)) in zip(axes, panels.items(), strict=True):
        for system, look in LOOKS.items():
            drawn = [
                (line["items"], line["ndcg@10"])
                for line in lines
                if (line["system"], line["of"], line["pool"]) == (system, kind, pool)
            ]
            if drawn:
                panel.plot(*zip(*drawn, strict=True), look, label=system)
        panel.set(title=title, xlabel="items with content", xscale="log")
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("ndcg@10")
    axes[0].legend()
    write_file(PLOT, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None}))


if __name__ == "__main__":
    main()
