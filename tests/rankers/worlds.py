"""A tiny world for rankers: 21 users, 29 items, and everything that training data can have.

What is awkward on purpose: a user and an item without any training interaction, an item without image and one
without text, an item that a user takes twice, interactions at the same time, prices that are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import torch
from PIL import Image

from recllm.data.dataset import write_dataset
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.rankers.batches import Batch
from recllm.rankers.features import Features
from recllm.rankers.training_data import Histories, TrainingData
from recllm.rankers.user_texts import UserFeatures

USERS, ITEMS = 21, 29
UNKNOWN_USER, UNTOUCHED_ITEM = 7, 28
WITHOUT_IMAGE, WITHOUT_TEXT = 3, 5
WITHOUT_USER_TEXT = 4
WIDTHS = {"text": 12, "image": 10}


def tiny_data(seed: int = 0) -> TrainingData:
    """Returns sequences of 4 to 12 items with times, both features, categories and prices."""
    random = np.random.default_rng(seed)
    rows, days = [], []
    for user in range(USERS - 1):
        row = random.permutation(UNTOUCHED_ITEM)[: random.integers(4, 13)] + 1
        gaps = random.exponential(3.0, len(row))
        if user == 0:
            row[2], gaps[2] = row[0], 0.0
        rows.append(row)
        days.append(random.uniform(0, 30) + np.cumsum(gaps))
    first = min(each[0] for each in days)
    prices = random.uniform(1, 50, ITEMS).astype(np.float32)
    prices[[1, 3, 8]] = np.nan
    categories = random.random((ITEMS, 4)) < 0.4
    categories[np.arange(ITEMS), random.integers(0, 4, ITEMS)] = True
    users = np.array([user for user in range(USERS) if user != UNKNOWN_USER])
    return TrainingData(
        USERS,
        ITEMS,
        histories(rows, [each - first for each in days], users),
        {
            "text": features_of(random, WIDTHS["text"], WITHOUT_TEXT),
            "image": features_of(random, WIDTHS["image"], WITHOUT_IMAGE),
        },
        categories,
        prices,
        1_600_000_000,
        user_features(random),
    )


def user_features(random: np.random.Generator) -> UserFeatures:
    """Returns vectors of length 1 for all users but two, of whom one is not known to training either."""
    vectors = random.standard_normal((USERS, WIDTHS["text"])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    present = ~np.isin(np.arange(USERS), [UNKNOWN_USER, WITHOUT_USER_TEXT])
    return UserFeatures(vectors * present[:, None], present, "drawn by a test")


def histories(
    rows: Sequence[Sequence[int] | np.ndarray],
    days: Sequence[np.ndarray] | None = None,
    users: np.ndarray | None = None,
) -> Histories:
    """Returns one sequence of item numbers for each of `users`, or of as many users from 0."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    items = np.concatenate([np.asarray(row, np.int32) for row in rows] or [np.empty(0, np.int32)])
    users = np.arange(len(rows)) if users is None else users
    times = None if days is None else np.concatenate(days)
    return Histories(users.astype(np.int32), offsets, items, times)


def features_of(random: np.random.Generator, width: int, missing: int) -> Features:
    """Returns vectors of length 1, like those of an encoder, for all items but one."""
    vectors = random.standard_normal((ITEMS, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    present = np.arange(ITEMS) != missing
    return Features(vectors * present[:, None], present, "drawn by a test")


def without_last(data: TrainingData) -> tuple[Histories, np.ndarray]:
    """Returns each training sequence but its last item, and the numbers of the last items."""
    train = data.train
    rows = [train.items[a : b - 1] for a, b in pairwise(train.offsets)]
    days = [train.days[a : b - 1] for a, b in pairwise(train.offsets)]
    return histories(rows, days, train.users), train.items[train.offsets[1:] - 1].astype(np.int64)


def relabeled(data: TrainingData, new: np.ndarray) -> TrainingData:
    """Returns the same world, in which the item of code `i` has the code `new[i]`."""
    old = np.argsort(new)
    return replace(
        data,
        train=replace(data.train, items=(new[data.train.items - 1] + 1).astype(np.int32)),
        features={
            name: Features(each.vectors[old], each.present[old], each.source)
            for name, each in data.features.items()
        },
        categories=data.categories[old],
        prices=data.prices[old],
    )


def padded(batch: Batch, columns: int) -> Batch:
    """Returns the batch with so many more columns of padding."""

    def wider(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return torch.cat([values, values.new_zeros(len(values), columns, *values.shape[2:])], 1)

    return replace(
        batch,
        items=wider(batch.items),
        days=wider(batch.days),
        targets=wider(batch.targets),
        negatives=wider(batch.negatives),
    )


def tiny_split(folder: Path, *, users: int = 12, length: int = 7, timed: bool = True) -> Split:
    """Writes a dataset and splits it by `loo`; nobody but the user has her last two items.

    Items are `common<n>`, `later<user>` (valid) and `latest<user>` (test). Some have no picture, one has a
    broken one, one two; some have neither title nor text.
    """
    shared = [f"common{number}" for number in range(10)]
    ids = shared + [f"{part}{user}" for user in range(users) for part in ("later", "latest")]
    log = []
    for user in range(users):
        history = [shared[(3 * user + place) % len(shared)] for place in range(length - 2)]
        for place, item in enumerate([*history, f"later{user}", f"latest{user}"]):
            log.append((f"user{user:02d}", item, 1_600_000_000 + 86_400 * user + 43_200 * place))
    pictures = {item: [f"images/{item}.png"] for item in ids}
    pictures["common1"], pictures["common2"] = [], ["images/common2.png", "images/common3.png"]

    def stage(place: Path) -> None:
        (place / "images").mkdir()
        for number, item in enumerate(ids):
            Image.new("RGB", (56, 56), (40 * number % 256, 90, 150)).save(place / "images" / f"{item}.png")
        (place / "images" / "common4.png").write_bytes(b"no picture")

    dataset = write_dataset(
        folder,
        items=pl.DataFrame(
            {
                "item": ids,
                "title": ["" if item == "common6" else f"Thing {item}" for item in ids],
                "categories": [["all", item.rstrip("0123456789")] for item in ids],
                "images": [pictures[item] for item in ids],
                "price": [None if number % 4 == 1 else f"${number + 1}.50" for number in range(len(ids))],
            }
        ),
        interactions=pl.DataFrame(log, schema=["user", "item", "timestamp"], orient="row").select(
            ["user", "item", *(["timestamp"] if timed else [])]
        ),
        users=pl.DataFrame({"user": [f"user{user:02d}" for user in range(users)]}),
        source={"made": "by a test"},
        stage=stage,
    )
    return make_split(dataset, SplitOptions(dataset.folder, "loo", name="loo"))
