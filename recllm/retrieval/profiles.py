"""Mean-profile retrieval (VLM4Rec, arXiv 2603.12625, section 3.5): no training, no order, only texts.

    e~_i = e_i / |e_i|                            (14) each item's vector at unit length
    r_u  = mean of e~_i over the history H_u      (15)
    r~_u = r_u / |r_u|                            (16)
    score(u, j) = r~_u . e~_j                     (17) the cosine

The released code averages vectors that were not normalized; here the paper's order holds, unless `raw` asks
for the other. The paper takes the latest 10 items and excludes the history from the candidates; one of the
released scripts takes all items and excludes none. Ours is what is done where texts are missing: an item
without a text is in no profile, and `recllm.evaluation.coverage` says how it is ranked; a user none of whose
known items has a text gets 0 for every item, a tie of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import polars as pl
from scipy import sparse

from recllm.data.coding import codes_of
from recllm.data.splits import HeldOut, Split
from recllm.data.user_histories import UserHistories
from recllm.errors import DataError

_BLOCK = 8192  # candidate rows scored at a time


class MeanProfiles:
    """Users as means of the items that are known of them before a target (`recllm.data.user_histories`).

    A score is the inner product of the two vectors that `of_users` and `item_vectors` give; it says nothing
    of items without a text, whose vectors are zero.

    Args:
        split: The split.
        part: `valid` or `test`: whose targets are to be ranked.
        vectors: One for each item code; shape [items, d]; they may be memory-mapped.
        present: Which items have a text; bool, shape [items].
        history: Only the latest so many known interactions with a text count; 0 for all. A repeated
            interaction counts as often as it stands in the log.
        raw: Average the vectors as they come: (14) is left out (as the released code has it).

    Attributes:
        without_profile: Which users have no item with a text before the first of their targets; bool, shape
            [users].

    Raises:
        DataError: `history` is negative, or no item has a text.
        ValueError: The shapes do not fit the dataset, or a present vector is zero or not finite.
    """

    def __init__(
        self,
        split: Split,
        part: HeldOut,
        vectors: np.ndarray,
        present: np.ndarray,
        *,
        history: int = 0,
        raw: bool = False,
    ) -> None:
        dataset = split.dataset
        if history < 0:
            raise DataError(f"--history {history}: expected 0 (all) or more")
        if len(vectors) != len(dataset.items) or present.shape != vectors.shape[:1]:
            raise ValueError(f"{len(vectors)} vectors, {len(present)} marks, {len(dataset.items)} items")
        if not present.any():
            raise DataError(f"{dataset.folder}: no item has a text, so there is nothing to retrieve by")
        length = np.concatenate(
            [_lengths(vectors[at : at + _BLOCK]) for at in range(0, len(vectors), _BLOCK)]
        )
        if not (np.isfinite(length) & (length > 0))[present].all():
            raise ValueError("the vector of an item with a text is zero or not finite")
        self._vectors, self._present, self._raw = vectors, present, raw
        self._length = np.where(present, length, 1)
        self._item_ids, self._user_ids = dataset.items["item"], dataset.users["user"]
        self._histories, self._history = UserHistories.of(split, part), history
        # How many of the interactions up to each one are with an item that has a text.
        known = dataset.item_codes[self._histories.rows]
        with_text = present[known]
        self._known = known[with_text]
        self._before = np.concatenate(([0], np.cumsum(with_text)))
        self._first = self._histories.before_first_target()
        self.without_profile = self._counts(np.arange(len(self._first)), self._first) == 0

    def of_users(self, users: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
        """Returns the profiles of some users.

        Args:
            users: User codes; shape [n].
            known: How many interactions of each user's history are known; shape [n]. None: those before the
                first of the user's targets.

        Returns:
            float32, shape [n, d]: a unit vector, or zeros for a user without a profile.
        """
        known = self._first[users] if known is None else known
        counts = self._counts(users, known)
        ends = self._before[self._histories.offsets[users] + known]
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        items = self._known[np.repeat(ends - counts, counts) + places]
        weights = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
        offsets = np.concatenate(([0], np.cumsum(counts)))
        distinct, place = np.unique(items, return_inverse=True)
        mean_of = sparse.csr_array((weights, place, offsets), shape=(len(users), len(distinct)))
        mean = mean_of @ (self._vectors[distinct].astype(np.float32) if self._raw else self._unit(distinct))
        length = np.linalg.norm(mean.astype(np.float64), axis=1, keepdims=True)
        has_one = (counts > 0) & (length[:, 0] > 0)
        profiles = np.zeros(mean.shape, dtype=np.float32)
        profiles[has_one] = mean[has_one] / length[has_one]
        return profiles

    def for_ranking(self, users: np.ndarray) -> tuple[Callable[[slice], np.ndarray], np.ndarray]:
        """Returns what `recllm.evaluation.rank_catalog` takes: profiles are made when a block of users is
        ranked, so that they are never all in memory.

        Args:
            users: User codes; shape [n].
        """
        return lambda part: self.of_users(users[part]), self.item_vectors

    def score(self, candidates: pl.DataFrame) -> pl.DataFrame:
        """Scores candidate lists, a block of rows at a time.

        Args:
            candidates: `user, target, item, label`, as `recllm.data.candidates` writes them. Each list is
                scored by what precedes its target; without the column `target`, by what precedes the first
                of the user's targets.

        Returns:
            `user, target, item, score` (float32), one row for each candidate. Items with equal vectors have
            equal scores.

        Raises:
            DataError: A user or item is not in the dataset, or a target is none of the part.
        """
        users = codes_of(candidates["user"], self._user_ids, "user")
        items = codes_of(candidates["item"], self._item_ids, "item")
        known = self._first[users]
        if "target" in candidates.columns:
            known = self._histories.before(users, codes_of(candidates["target"], self._item_ids, "item"))
        scores = np.empty(len(users), dtype=np.float32)
        for start in range(0, len(users), _BLOCK):
            block = slice(start, start + _BLOCK)
            pairs = np.stack([users[block], known[block]])
            asked, place = np.unique(pairs, axis=1, return_inverse=True)
            # Products and sums row by row: a matrix product may round equal rows differently.
            profiles = self.of_users(*asked)[place.reshape(-1)]
            scores[block] = (profiles * self._unit(items[block])).sum(axis=1)
        keys = [name for name in ("user", "target", "item") if name in candidates.columns]
        return candidates.select(keys).with_columns(score=pl.Series(scores))

    @functools.cached_property
    def item_vectors(self) -> np.ndarray:
        """Of unit length, zero for items without a text; float32, shape [items, d]."""
        return self._unit(np.arange(len(self._vectors)))

    def _unit(self, items: np.ndarray) -> np.ndarray:
        """The rows of some items at unit length; only these are read where the vectors are memory-mapped."""
        unit = np.zeros((len(items), self._vectors.shape[1]), dtype=np.float32)
        here = self._present[items]
        unit[here] = self._vectors[items[here]] / self._length[items[here], None]
        return unit

    def _counts(self, users: np.ndarray, known: np.ndarray) -> np.ndarray:
        """How many known interactions with a text make each user's profile; shape [n]."""
        begin = self._histories.offsets[users]
        counts = self._before[begin + known] - self._before[begin]
        return np.minimum(counts, self._history) if self._history else counts


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors.astype(np.float64), axis=1)
