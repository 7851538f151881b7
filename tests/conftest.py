"""Fixtures that several test files use: real data where it is, and a small dataset to split and rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.data.dataset import Dataset, write_dataset

DATA = Path(os.environ.get("RECLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Returns the folder of a real dataset, or skips the test with the reason."""

    def find(name: str) -> Path:
        if not (DATA / name).is_dir():
            pytest.skip(f"real data {name!r} is not at {DATA}; set RECLLM_DATA to the folder that holds it")
        return DATA / name

    return find


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """The folder of the embedded model."""
    from recllm.mllm import tiny

    return tiny.checkpoint_folder()


@pytest.fixture
def small_dataset(tmp_path: Path) -> Dataset:
    """A seeded log of 60 users and 40 items with times (some equal), ratings and reviews."""
    return make_dataset(tmp_path / "small")


def make_dataset(
    out: Path, *, users: int = 60, items: int = 40, interactions: int = 900, seed: int = 0, timed: bool = True
) -> Dataset:
    """Writes a random dataset without repeated pairs; times are coarse, so that many are equal."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(users * items)[:interactions]
    user, item = pairs // items, pairs % items
    log = pl.DataFrame(
        {
            "user": [f"u{code:03d}" for code in user],
            "item": [f"i{code:03d}" for code in item],
            "timestamp": rng.integers(1_600_000_000, 1_600_000_400, interactions) // 10 * 10,
            "rating": rng.integers(1, 6, interactions),
            "review": [f"review {row}" for row in range(interactions)],
        }
    )
    if not timed:
        log = log.drop("timestamp")
    catalog = pl.DataFrame({"item": [f"i{code:03d}" for code in range(items)], "title": ["thing"] * items})
    people = log.select("user").unique().sort("user")
    return write_dataset(out, items=catalog, interactions=log, users=people, source={"made": "by a test"})
