"""Ratings as likes and dislikes: what a split with `--like` keeps apart.

An interaction whose rating is the threshold or more is a like; one with a lower rating is a dislike. Likes
are split by the method alone, as if nothing else were in the log, so that every target and every training
positive is a like. Dislikes go to the parts by the same rule: where a split is in time, by their place among
the user's likes (or by the two points in time); where it is random, at random by the same shares; where it
holds users or items out, with these. Interactions without a rating are in no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from recllm.data.dataset import NO_TIME, Dataset
from recllm.data.ordering import group_by_user_in_time
from recllm.data.split_methods import TEST, TRAIN, UNUSED, VALID, Assignment
from recllm.errors import DataError


@dataclass(frozen=True)
class LogRows:
    """Some interactions of a dataset, as the split methods read them.

    Attributes:
        dataset: The dataset.
        rows: Row numbers in its interactions, ascending; shape [n].
    """

    dataset: Dataset
    rows: np.ndarray

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    @property
    def user_codes(self) -> np.ndarray:
        """The user of each; shape [n]."""
        return self.dataset.user_codes[self.rows]

    @property
    def item_codes(self) -> np.ndarray:
        """The item of each; shape [n]."""
        return self.dataset.item_codes[self.rows]

    @property
    def timestamps(self) -> np.ndarray | None:
        """The time of each; shape [n]; None where the log has no times."""
        times = self.dataset.timestamps
        return None if times is None else times[self.rows]

    def scan_interactions(self) -> pl.LazyFrame:
        """The interactions, lazily."""
        return self.dataset.scan_interactions().select(pl.all().gather(self.rows))


def split_by_rating(
    dataset: Dataset, like: float, method: str, assign: Callable[[Any], Assignment]
) -> Assignment:
    """Splits likes by a method and puts dislikes beside them.

    Args:
        dataset: The dataset.
        like: The least rating of a like.
        method: The name of the method; of `ratio` with its order, `ratio-time` or `ratio-random`.
        assign: The method.

    Raises:
        DataError: The dataset has no ratings, or none that is a like.
    """
    ratings = read_ratings(dataset, "--like")
    threshold = np.float32(like)
    if not np.isfinite(threshold):
        raise DataError(f"--like {like}: expected a rating")
    liked, disliked = ratings >= threshold, ratings < threshold
    if not liked.any():
        raise DataError(
            f"{dataset.folder}: no rating is {like:g} or more (--like); the highest is {np.nanmax(ratings):g}"
        )
    of_likes = assign(LogRows(dataset, np.flatnonzero(liked)))
    part = np.full(len(ratings), UNUSED, dtype=np.int8)
    target = np.zeros(len(ratings), dtype=bool)
    part[liked], target[liked] = of_likes.part, of_likes.target
    both = Assignment(f"{of_likes.protocol}-like{like:g}", part, target, of_likes.facts, of_likes.warnings)
    both.disliked_part = np.full(len(ratings), UNUSED, dtype=np.int8)
    both.disliked_target = disliked.copy()
    if disliked.any():
        rows = np.flatnonzero(disliked)
        if method in ("random", "ratio-random", "cold-items", "given"):
            both.disliked_part[rows] = assign(LogRows(dataset, rows)).part
        elif method == "temporal":
            both.disliked_part[rows] = _by_time(dataset, rows, both.facts)
        else:
            _by_place(dataset, rows, both, whole_users=method == "users")
    both.facts["likes"] = int(np.count_nonzero(liked))
    both.facts["dislikes"] = int(np.count_nonzero(disliked))
    both.facts["interactions_without_rating"] = int(np.count_nonzero(np.isnan(ratings)))
    return both


def read_ratings(dataset: Dataset, flag: str) -> np.ndarray:
    """Returns the rating of each interaction; float32, shape [interactions], NaN without one.

    Raises:
        DataError: The dataset has no ratings; `flag` says what needs them.
    """
    if not dataset.manifest["counts"]["ratings"]:
        raise DataError(
            f"{dataset.folder} has no ratings, which {flag} needs; leave it out, or import ratings"
        )
    ratings = dataset.scan_interactions().select(pl.col("rating").cast(pl.Float32).fill_null(np.nan))
    return ratings.collect(engine="streaming")["rating"].to_numpy()


def _by_time(dataset: Dataset, rows: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    times = dataset.timestamps[rows]
    borders = facts["first_validation_time"], facts["first_test_time"]
    part = np.where(times < borders[0], TRAIN, np.where(times < borders[1], VALID, TEST))
    return np.where(times == NO_TIME, UNUSED, part).astype(np.int8)


def _by_place(dataset: Dataset, rows: np.ndarray, both: Assignment, *, whole_users: bool) -> None:
    """A dislike is of the part of the latest like before it: what follows a user's validation targets is no
    training, what follows the test targets is test. Those of a held-out user are in the user's part; what
    precedes the target is history."""
    order, _ = group_by_user_in_time(dataset.user_codes, dataset.timestamps, len(dataset.users))
    owner = dataset.user_codes[order].astype(np.int64) * 4
    reached = np.where(both.part[order] == UNUSED, TRAIN, both.part[order])
    if whole_users:
        of_user = np.zeros(len(dataset.users), dtype=np.int8)
        np.maximum.at(of_user, dataset.user_codes[both.part != UNUSED], both.part[both.part != UNUSED])
        past = np.maximum.accumulate(owner + (both.target[order] & (both.part[order] != TRAIN))) - owner
        after = np.empty(len(order), dtype=bool)
        after[order] = past > 0
        both.disliked_part[rows] = of_user[dataset.user_codes[rows]]
        both.disliked_target[rows] = (both.disliked_part[rows] == TRAIN) | after[rows]
        return
    latest = np.empty(len(order), dtype=np.int8)
    latest[order] = np.maximum.accumulate(owner + reached) - owner
    both.disliked_part[rows] = latest[rows]
