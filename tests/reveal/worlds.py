"""A log for REVEAL: what validation lists say of it is known, and its test part can be exchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from recllm.data.candidates import full_ranking
from recllm.data.dataset import write_dataset
from recllm.data.splits import HeldOut, Split, SplitOptions, make_split
from recllm.evaluation.top_k_files import write_stage

USERS, ITEMS, LENGTH = 24, 40, 8
COLORS = ("red", "green", "blue", "white")


def write_shop(folder: Path, *, test_shift: int = 0) -> Split:
    """Writes items with pictures of one color each, a log, and its split by `loo`.

    Args:
        folder: The dataset folder.
        test_shift: User n gets the test item (and its review) of user n + test_shift.
    """
    rng = np.random.default_rng(5)
    ids = [f"i{number:02d}" for number in range(ITEMS)]
    rows = [rng.permutation(ITEMS)[: LENGTH + 3] for _ in range(USERS)]
    log = []
    for user, row in enumerate(rows):
        history, spare = row[: LENGTH - 1], row[LENGTH - 1 :]
        last = spare[test_shift % len(spare)]
        for place, item in enumerate([*history, last]):
            word = "secret" if place == LENGTH - 1 else "handle"
            log.append(
                (
                    f"u{user:02d}",
                    ids[item],
                    1_600_000_000 + 100 * user + place,
                    f"{word} {word}{last if word == 'secret' else ''}",
                )
            )

    def stage(place: Path) -> None:
        (place / "images").mkdir()
        for number, item in enumerate(ids):
            Image.new("RGB", (56, 56), COLORS[number % 4]).save(place / "images" / f"{item}.png")

    dataset = write_dataset(
        folder,
        items=pl.DataFrame(
            {
                "item": ids,
                "title": [f"Mug number {number}" for number in range(ITEMS)],
                "categories": [["kitchen", "mugs"]] * ITEMS,
                "images": [[] if item == "i03" else [f"images/{item}.png"] for item in ids],
            }
        ),
        interactions=pl.DataFrame(log, schema=["user", "item", "timestamp", "review"], orient="row"),
        users=pl.DataFrame({"user": [f"u{user:02d}" for user in range(USERS)]}),
        source={"made": "by a test"},
        stage=stage,
    )
    return make_split(dataset, SplitOptions(dataset.folder, "loo", name="loo"))


def write_lists(
    split: Split, out: Path, part: HeldOut = "valid", *, k: int = 25, system: str = "run"
) -> None:
    """Writes OUT/topk.parquet and OUT/ranks.parquet of drawn scores, of which some tie."""
    ranking = full_ranking(split, part)
    scores = np.random.default_rng(7).integers(0, 60, (len(ranking.users), ITEMS)).astype(np.float32)
    facts = {"data_hash": split.dataset.data_hash, "split_hash": split.split_hash}
    files = {"ranks": out / "ranks.parquet", "lists": out / "topk.parquet"}
    write_stage(ranking, scores, k, system=system, made=facts, **files)
