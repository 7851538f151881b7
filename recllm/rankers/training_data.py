"""What a ranker may know: the training interactions, and what the catalog says of its items.

Items are numbered from 1 in sequences (0 is the padding, as in `recllm.data.sequences`) and from 0 in tables
of items ("codes"): number = code + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl

from recllm.data.dataset import NO_TIME
from recllm.data.sequences import Sequences, open_sequences
from recllm.data.splits import HeldOut, Split
from recllm.rankers.features import Features
from recllm.rankers.user_texts import UserFeatures

SECONDS_A_DAY = 86_400
_CURRENCY = r"\s*(?:[$€£¥]|[A-Za-z]{3})?\s*"
_PRICE = rf"^{_CURRENCY}(\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+){_CURRENCY}$"


@dataclass(frozen=True)
class Histories:
    """Sequences of item numbers in time, one for each of some users.

    Attributes:
        users: User code of each; shape [sequences].
        offsets: Sequence `i` is `items[offsets[i] : offsets[i + 1]]`; shape [sequences + 1].
        items: Item numbers; shape [interactions].
        days: When, in days since the first training interaction; float64, shape [interactions]; NaN for an
            interaction without a time; None if no training interaction has one. Raw seconds are so large that
            a cosine of them says nothing.
    """

    users: np.ndarray
    offsets: np.ndarray
    items: np.ndarray
    days: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class TrainingData:
    """The training part of a split, and the features of the catalog. Nothing of validation or test.

    Attributes:
        n_users: Users of the dataset, of which some may have no training interaction.
        n_items: Items of the dataset, of which some may have no training interaction.
        train: Each training user's interactions.
        features: Frozen vectors of a modality ("text", "image") for each item.
        user_features: Frozen vectors of texts about users; None where no ranker asked for them.
        categories: Which items are of which category; bool, shape [items, categories]; None where the catalog
            has none.
        prices: The price of each item, NaN where it is not known; float32, shape [items]; None where the
            catalog has no prices.
        first_second: UTC second of the first training interaction that has a time, from which days are
            counted; None if none has one.
    """

    n_users: int
    n_items: int
    train: Histories
    features: Mapping[str, Features] = field(default_factory=dict)
    categories: np.ndarray | None = None
    prices: np.ndarray | None = None
    first_second: int | None = None
    user_features: UserFeatures | None = None

    @classmethod
    def of(
        cls,
        split: Split,
        features: Mapping[str, Features] | None = None,
        user_features: UserFeatures | None = None,
    ) -> TrainingData:
        """Reads the training part of a split."""
        sequences = open_sequences(split, "train")
        timed = sequences.timestamps[sequences.timestamps != NO_TIME]
        first = int(timed.min()) if len(timed) else None
        dataset = split.dataset
        return cls(
            len(dataset.users),
            len(dataset.items),
            _histories(sequences, first),
            dict(features or {}),
            _categories(dataset.items),
            _prices(dataset.items),
            first,
            user_features,
        )

    def known_before(self, split: Split, part: HeldOut) -> Histories:
        """Returns what is known of each user before the first of the user's targets of `part`.

        The test file is opened for `test` only.
        """
        sequences = open_sequences(split, part)
        whole = _histories(sequences, self.first_second)
        return _first(whole, sequences.ends() - whole.offsets[:-1])

    def known_before_each(
        self, split: Split, part: HeldOut, users: np.ndarray, targets: np.ndarray
    ) -> tuple[Histories, np.ndarray]:
        """Returns what is known of users before each of some targets.

        Args:
            split: The split.
            part: The part of the targets; the test file is opened for `test` only.
            users: User codes; shape [N].
            targets: Item codes; shape [N].

        Returns:
            Histories up to each user's last target, and how many items of them precede each of the given
            ones; int64, shape [N].

        Raises:
            DataError: One is no target of its user.
        """
        sequences = open_sequences(split, part)
        return _histories(sequences, self.first_second), sequences.before(users, targets + 1)

    def knowing(self, histories: Histories) -> TrainingData:
        """Returns data in which the users' interactions are those of training and what else is known of them.

        A trained ranker that is made from these data propagates over the graph of then; it fits the same
        weights. On a split that is not in time, training interactions may be later than a target: they stay,
        for the weights have learned from them.

        Args:
            histories: What `known_before` returns. Users without training interactions are left out, as no
                weight of theirs was trained.
        """
        train = self.train
        known = _select(histories, np.isin(histories.users, train.users))
        owners = _owners(train), _owners(known)
        old, new = (
            owner * (self.n_items + 1) + each.items
            for owner, each in zip(owners, (train, known), strict=True)
        )
        later = ~np.isin(new, old)
        owner = np.concatenate([owners[0], owners[1][later]])
        order = np.argsort(owner, kind="stable")
        users, counts = np.unique(owner, return_counts=True)
        days = None
        if train.days is not None and known.days is not None:
            days = np.concatenate([train.days, known.days[later]])[order]
        items = np.concatenate([train.items, known.items[later]])[order]
        return replace(self, train=Histories(users, np.concatenate(([0], np.cumsum(counts))), items, days))

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns user codes and item codes of the distinct training pairs, by user."""
        distinct = np.unique(_owners(self.train) * self.n_items + (self.train.items - 1))
        return distinct // self.n_items, distinct % self.n_items


