"""Whether MLLMRec's refined item graph helps FREEDOM, LATTICE and SMORE: each with and without --refine.

    python benchmarks/mllmrec_leak.py WORK
    python benchmarks/refinement_plugins.py WORK

The toy worlds and honest item texts that mllmrec_leak.py leaves in WORK; images by the embedded model. All
else is equal between the two ways of a ranker, and is the ranker's recipe but for the flags in the results.
Takes about 5 minutes on two idle cores.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from recllm.cli import main as recllm
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import RankRecords
from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
RANKERS = ("freedom", "lattice", "smore")
SEEDS = (0, 1, 2)
METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
FLAGS = ("--text", "metadata+description", "--image", "tiny", "--batch-size", "512", "--epochs", "100")
FLAGS += ("--patience", "10")
WAYS = {"plain": (), "refined": ("--refine",)}


def figures_of(folder: Path, ranker: str, way: str, seed: int) -> dict[str, float]:
    run = folder / f"{ranker}-{way}"
    recipe = [sys.executable, str(ROOT / "recipes" / "train_ranker.py"), "--seed", str(seed)]
    recipe += ["--config", str(ROOT / "recipes" / "configs" / "rankers" / f"{ranker}.yaml")]
    recipe += ["--split", str(folder / "shop" / "splits" / "loo"), "--out", str(run), "--resume", "auto"]
    subprocess.run([*recipe, *FLAGS, *WAYS[way]], check=True)
    recllm(["score", "ranker", str(run), "--out", str(folder), "--overwrite"])
    means = compute_metrics(
        RankRecords.load(folder / "ranks" / f"{run.name}.parquet"), names=list(METRICS)
    ).mean()
    return {name: round(float(means[name]), 5) for name in METRICS}


def main() -> None:
    figures: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for ranker in RANKERS:
        for way in WAYS:
            seeds = [figures_of(Path(sys.argv[1]) / f"seed{seed}", ranker, way, seed) for seed in SEEDS]
            figures.setdefault(ranker, {})[way] = {
                name: {
                    "mean": round(statistics.mean(each[name] for each in seeds), 5),
                    "seeds": [each[name] for each in seeds],
                }
                for name in METRICS
            }
            print(ranker, way, figures[ranker][way], flush=True)
    run = describe_run()
    content = {"benchmark": "refinement_plugins", "machine": describe_machine(), "run": run}
    setting = {"protocol": "loo/full/mask-seen", "seeds": list(SEEDS), "flags": list(FLAGS)}
    write_json(
        ROOT / "results" / "refinement_plugins.json", {**content, "setting": setting, "figures": figures}
    )


if __name__ == "__main__":
    main()
