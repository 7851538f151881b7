"""What MLLMRec's leak is worth: texts about users from training interactions, and from every interaction.

    python benchmarks/mllmrec_leak.py WORK
    python benchmarks/mllmrec_leak.py WORK --smoke      one small world, nothing written

Toy worlds with about eight interactions a user, as Amazon Baby has; leave-one-out; the whole catalog is
ranked, seen items masked. The same builders, ranker, seeds and settings for all rows; between `honest` and
`leaky` only --leak-all-interactions differs. A rule stands in for the MLLM, and both rows have the same one:
it says what a picture shows, and of a user the category, pattern, color and shape of each item that the
prompt lists, the latest first, in at most 100 words. A real MLLM's summary keeps less of a single item.
The leaky text holds the validation item, too, which may be known when the test item is predicted, so not
all of the difference is the test item. `learned` has no texts about users (--no-reasoning). Takes about 4
minutes on one core.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from recllm.builders import session
from recllm.builders.items import summarize_items
from recllm.builders.options import ItemOptions, UserOptions
from recllm.builders.users import summarize_users
from recllm.cli import main as recllm
from recllm.data.splits import SplitOptions, make_split
from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES
from recllm.data.toyworld.words import PLURALS
from recllm.data.toyworld.world import generate
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import RankRecords
from recllm.files import write_json
from recllm.mllm.chat import Decoding, Request, Result
from recllm.runs.provenance import describe_machine, describe_run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "mllmrec_leak.json"
SMOKE = "--smoke" in sys.argv
SEEDS = (0,) if SMOKE else (0, 1, 2)
WORLD = {"users": 100, "items": 100} if SMOKE else {"users": 600, "items": 300}
METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
FLAGS = ("--epochs", "5" if SMOKE else "300", "--batch-size", "512", "--learning-rate", "0.003")
ROWS = {
    "honest": ("--user-text", "preference"),
    "leaky": ("--user-text", "preference-leaky", "--allow-leak"),
    "learned": ("--no-reasoning",),
}


class Rule:
    """Stands in for an MLLM: reads pictures without error, and lists a user's items from the prompt."""

    special_tokens = ()

    def __init__(self, looks: dict[str, str]) -> None:
        self.identity = {"model": "a rule"}
        self._looks = looks
        words = ("|".join(kind) for kind in (PLURALS.values(), PATTERNS, COLORS, SHAPES))
        self._item = re.compile("({})\\..*?shows a ({}) ({}) ({})".format(*words))

    def generate(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> Iterator[list[Result]]:
        for key, request in requests:
            answer = self._looks[request.id] if request.images else self._preference(request)
            yield [Result(key, answer, len(answer), len(answer.split()), "stop")]

    def _preference(self, request: Request) -> str:
        text = " ".join(part.get("text", "") for turn in request.messages for part in turn["content"])
        items = [" ".join(found) for found in self._item.findall(text)]
        assert items, text
        return " ".join(f"Likes: {', '.join(reversed(items))}".split()[:100])

    def count_tokens(self, request: Request) -> int | None:
        return None

    def show(self, request: Request) -> str:
        return request.id


def prepare(folder: Path, seed: int) -> Path:
    """Makes a world, its split and its texts; returns the split's folder."""
    world = generate(seed=seed, phases=2, **WORLD)
    dataset = world.write(folder / "shop")
    looks = {
        item: f"The image shows a {pattern} {color} {shape}."
        for item, color, pattern, shape in world.item_answers.select(
            "item", "color", "pattern", "shape"
        ).iter_rows()
    }
    session.make_backend = lambda options: Rule(looks)
    split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    summarize_items(ItemOptions(dataset.folder, "rule", system="mllmrec"))
    for leak in (False, True):
        summarize_users(UserOptions(dataset.folder, "rule", system="mllmrec", leak_all_interactions=leak))
    return split.folder


def figures_of(path: Path) -> dict[str, float]:
    means = compute_metrics(RankRecords.load(path), names=list(METRICS)).mean()
    return {name: round(float(means[name]), 5) for name in METRICS}


def main() -> None:
    work = Path(sys.argv[1])
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        folder = work / f"seed{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        split = prepare(folder, seed)
        for row, flags in ROWS.items():
            recipe = [sys.executable, str(ROOT / "recipes" / "train_ranker.py")]
            recipe += ["--config", str(ROOT / "recipes" / "configs" / "rankers" / "mllmrec.yaml")]
            recipe += ["--split", str(split), "--out", str(folder / row), "--seed", str(seed), *FLAGS, *flags]
            subprocess.run(recipe, check=True)
            recllm(["score", "ranker", str(folder / row), "--out", str(folder)])
            found.setdefault(row, []).append(figures_of(folder / "ranks" / f"{row}.parquet"))
        recllm(["score", "popularity", str(split), "--out", str(folder)])
        found.setdefault("popularity", []).append(figures_of(folder / "ranks" / "popularity.parquet"))
    figures = {
        row: {
            name: {
                "mean": round(statistics.mean(each[name] for each in seeds), 5),
                "seeds": [each[name] for each in seeds],
            }
            for name in METRICS
        }
        for row, seeds in found.items()
    }
    pl.Config.set_tbl_rows(20)
    print(pl.DataFrame([{"row": r, **{n: v["mean"] for n, v in f.items()}} for r, f in figures.items()]))
    if SMOKE:
        return
    content = {"benchmark": "mllmrec_leak", "machine": describe_machine(), "run": describe_run()}
    setting = {"world": WORLD | {"phases": 2}, "protocol": "loo/full/mask-seen", "model": "a rule"}
    setting |= {"seeds": list(SEEDS), "flags": list(FLAGS)}
    write_json(RESULTS, {**content, "setting": setting, "figures": figures})


if __name__ == "__main__":
    main()
