"""Who touched what, in order of time, as far as it may be known when the targets of a part are predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from recllm.data.dataset import NO_TIME
from recllm.data.ordering import group_by_user_in_time
from recllm.data.splits import Split
from recllm.errors import DataError


@dataclass(frozen=True)
class Target:
    """One positive that is to be predicted.

    Attributes:
        row: Its row number in the interactions.
        item: Its item code.
        time: Its UTC seconds; `NO_TIME` without one.
        known: How many interactions of the user's history precede it: the prompt may show
            `history.items[:known]`.
    """

    row: int
    item: int
    time: int
    known: int


@dataclass(frozen=True)
class History:
    """One user's interactions in order of time.

    Attributes:
        user: User code.
        rows: Row numbers in the interactions; shape [n].
        items: Item codes; shape [n].
    """

    user: int
    rows: np.ndarray
    items: np.ndarray

    def latest(self, count: int) -> History:
        """Returns the history cut to its latest interactions; all of them where `count` is 0."""
        return self if count == 0 else History(self.user, self.rows[-count:], self.items[-count:])


class Histories:
    """The histories of all users for one part, and its targets.

    For `train`, the history of a user is the training interactions, and each of them but the first may be a
    target that what precedes it predicts. For `valid` and `test`, it is what `Split.history_rows` allows, and
    the targets are the part's. Only `test` opens the test file.

    Attributes:
        part: `train`, `valid` or `test`.
        allowed: Which interactions may be shown; shape [interactions], bool.
    """

    def __init__(self, split: Split, part: str) -> None:
        dataset = split.dataset
        self.split, self.part = split, part
        rows = split.rows("train") if part == "train" else split.history_rows(part)  # type: ignore[arg-type]
        self.allowed = np.zeros(len(dataset.user_codes), dtype=bool)
        self.allowed[rows] = True
        times = dataset.timestamps
        self._times = times
        users = len(dataset.users)
        order, self._offsets = group_by_user_in_time(
            dataset.user_codes[rows], None if times is None else times[rows], users
        )
        self._rows = rows[order]
        self._items = dataset.item_codes[self._rows]
        self._target_rows = np.empty(0, dtype=np.int64)
        self._target_offsets = np.zeros(users + 1, dtype=np.int64)
        if part != "train":
            targets = split.rows(part, targets=True)
            order, self._target_offsets = group_by_user_in_time(
                dataset.user_codes[targets], None if times is None else times[targets], users
            )
            self._target_rows = targets[order]

    def history(self, user: int) -> History:
        """Returns a user's history."""
        span = slice(self._offsets[user], self._offsets[user + 1])
        return History(user, self._rows[span], self._items[span])

    def targets(self, user: int) -> list[Target]:
        """Returns a user's targets, in order of time."""
        codes = self.split.dataset.item_codes
        history = self.history(user)
        if self.part == "train":
            return [
                self._target(int(history.rows[at]), int(history.items[at]), at)
                for at in range(1, len(history.rows))
            ]
        rows = self._target_rows[self._target_offsets[user] : self._target_offsets[user + 1]]
        return [self._target(int(row), int(codes[row]), len(history.rows)) for row in rows]

    def users(self) -> Iterator[int]:
        """Yields the users that have a target and a history, in the order of the users table."""
        lengths = np.diff(self._offsets)
        if self.part == "train":
            eligible = lengths > 1
        else:
            eligible = (lengths > 0) & (np.diff(self._target_offsets) > 0)
        yield from np.flatnonzero(eligible).tolist()

    def summarized(self, user: int) -> History:
        """Returns what a preference text may tell: for `train`, the history without its last item, which is
        the last target; for `valid` and `test`, all of it."""
        history = self.history(user)
        if self.part != "train":
            return history
        return History(user, history.rows[:-1], history.items[:-1])

    def _target(self, row: int, item: int, known: int) -> Target:
        return Target(row, item, NO_TIME if self._times is None else int(self._times[row]), known)


def windows(length: int, window: int, step: int) -> list[tuple[int, int]]:
    """Cuts a history into windows that begin `step` apart and end with its last interaction.

    Args:
        length: Interactions.
        window: Interactions in a window; the last one may have fewer.
        step: Interactions between the beginnings; at most `window`.

    Returns:
        (begin, end) of each; empty for an empty history.
    """
    if window < 1 or not 1 <= step <= window:
        raise DataError(
            f"window {window}, step {step}: expected 1 <= step <= window, so that nothing is passed over"
        )
    cuts = []
    for begin in range(0, length, step):
        end = min(begin + window, length)
        cuts.append((begin, end))
        if end == length:
            break
    return cuts


def first_seen(split: Split) -> np.ndarray:
    """Returns when the training log first knew each item: UTC seconds, shape [items]; int64's largest value
    for items that it never had, and `NO_TIME` where it has no times."""
    dataset = split.dataset
    rows = split.rows("train")
    seen = np.full(len(dataset.items), np.iinfo(np.int64).max)
    times = dataset.timestamps
    codes = dataset.item_codes[rows]
    np.minimum.at(seen, codes, np.full(len(rows), NO_TIME) if times is None else times[rows])
    return seen


def training_reviews(split: Split) -> Iterator[tuple[int, list[str]]]:
    """Yields (item code, its training reviews) for each item with some, in the items table's order."""
    dataset = split.dataset
    reviews = (
        dataset.scan_interactions()
        .select("item", "review")
        .with_row_index("row")
        .join(split.scan("train").select(pl.col("row").cast(pl.UInt32)), on="row")
        .filter(pl.col("review").is_not_null())
        .sort("row")
        .group_by("item")
        .agg("review")
    )
    codes = dataset.items.select("item").with_row_index("code").lazy()
    yield from codes.join(reviews, on="item").sort("code").select("code", "review").collect().iter_rows()
