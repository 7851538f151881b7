"""Negatives for training rows: items that a user did not touch, as far as training knows."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from recllm.builders.histories import Target, first_seen
from recllm.data.splits import Split
from recllm.errors import DataError

Sampling = Literal["uniform", "in_time"]
_DRAWS = 64  # draws a negative before the few items left are listed instead


class TrainingNegatives:
    """Draws negatives from the training items.

    Never an item of `touched`. Items that only the held-out parts have are not drawn either: training does
    not know of them. What a user touches later in a held-out part may be drawn, because to leave it out would
    be to tell it.

    `uniform` draws from all training items. `in_time` draws from those that the training log knew at the time
    of the positive, so that an item's age does not give the answer away; MLLM-SRec samples "based on the time
    order" and says no more, so this reading is ours.
    """

    def __init__(self, split: Split, sampling: Sampling, seed: int) -> None:
        if sampling == "in_time" and not split.dataset.has_timestamps:
            raise DataError(f"{split.dataset.folder}: --negative-sampling in_time, but the log has no times")
        if seed < 0:
            raise DataError(f"--seed {seed}: expected 0 or more")
        seen = first_seen(split)
        known = np.flatnonzero(seen < np.iinfo(np.int64).max)
        # In the order of appearance, so that "known by then" is a prefix.
        self._pool = known[np.argsort(seen[known], kind="stable")]
        self._seen = seen[self._pool]
        self._in_time = sampling == "in_time"
        self._seed = seed
        self._users, self._items = split.dataset.users["user"], split.dataset.items["item"]

    def draw(self, user: int, target: Target, touched: np.ndarray, count: int) -> list[int]:
        """Draws different negatives for one positive.

        The draw depends on the seed, the user's and the positive's id, the training items and `touched`
        alone.

        Args:
            user: The user's code.
            target: The positive.
            touched: Item codes that are no negatives, sorted.
            count: How many.

        Returns:
            Item codes; fewer than `count` where there are no more.
        """
        rng = self._rng(user, target.item)
        size = (
            int(np.searchsorted(self._seen, target.time, side="right")) if self._in_time else len(self._pool)
        )
        drawn: dict[int, None] = {}
        for _ in range(_DRAWS if size else 0):
            for item in self._pool[rng.integers(size, size=2 * count)].tolist():
                if len(drawn) < count and not _contains(touched, item):
                    drawn[item] = None
            if len(drawn) >= count:
                return list(drawn)
        left = np.setdiff1d(self._pool[:size], np.concatenate([touched, np.array(list(drawn), dtype=int)]))
        return [*drawn, *rng.permutation(left)[: count - len(drawn)].tolist()]

    def _rng(self, user: int, item: int) -> np.random.Generator:
        name = f"{len(self._users[user])} {self._users[user]} {self._items[item]}"
        return np.random.default_rng([self._seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])])


def _contains(ordered: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(ordered, value))
    return place < len(ordered) and ordered[place] == value
