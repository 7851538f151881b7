"""What is known of a user when a target is predicted: decided here, once, for all that reads histories.

The rule: of the interactions that the split allows for a part (`Split.history_rows`), those are known that
precede the target. Rows are ordered by time, and rows of one second by their place in the log, so that an
interaction of a later second is never known. A row without a time comes before all rows that have one. In a
log without times, the place in the log stands for time.

A ranking of the whole catalog has one list for all targets of a user. It is made before the first of them:
what precedes that target is known.
"""

from __future__ import annotations

import numpy as np

from recllm.data.dataset import Dataset
from recllm.data.ordering import group_by_user_in_time
from recllm.data.splits import Split
from recllm.errors import DataError


class UserHistories:
    """The history of each user, its targets, and how much of the history precedes each target.

    Args:
        dataset: The dataset.
        history: Row numbers that histories are made of; shape [n].
        targets: Row numbers of the targets; they may be rows of histories, too.
        part: The part of the targets; those of `train` that nothing precedes are left out.

    Attributes:
        rows: Row numbers of the histories, by user and in order; shape [n].
        offsets: User `u` has `rows[offsets[u] : offsets[u + 1]]`; shape [users + 1].
        target_rows: Row numbers of the targets, by user and in order; shape [targets].
        target_offsets: As `offsets`, for `target_rows`.
        known: For each target, how many rows of its user's history precede it: the first so many are known;
            shape [targets].
    """

    def __init__(self, dataset: Dataset, history: np.ndarray, targets: np.ndarray, part: str) -> None:
        users, times, log = len(dataset.users), dataset.timestamps, len(dataset.user_codes)
        in_history, is_target = np.zeros(log, dtype=bool), np.zeros(log, dtype=bool)
        in_history[history], is_target[targets] = True, True
        rows = np.flatnonzero(in_history | is_target)
        order, offsets = group_by_user_in_time(
            dataset.user_codes[rows], None if times is None else times[rows], users
        )
        rows = rows[order]
        in_history, is_target = in_history[rows], is_target[rows]
        before = np.concatenate(([0], np.cumsum(in_history)))
        self.rows, self.offsets = rows[in_history], before[offsets]
        known = before[:-1] - np.repeat(self.offsets[:-1], np.diff(offsets))
        if part == "train":  # what nothing precedes cannot be predicted
            is_target &= known > 0
        self.target_rows, self.known = rows[is_target], known[is_target]
        self.target_offsets = np.concatenate(([0], np.cumsum(is_target)))[offsets]
        self._dataset = dataset

    @classmethod
    def of(cls, split: Split, part: str, *, dislikes: bool = False) -> UserHistories:
        """Returns the histories and targets of a part.

        For `train`, histories are the training interactions, and each that another one of the user precedes
        is a target. For `valid` and `test`, histories are what `Split.history_rows` allows, and the targets
        are the part's. The test file is opened for `test` only. With `dislikes`, those that the part allows
        are in the histories, too; they are no targets.
        """
        history = split.history_rows(part)
        if dislikes:
            history = np.union1d(history, split.history_rows(part, disliked=True))
        return cls(split.dataset, history, split.rows(part, targets=True), part)

    def before_first_target(self) -> np.ndarray:
        """Returns how many interactions of each user precede all of the user's targets.

        Returns:
            Shape [users]; the length of the history for users without a target.
        """
        first = np.diff(self.offsets)
        has_one = np.diff(self.target_offsets) > 0
        first[has_one] = self.known[self.target_offsets[:-1][has_one]]
        return first

    def before(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Returns how many interactions precede some targets.

        Args:
            users: User codes; shape [n].
            items: The targets' item codes; shape [n]. Of a target that the log repeats, the first counts.

        Returns:
            Shape [n].

        Raises:
            DataError: One is no target of the part.
        """
        users_of, items_of = self._dataset.user_codes, self._dataset.item_codes
        keys = pair_keys(users_of[self.target_rows], items_of[self.target_rows])
        return known_before(keys, self.known, pair_keys(users, items))


def training_before_held_out(split: Split) -> np.ndarray:
    """Returns how many training interactions of each user precede all held-out targets of the user: what one
    text or vector for all of these targets may be made of.

    Validation and test are opened only where the split is not in time (`Split.in_time`), and only the order
    of their targets is looked at.

    Returns:
        Shape [users]; all training interactions for users without a held-out target.
    """
    train = split.rows("train")
    held_out = [train[:0]]
    if not split.in_time:
        held_out += [split.rows(part, targets=True) for part in ("valid", "test")]
    return UserHistories(split.dataset, train, np.concatenate(held_out), "held-out").before_first_target()


def pair_keys(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Returns one number for each pair of a user and an item, both below 2**31; int64."""
    return (np.asarray(users).astype(np.int64) << 32) | np.asarray(items).astype(np.int64)


def known_before(targets: np.ndarray, known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Returns how many interactions precede the targets that are asked about.

    Args:
        targets: `pair_keys` of all targets, each user's in order; shape [targets].
        known: How many precede each; shape [targets].
        asked: `pair_keys`; shape [n]. Of a pair that stands in `targets` twice, the first one counts.

    Returns:
        int64, shape [n].

    Raises:
        DataError: A pair is not among the targets.
    """
    pairs, first = np.unique(targets, return_index=True)
    at = np.minimum(np.searchsorted(pairs, asked), max(len(pairs) - 1, 0))
    found = pairs[at] == asked if len(pairs) else np.zeros(len(asked), dtype=bool)
    if not found.all():
        row = int((~found).argmax())
        raise DataError(
            f"candidates: row {row}: its `target` is not held out of its user in this part of the split; "
            "make the candidates again"
        )
    return known[first[at]].astype(np.int64)
