"""Who touched what, in order of time, as far as it may be known when the targets of a part are predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from recllm.data.dataset import NO_TIME
from recllm.data.splits import Split
from recllm.data.user_histories import UserHistories
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

    def first(self, count: int) -> History:
        """Returns the history cut to its first interactions."""
        return History(self.user, self.rows[:count], self.items[:count])

    def latest(self, count: int) -> History:
        """Returns the history cut to its latest interactions; all of them where `count` is 0."""
        return self if count == 0 else History(self.user, self.rows[-count:], self.items[-count:])


class Histories:
    """The histories of all users for one part, and its targets; see `recllm.data.user_histories`.

    For `train`, the history of a user is the training interactions, and each of them but the first may be a
    target that what precedes it predicts. For `valid` and `test`, it is what `Split.history_rows` allows, of
    which each target may be told what precedes it. Only `test` opens the test file.

    Args:
        split: The split.
        part: `train`, `valid` or `test`.
        dislikes: Histories hold what the user rated below the split's threshold, too.

    Attributes:
        part: `train`, `valid` or `test`.
        allowed: Which interactions may be shown for some target of the part; shape [interactions], bool.
    """

    def __init__(self, split: Split, part: str, *, dislikes: bool = False) -> None:
        self.split, self.part = split, part
        self._of = UserHistories.of(split, part, dislikes=dislikes)
        self.allowed = np.zeros(len(split.dataset.user_codes), dtype=bool)
        self.allowed[self._of.rows] = True
        self._codes, self._times = split.dataset.item_codes, split.dataset.timestamps

    def history(self, user: int) -> History:
        """Returns a user's history, whatever its time."""
        rows = self._of.rows[self._of.offsets[user] : self._of.offsets[user + 1]]
        return History(user, rows, self._codes[rows])

    def targets(self, user: int) -> list[Target]:
        """Returns a user's targets, in order of time."""
        span = slice(self._of.target_offsets[user], self._of.target_offsets[user + 1])
        rows, known = self._of.target_rows[span].tolist(), self._of.known[span].tolist()
        return [
            Target(
                row, int(self._codes[row]), NO_TIME if self._times is None else int(self._times[row]), count
            )
            for row, count in zip(rows, known, strict=True)
        ]

    def users(self) -> Iterator[int]:
        """Yields the users that have a target, in the order of the users table."""
        yield from np.flatnonzero(np.diff(self._of.target_offsets)).tolist()

    def cuts(self, user: int) -> list[int]:
        """Returns where texts about a user's history are to end, ascending: before each target that has a
        history; for `train` before the last one."""
        span = slice(self._of.target_offsets[user], self._of.target_offsets[user + 1])
        known = np.unique(self._of.known[span])
        return (known[-1:] if self.part == "train" else known[known > 0]).tolist()

    def known_before(self, row: int, shown: np.ndarray) -> bool:
        """Tells whether rows of the interactions may be shown for a target, from the log itself: each is one
        that the part allows, of the target's user, and earlier than the target.

        Args:
            row: The target's row number.
            shown: Row numbers; shape [n].
        """
        users = self.split.dataset.user_codes
        allowed = self.allowed[shown] & (users[shown] == users[row])
        return bool((self.precedes(shown, row) & allowed).all())

    def precedes(self, rows: np.ndarray, row: int) -> np.ndarray:
        """Tells which of `rows` come before `row` in time and then in the log; bool, shape [n]."""
        if self._times is None:
            return rows < row
        times = self._times
        return (times[rows] < times[row]) | ((times[rows] == times[row]) & (rows < row))

    def place(self, row: int) -> tuple[int, int]:
        """Returns what interactions are ordered by: time, then place in the log."""
        return (0 if self._times is None else int(self._times[row])), row


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
