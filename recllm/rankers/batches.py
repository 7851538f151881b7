"""Batches: what a ranker is given at a step, cut from the training sequences by the kind of its examples.

positions  a window of a sequence; each of its items is to be foretold from those before it (SASRec)
next       a prefix of a sequence; the item after it is to be foretold (RecBole's sequential models)
cloze      a window of a sequence, of which the model hides items and foretells them (BERT4Rec)
pairs      a user and one item of theirs (BPR and the graph models)

Sequences longer than the length of a row give several windows, laid end to end from the latest item back, so
that no interaction goes unused (ours; the papers take the latest window alone).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recllm.rankers.training_data import Histories, TrainingData

Examples = Literal["positions", "next", "cloze", "pairs"]


@dataclass(frozen=True)
class Batch:
    """Rows of histories, and in training what is to be foretold.

    Attributes:
        users: User code of each row; int64, shape [B].
        items: Item numbers, padded on the right with 0; int64, shape [B, T]. Empty for `pairs`.
        days: Days of the items since the first training interaction, 0 for padding, NaN for an interaction
            without a time; float64, shape [B, T]; None if no training interaction has a time.
        targets: Item numbers, 0 where nothing is to be foretold; int64, shape [B, T], for `pairs` [B, 1].
            None outside training.
        negatives: Item numbers that are not among the user's training items; int64, shape [B, T, K], for
            `pairs` [B, 1, K]. None where the loss takes none.
    """

    users: Tensor
    items: Tensor
    days: Tensor | None = None
    targets: Tensor | None = None
    negatives: Tensor | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def known(self) -> Tensor:
        """Where there is an item; bool, shape [B, T]."""
        return self.items > 0

    @property
    def lengths(self) -> Tensor:
        """Items of each row; int64, shape [B]."""
        return self.known.sum(1)

    def at_targets(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Picks what a criterion compares.

        Args:
            states: Shape [B, T, D].

        Returns:
            The states of the N positions with a target [N, D]; the targets' codes [N]; the negatives' codes
            [N, K] or None.
        """
        found = self.targets > 0
        negatives = None if self.negatives is None else self.negatives[found] - 1
        return states[found], self.targets[found] - 1, negatives

    def rows(self, rows: Tensor | slice) -> Batch:
        """Returns some rows, cut to the longest of them."""
        items = self.items[rows]
        longest = int((items > 0).sum(1).max()) if items.numel() else 0
        longest = max(longest, 1)

        def cut(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values[rows] if values.shape[1] != self.items.shape[1] else values[rows][:, :longest]

        return replace(
            self,
            users=self.users[rows],
            items=items[:, :longest],
            days=cut(self.days),
            targets=cut(self.targets),
            negatives=cut(self.negatives),
        )

    def by_length(self, edges: tuple[int, ...] = (4, 8, 16, 32)) -> Iterator[tuple[Tensor, Batch]]:
        """Yields groups of rows of like length, each cut to its longest: most histories are short, and what
        is padded is computed for nothing.

        Yields:
            The numbers of the rows [b], and the rows.
        """
        group = torch.bucketize(self.lengths, torch.tensor(edges, device=self.items.device))
        for number in range(len(edges) + 1):
            rows = (group == number).nonzero()[:, 0]
            if len(rows):
                yield rows, self.rows(rows)


class Epochs:
    """The training examples, shuffled anew for each epoch; the same at any number of processes.

    Args:
        data: The training part.
        examples: Their kind.
        batch_size: Examples a step, over all processes.
        length: Items a row at most.
        negatives: Negatives a target; 0 for none.
        seed: With the epoch's number it settles order and negatives.
        part: The rows of each batch that this process takes: (rank, processes).
    """

    def __init__(
        self,
        data: TrainingData,
        examples: Examples,
        *,
        batch_size: int,
        length: int = 50,
        negatives: int = 0,
        seed: int = 42,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._data, self._examples = data, examples
        self._batch_size, self._negatives, self._seed, self._part = batch_size, negatives, seed, part
        self._sampler = TrainingNegatives(data) if negatives else None
        if examples == "pairs":
            self._users, self._items = data.pairs()
            self.count = len(self._users)
        else:
            self._sequence, self._start, self._stop = windows(data.train, examples, length)
            self.count = len(self._sequence)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-self.count // self._batch_size)

    def epoch(self, number: int, device: torch.device | str = "cpu") -> Iterator[tuple[Batch, float]]:
        """Yields this process's rows of each batch, and the weight of the mean of their losses.

        The weight is the share of the whole batch's targets that are in these rows, times the number of
        processes: gradients averaged over processes are then those of the whole batch. A batch with fewer
        rows than processes is left out.
        """
        random = np.random.default_rng([self._seed, number])
        order = random.permutation(self.count)
        with ThreadPoolExecutor(1) as pool:  # the next batch is made while a step is computed
            waiting: Future[tuple[Batch, float]] | None = None
            for at in range(0, self.count, self._batch_size):
                chosen = order[at : at + self._batch_size]
                drawn = int(random.integers(2**63))  # of each batch alike, whichever rows this process takes
                if len(chosen) < self._part[1]:
                    continue
                upcoming = pool.submit(self._own_rows, chosen, drawn)
                if waiting is not None:
                    batch, share = waiting.result()
                    yield _to(batch, device), share
                waiting = upcoming
            if waiting is not None:
                batch, share = waiting.result()
                yield _to(batch, device), share

    def _own_rows(self, chosen: np.ndarray, seed: int) -> tuple[Batch, float]:
        """This process's rows of a batch, and the weight of the mean of their losses."""
        rank, processes = self._part
        places = np.arange(rank, len(chosen), processes)
        targets = self._targets_of(chosen)
        share = targets[places].sum() / targets.sum() * processes
        return self._batch(chosen[places], places, seed), float(share)

    def _targets_of(self, chosen: np.ndarray) -> np.ndarray:
        """How many targets each example has; int64, shape [B]."""
        if self._examples in ("pairs", "next"):
            return np.ones(len(chosen), dtype=np.int64)
        return self._stop[chosen] - self._start[chosen] - (self._examples == "positions")

    def _batch(self, chosen: np.ndarray, places: np.ndarray, seed: int) -> Batch:
        """Examples as a batch; `places` are where they stand in the batch of all processes."""
        if self._examples == "pairs":
            users, targets = self._users[chosen], self._items[chosen, None] + 1
            items, days = np.zeros((len(chosen), 0), np.int64), None
        else:
            users, items, days, targets = self._windows_of(chosen)
        negatives = None
        if self._sampler is not None:
            shape = targets.shape[1], self._negatives
            negatives = self._sampler.draw(users, shape, seed, places) + 1
        return Batch(*(_tensor(each) for each in (users, items, days, targets, negatives)))

    def _windows_of(self, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        train = self._data.train
        start, stop = self._start[chosen], self._stop[chosen]
        shift = 0 if self._examples == "cloze" else 1
        places, inside = _places(start, stop - shift)
        items = np.where(inside, train.items[places], 0).astype(np.int64)
        days = None if train.days is None else np.where(inside, train.days[places], 0)
        if self._examples == "next":
            last = np.arange(items.shape[1]) == (stop - start - 2)[:, None]
            targets = np.where(last, train.items[stop - 1][:, None], 0)
        else:
            targets = np.where(inside, train.items[np.minimum(places + shift, len(train.items) - 1)], 0)
        users = train.users[self._sequence[chosen]].astype(np.int64)
        return users, items, days, targets.astype(np.int64)


class TrainingNegatives:
    """Draws items uniformly from those that a user has no training interaction with.

    Held-out items may be drawn: to spare them would tell them (as the sampler of S3-Rec and STOSA does).
    """

    def __init__(self, data: TrainingData) -> None:
        users, items = data.pairs()
        self._pairs, self._n_items = users * data.n_items + items, data.n_items

    def draw(
        self, users: np.ndarray, shape: tuple[int, ...], seed: int, places: np.ndarray | None = None
    ) -> np.ndarray:
        """Draws `shape` items for each user.

        The draws of a row depend on the seed and the row's place alone, so that each process can draw those
        of its own rows.

        Args:
            users: User codes; shape [B].
            shape: What is drawn for each.
            seed: Settles the draws; 0 or more, below 2^63.
            places: A number for each row, below 2^31; shape [B]; 0 to B - 1 when None.

        Returns:
            Item codes; int64, shape [B, *shape]. A user who has touched all items gets any.
        """
        each = math.prod(shape)
        owner = np.repeat(users, each)
        places = np.arange(len(users)) if places is None else places
        stream = (places.astype(np.uint64)[:, None] << np.uint64(32)) + np.arange(each, dtype=np.uint64)
        stream = _mixed(stream.reshape(-1) ^ _mixed(np.uint64([seed])))
        drawn = self._codes(stream, 0)
        pending = np.arange(len(owner))
        for attempt in range(1, 65):
            pending = pending[self._touched(owner[pending], drawn[pending])]
            if not len(pending):
                break
            drawn[pending] = self._codes(stream[pending], attempt)
        for place in pending[self._touched(owner[pending], drawn[pending])]:  # nearly all items are touched
            first = np.searchsorted(
                self._pairs, [owner[place] * self._n_items, (owner[place] + 1) * self._n_items]
            )
            left = np.setdiff1d(np.arange(self._n_items), self._pairs[slice(*first)] % self._n_items)
            if len(left):
                drawn[place] = left[drawn[place] % len(left)]
        return drawn.reshape(len(users), *shape)

    def _codes(self, stream: np.ndarray, attempt: int) -> np.ndarray:
        """One draw from 0 to I - 1 for each number of a stream; int64."""
        mixed = _mixed(stream + np.uint64(attempt * 0x9E3779B97F4A7C15 % 2**64))
        return (mixed % np.uint64(self._n_items)).astype(np.int64)

    def _touched(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        asked = users * self._n_items + items
        found = np.minimum(np.searchsorted(self._pairs, asked), len(self._pairs) - 1)
        return self._pairs[found] == asked


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Maps 64-bit integers to others that look drawn: the finalizer of SplitMix64 (Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def windows(train: Histories, examples: Examples, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts sequences into examples.

    Args:
        train: The sequences.
        examples: `positions`, `next` or `cloze`.
        length: Items of a row.

    Returns:
        For each example its sequence, and where in `train.items` it starts and stops; with the target of
        `positions` and `next`, so that these have up to `length + 1` items, and at least two.
    """
    counts = np.diff(train.offsets)
    if examples == "next":
        per = np.maximum(counts - 1, 0)
    else:
        covered = counts if examples == "cloze" else counts - 1  # items that are targets
        per = np.maximum(-(-covered // length), 0)
    sequence = np.repeat(np.arange(len(train)), per)
    nth = np.arange(len(sequence)) - np.repeat(np.cumsum(per) - per, per)
    begin, end = train.offsets[:-1][sequence], train.offsets[1:][sequence]
    if examples == "next":
        stop = end - nth
        return sequence, np.maximum(begin, stop - length - 1), stop
    stop = end - nth * length
    return sequence, np.maximum(begin, stop - length - (examples == "positions")), stop


def history_batch(
    data: TrainingData,
    histories: Histories,
    users: np.ndarray,
    length: int,
    device: torch.device | str,
    known: np.ndarray | None = None,
) -> Batch:
    """Returns the latest `length` known items of each user; rows of padding for users without a history.

    Args:
        data: What the ranker knows.
        histories: What may be known of the users by now.
        users: User codes; shape [B].
        length: Items a row at most.
        device: Where the batch goes.
        known: How many items of each user's history are known; shape [B]. None: all.
    """
    users = users.astype(np.int64)
    timed = data.train.days is not None
    if len(histories.items):
        at = np.minimum(np.searchsorted(histories.users, users), len(histories) - 1)
        has_one = histories.users[at] == users
        begin, stop = (
            np.where(has_one, each[at], 0) for each in (histories.offsets[:-1], histories.offsets[1:])
        )
        if known is not None:
            stop = np.minimum(stop, begin + known)
        places, inside = _places(np.maximum(begin, stop - length), stop)
        items = np.where(inside, histories.items[places], 0).astype(np.int64)
        days = np.where(inside, histories.days[places], 0) if timed and histories.days is not None else None
    else:  # nobody has a history
        items = np.zeros((len(users), 1), np.int64)
        days = np.zeros(items.shape) if timed else None
    return _to(Batch(*(_tensor(each) for each in (users, items, days))), device)


def _places(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = max(int((stop - start).max(initial=0)), 1)
    places = start[:, None] + np.arange(width)
    inside = places < stop[:, None]
    return np.where(inside, places, 0), inside


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values))


def _to(batch: Batch, device: torch.device | str) -> Batch:
    parts = (batch.users, batch.items, batch.days, batch.targets, batch.negatives)
    return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in parts))
