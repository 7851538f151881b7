"""Popularity: each item's score is its number of training interactions, the same for every user.

The baseline that everything must beat. It reads the training part alone.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from recllm.data.splits import Split


class Popularity:
    """Scores items by their training interactions.

    Attributes:
        scores: Training interactions of each item; float32, shape [items].
    """

    def __init__(self, split: Split) -> None:
        dataset = split.dataset
        counts = np.bincount(dataset.item_codes[split.rows("train")], minlength=len(dataset.items))
        self._items = dataset.items["item"]
        self.scores = counts.astype(np.float32)

    def score(self, candidates: pl.DataFrame) -> pl.DataFrame:
        """Scores candidate lists.

        Args:
            candidates: `user, target, item, label`, as `recllm.data.candidates` writes them.

        Returns:
            `user, target, item, score`, one row for each candidate.
        """
        scores = pl.DataFrame({"item": self._items, "score": self.scores})
        keys = [name for name in ("user", "target", "item") if name in candidates.columns]
        return candidates.select(keys).join(scores, on="item", how="left", maintain_order="left")

    def score_lists(self, lists: slice) -> np.ndarray:
        """Scores the whole catalog for a block of lists; float32, shape [lists, items]."""
        return np.broadcast_to(self.scores, (lists.stop - lists.start, len(self.scores)))