def _histories(sequences: Sequences, first: int | None) -> Histories:
    days = None if first is None else days_since(first, np.asarray(sequences.timestamps))
    return Histories(
        np.asarray(sequences.users), np.asarray(sequences.offsets), np.asarray(sequences.items), days
    )


def days_since(first: int, seconds: np.ndarray) -> np.ndarray:
    """Converts UTC seconds to days since the second `first`; NaN where the time is `NO_TIME`."""
    known = seconds != NO_TIME
    return np.where(known, (np.where(known, seconds, first) - first) / SECONDS_A_DAY, np.nan)


def _owners(histories: Histories) -> np.ndarray:
    """The user of each interaction; int64, shape [interactions]."""
    return np.repeat(histories.users.astype(np.int64), np.diff(histories.offsets))


def _first(histories: Histories, counts: np.ndarray) -> Histories:
    """Cuts each history to its first so many interactions."""
    lengths = np.diff(histories.offsets)
    if np.array_equal(counts, lengths):
        return histories
    rows = np.arange(len(histories.items)) < np.repeat(histories.offsets[:-1] + counts, lengths)
    days = None if histories.days is None else histories.days[rows]
    return Histories(histories.users, np.concatenate(([0], np.cumsum(counts))), histories.items[rows], days)


def _select(histories: Histories, wanted: np.ndarray) -> Histories:
    counts = np.diff(histories.offsets)
    rows = np.repeat(wanted, counts)
    days = None if histories.days is None else histories.days[rows]
    offsets = np.concatenate(([0], np.cumsum(counts[wanted])))
    return Histories(histories.users[wanted], offsets, histories.items[rows], days)


def _categories(items: pl.DataFrame) -> np.ndarray | None:
    """Which items are of which category: [items, categories]."""
    listed = items.select(pl.col("categories").list.unique()).with_row_index("row").explode("categories")
    listed = listed.drop_nulls()
    if not listed.height:
        return None
    names = listed["categories"].unique().sort()
    marks = np.zeros((len(items), len(names)), dtype=bool)
    marks[listed["row"].to_numpy(), names.search_sorted(listed["categories"]).to_numpy()] = True
    return marks


def _prices(items: pl.DataFrame) -> np.ndarray | None:
    """Prices above zero where the catalog has a column `price` of numbers, or of text such as $1,212.50.

    What reads otherwise (a range, a comma for a point) is a price that is not known.
    """
    if "price" not in items.columns:
        return None
    price = items["price"]
    if not (price.dtype.is_numeric() or price.dtype == pl.String):
        return None
    if price.dtype == pl.String:
        price = price.str.extract(_PRICE, 1).str.replace_all(",", "")
    price = price.cast(pl.Float32, strict=False).to_numpy().astype(np.float32)
    prices = np.where(np.isfinite(price) & (price > 0), price, np.nan).astype(np.float32)
    return None if np.isnan(prices).all() else prices
