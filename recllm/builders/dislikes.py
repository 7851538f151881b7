"""Explicit negatives: what users rated below the threshold of a split with `--like`, given to their targets.

MLLM-SRec: ratings of 4 and more are positive, the rest negative, "a 1:1 negative sampling ratio is
implemented based on the time order". It says no more, so this is ours: a dislike is asked about with the
history of a target, and goes to the latest target whose known likes all precede it; of several, the first in
time come first. So no prompt about a dislike shows a like that is later than it.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from recllm.builders.histories import Histories, Target
from recllm.data.splits import Split


class Dislikes:
    """The dislikes that a part asks about, and those that are known.

    Args:
        split: The split.
        part: `train`, `valid` or `test`.
    """

    def __init__(self, split: Split, part: str) -> None:
        dataset = split.dataset
        self._items = dataset.item_codes
        asked = split.rows(part, targets=True, disliked=True)
        self._asked = self._by_user(split, asked)
        touched = np.union1d(asked, split.history_rows(part, disliked=True))
        self._touched = self._by_user(split, touched)
        self._likes = Histories(split, part)

    @staticmethod
    def _by_user(split: Split, rows: np.ndarray) -> dict[int, list[int]]:
        grouped = defaultdict(list)
        for row, user in zip(rows.tolist(), split.dataset.user_codes[rows].tolist(), strict=True):
            grouped[user].append(row)
        return grouped

    def touched(self, user: int) -> np.ndarray:
        """Returns the items that the user is known to dislike, or is asked about; they are not unobserved."""
        return self._items[np.array(self._touched.get(user, []), dtype=np.int64)]

    def of_targets(self, user: int, targets: Sequence[Target], count: int) -> dict[int, list[int]]:
        """Gives dislikes to targets.

        Args:
            user: The user's code.
            targets: The targets that are asked about, in order.
            count: The most dislikes a target.

        Returns:
            Rows of dislikes, in order, for the row of each target that has some.
        """
        given: dict[int, list[int]] = defaultdict(list)
        rows = sorted(self._asked.get(user, []), key=self._likes.place)
        if not rows or not targets:
            return given
        history = [self._likes.place(row) for row in self._likes.history(user).rows.tolist()]
        # The last like that is known before each target; a dislike must follow it.
        latest = []
        for target in targets:
            known = bisect.bisect_left(history, self._likes.place(target.row))
            latest.append(history[known - 1] if known else (np.iinfo(np.int64).min, -1))
        for row in rows:
            for at in range(bisect.bisect_left(latest, self._likes.place(row)) - 1, -1, -1):
                target, taken = targets[at], given[targets[at].row]
                items = {target.item, *(int(self._items[each]) for each in taken)}
                if len(taken) < count and int(self._items[row]) not in items:
                    taken.append(row)
                    break
        return {row: taken for row, taken in given.items() if taken}
