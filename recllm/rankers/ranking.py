"""A ranker's scores for lists: of the whole catalog, and of candidate files.

A ranker of pairs that can do so folds users in whom training did not know (see `PairRanker.fold_in`). A user
of whom nothing may be known by then (no history; for other rankers of pairs, no training interaction) gets
equal scores for all items, a tie that metrics count as what it is worth (ours; others rank by chance or by
untrained vectors).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy import sparse
from torch import Tensor

from recllm.data.candidates import FullRanking
from recllm.data.coding import codes_of
from recllm.data.splits import HeldOut, Split
from recllm.errors import DataError
from recllm.graphs.propagation import interaction_matrix
from recllm.rankers import RANKERS, ranker_class
from recllm.rankers.batches import Batch, history_batch
from recllm.rankers.ranker import PairRanker, Ranker, SequenceRanker, Without
from recllm.rankers.training_data import Histories, TrainingData

ROWS = 1024  # histories that are read at a time
_SCORES = 2**22  # scores that are held at a time where they are no inner products


class UserStates:
    """What a ranker makes of users, and what it compares them with.

    Args:
        ranker: The ranker, on its device; it is put into evaluation mode.
        data: What it was made from.
        histories: What may be known of the users by now.
        users: Their codes; int64, shape [L].
        known: How many items of each one's history are known; shape [L]. None: all.
        without: Modalities that are left out.

    Attributes:
        states: Shape [L, D].
        items: Shape [I, D].
    """

    @torch.no_grad()
    def __init__(
        self,
        ranker: Ranker,
        data: TrainingData,
        histories: Histories,
        users: np.ndarray,
        known: np.ndarray | None = None,
        *,
        without: Without = (),
    ) -> None:
        self._ranker = ranker.eval()
        device = next(ranker.parameters()).device
        if isinstance(ranker, SequenceRanker):
            self.items = ranker.item_vectors(without=without).detach()
            parts = []
            for at in range(0, len(users), ROWS):
                block = slice(at, at + ROWS)
                counts = None if known is None else known[block]
                batch = history_batch(data, histories, users[block], ranker.config.length, device, counts)
                parts.append(_states(ranker, batch, without))
            self.states = torch.cat(parts).detach()
        else:
            vectors, self.items = (each.detach() for each in ranker.vectors(without=without))
            codes = torch.from_numpy(users).to(device)
            served = ranker.served
            if served is None:
                served = np.zeros(data.n_users, dtype=bool)
                served[data.train.users] = True
            self.states = vectors[codes] * torch.from_numpy(served[users]).to(device)[:, None]
            if ranker.folds_in and not served[users].all():
                unknown = np.flatnonzero(~served[users])
                interactions = _interactions(histories, users[unknown], data.n_items)
                folded = ranker.fold_in(interactions, without=without)
                self.states[torch.from_numpy(unknown).to(device)] = folded

    def for_ranking(self) -> Any:
        """Returns what `rank_catalog` takes: tables whose inner products are scores, or a function."""
        if type(self._ranker).score is Ranker.score:
            pair = self.states, self.items
            return tuple(each.numpy() for each in pair) if self.states.device.type == "cpu" else pair
        return self._score_rows

    @torch.no_grad()
    def of_pairs(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Returns the scores of some items for some users.

        Args:
            rows: Places in `users`; shape [N].
            items: Item codes; shape [N].

        Returns:
            float32, shape [N].
        """
        scores = np.empty(len(rows), dtype=np.float32)
        if type(self._ranker).score is Ranker.score:
            for at in range(0, len(rows), 2**16):
                part = slice(at, at + 2**16)
                # Products and sums row by row: a matrix product may round equal rows differently.
                product = self.states[rows[part]] * self.items[items[part]]
                scores[part] = product.sum(1).cpu().numpy()
            return scores
        step = max(_SCORES // len(self.items), 1)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], np.arange(0, len(self.states) + step, step))
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            block = self._score_rows(slice(number * step, (number + 1) * step))
            here = order[first:last]
            scores[here] = block[rows[here] - number * step, items[here]]
        return scores

    @torch.no_grad()
    def _score_rows(self, rows: slice) -> np.ndarray:
        step = max(_SCORES // len(self.items), 1)
        states = self.states[rows]
        parts = [
            self._ranker.score(states[at : at + step], self.items).cpu().numpy()
            for at in range(0, len(states), step)
        ]
        return np.concatenate(parts)


def _states(ranker: SequenceRanker, batch: Batch, without: Without) -> Tensor:
    states = [(rows, ranker.states(part, without=without)) for rows, part in batch.by_length()]
    whole = torch.empty(len(batch), states[0][1].shape[1], device=batch.items.device)
    for rows, part in states:
        whole[rows] = part
    return whole * batch.known.any(1, keepdim=True)


def _interactions(histories: Histories, users: np.ndarray, n_items: int) -> sparse.csr_array:
    """Returns 1 where a user is known to have interacted with an item; float32, shape [users, items]."""
    if not len(histories):
        return sparse.csr_array((len(users), n_items), dtype=np.float32)
    at = np.minimum(np.searchsorted(histories.users, users), len(histories) - 1)
    counts = np.where(histories.users[at] == users, np.diff(histories.offsets)[at], 0)
    ends = np.cumsum(counts)
    places = np.repeat(histories.offsets[:-1][at] - (ends - counts), counts) + np.arange(counts.sum())
    owner = np.repeat(np.arange(len(users)), counts)
    distinct = np.unique(owner * n_items + (histories.items[places].astype(np.int64) - 1))
    return interaction_matrix(distinct // n_items, distinct % n_items, len(users), n_items)


def check_users_are_served(kind: type[Ranker], split: Split, part: HeldOut) -> None:
    """Checks that a ranker can tell at least one user of a part from another, before anything is trained.

    Raises:
        DataError: It knows users by a row of a table alone, and none of them has a training interaction.
    """
    if not issubclass(kind, PairRanker) or kind.folds_in:
        return
    codes = split.dataset.user_codes
    asked = np.unique(codes[split.rows(part, targets=True)])
    if not np.isin(asked, codes[split.rows("train")]).any():
        able = [name for name in RANKERS if getattr(ranker_class(name), "folds_in", False)]
        raise DataError(
            f"{split.folder}: none of the {len(asked):,} users with a {part} target has a training "
            f"interaction ({split.protocol}), and {kind.__name__} knows a user only by a row of a table that "
            f"these train. Take a ranker that folds users in from their history ({', '.join(able)}), a "
            "ranker of sequences (sasrec and others), or a split with each user in training (loo, ratio)"
        )


def user_states(
    ranker: Ranker,
    data: TrainingData,
    split: Split,
    part: HeldOut,
    users: np.ndarray,
    *,
    without: Without = (),
) -> UserStates:
    """Returns the states of users before their first targets of a part; the test file is opened for `test`
    only.

    Raises:
        DataError: As `check_users_are_served`.
    """
    check_users_are_served(type(ranker), split, part)
    known = data.known_before(split, part)
    return UserStates(ranker, data, known, users.astype(np.int64), without=without)


def score_candidates(
    ranker: Ranker,
    data: TrainingData,
    split: Split,
    part: HeldOut,
    candidates: pl.DataFrame,
    *,
    without: Without = (),
) -> pl.DataFrame:
    """Scores candidate lists, each by what is known of its user before its target.

    Args:
        ranker: The ranker.
        data: What it was made from.
        split: The split.
        part: The part of the lists' targets.
        candidates: `user, target, item, label`, as `recllm.data.candidates` writes them.
        without: Modalities that are left out.

    Returns:
        `user, target, item, score` (float32), one row for each candidate.

    Raises:
        DataError: A user or item is not in the dataset, or a target is not of its user and the part.
    """
    users = codes_of(candidates["user"], split.dataset.users["user"], "user")
    items = codes_of(candidates["item"], split.dataset.items["item"], "item")
    if isinstance(ranker, SequenceRanker) and "target" in candidates.columns:
        targets = codes_of(candidates["target"], split.dataset.items["item"], "item")
        histories, known = data.known_before_each(split, part, users, targets)
        (asked, known), place = np.unique(np.stack([users, known]), axis=1, return_inverse=True)
        states = UserStates(ranker, data, histories, asked, known, without=without)
    else:
        asked, place = np.unique(users, return_inverse=True)
        states = user_states(ranker, data, split, part, asked, without=without)
    scores = states.of_pairs(place.reshape(-1), items)
    keys = [name for name in ("user", "target", "item") if name in candidates.columns]
    return candidates.select(keys).with_columns(score=pl.Series(scores))


def items_with_content(ranker: Ranker, data: TrainingData, *, without: Without = ()) -> np.ndarray | None:
    """Returns the items of which a ranker that knows them by content alone has any; bool, shape [items].

    None for rankers with a vector for each item's number, which know every item.
    """
    if getattr(ranker.config, "transductive", True):
        return None
    return np.any([data.features[name].present for name in ranker.modalities if name not in without], axis=0)


def check_left(ranker: Ranker, data: TrainingData, run: Path, without: Without) -> None:
    """Checks that a trained ranker has what is to be left out, and something else to tell items by.

    Raises:
        DataError: It does not.
    """
    for name in without:
        if name not in ranker.modalities:
            raise DataError(f"--without {name}: the ranker of {run} reads no {name}; leave the option out")
        if not data.features[name].present.any():
            raise DataError(f"--without {name}: {run} was trained without it; leave the option out")
    left = [name for name in ranker.modalities if name not in without and data.features[name].present.any()]
    if without and not left and not getattr(ranker.config, "transductive", True):
        raise DataError(f"--without {' '.join(without)}: the ranker of {run} knows items by nothing else")


def some_lists(ranking: FullRanking, places: np.ndarray) -> FullRanking:
    """Returns some lists of a full ranking, by their places."""

    def gather(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = np.diff(offsets)[places]
        ends = np.cumsum(counts)
        inner = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
        return values[np.repeat(offsets[:-1][places], counts) + inner], np.concatenate(([0], ends))

    positives, positive_offsets = gather(ranking.positives, ranking.positive_offsets)
    masked, masked_offsets = gather(ranking.masked, ranking.masked_offsets)
    return replace(
        ranking,
        users=ranking.users[places],
        user_ids=ranking.user_ids.gather(places),
        positives=positives,
        positive_offsets=positive_offsets,
        masked=masked,
        masked_offsets=masked_offsets,
    )
