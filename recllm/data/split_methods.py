"""The split methods: each assigns every interaction to a part, and names its protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import polars as pl

from recllm.data.coverage import covering_parts
from recllm.data.dataset import NO_TIME, Dataset
from recllm.data.ordering import group_by_user, group_by_user_in_time
from recllm.errors import DataError

PARTS = ("train", "valid", "test")
TRAIN, VALID, TEST, UNUSED = 0, 1, 2, 3


@dataclass
class Assignment:
    """Which part each interaction belongs to.

    Attributes:
        protocol: The split's part of the protocol string.
        part: `TRAIN`, `VALID`, `TEST` or `UNUSED` for each interaction; int8, shape [interactions].
        target: Whether it is to be predicted; shape [interactions]. Training rows all are.
        facts: Counts for the manifest.
        warnings: What a reader of results on this split should know.
        dropped: Targets left out of evaluation (cold ones); shape [interactions]. None where there are none.
        disliked_part: Which part each dislike belongs to, `UNUSED` for all else; None without `--like`.
        disliked_target: Which dislikes are asked about; the others are history. None without `--like`.
    """

    protocol: str
    part: np.ndarray
    target: np.ndarray
    facts: dict[str, int | float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    dropped: np.ndarray | None = None
    disliked_part: np.ndarray | None = None
    disliked_target: np.ndarray | None = None

    def targets_of(self, part: int) -> np.ndarray:
        """True for each target of a part; shape [interactions]."""
        targets = (self.part == part) & self.target
        return targets if self.dropped is None else targets & ~self.dropped


def leave_one_out(dataset: Dataset) -> Assignment:
    """Each user's last interaction is the test target, the one before it the validation target.

    Users with fewer than three interactions, or whose last two have no time in a log with times, are all
    training.
    """
    order, offsets = _in_time(dataset)
    lengths = np.diff(offsets)
    last, second = order[np.maximum(offsets[1:] - 1, 0)], order[np.maximum(offsets[1:] - 2, 0)]
    eligible = lengths >= 3
    if dataset.has_timestamps:
        eligible &= dataset.timestamps[second] != NO_TIME
    part = np.zeros(len(order), dtype=np.int8)
    part[second[eligible]] = VALID
    part[last[eligible]] = TEST
    return Assignment("loo", part, np.ones(len(order), dtype=bool))


def per_user_ratio(dataset: Dataset, ratios: np.ndarray, order: str, seed: int) -> Assignment:
    """Splits each user's interactions by shares, at random or with the last ones held out.

    Sizes are those of MMRec's 8:1:1 files: of n interactions `floor(test share)` but at least one are test,
    `ceil(training share)` are training, the rest validation, at least one. Users with fewer than three are
    training.
    """
    shares = ratios / ratios.sum()
    rows = len(dataset.user_codes)
    if order == "time":
        grouped, offsets = _in_time(dataset)
        protocol = f"ratio-time-{_name(ratios)}"
    else:
        shuffled = np.random.default_rng(seed).permutation(rows)
        grouped, offsets = group_by_user(dataset.user_codes[shuffled], len(dataset.users))
        grouped = shuffled[grouped]
        protocol = f"ratio-{_name(ratios)}-seed{seed}"
    lengths = np.diff(offsets)
    splittable = lengths >= 3
    test = np.where(splittable, np.clip(np.floor(lengths * shares[2] + 1e-9), 1, lengths - 2), 0)
    train = np.where(splittable, np.minimum(np.ceil(lengths * shares[0] - 1e-9), lengths - test - 1), lengths)
    place = np.arange(rows) - np.repeat(offsets[:-1], lengths)
    part = np.empty(rows, dtype=np.int8)
    first_valid, first_test = np.repeat(train, lengths), np.repeat(lengths - test, lengths)
    part[grouped] = np.where(place < first_valid, TRAIN, np.where(place < first_test, VALID, TEST))
    assignment = Assignment(protocol, part, np.ones(rows, dtype=bool))
    _without_untimed_targets(dataset, assignment)
    return assignment


def random_samples(dataset: Dataset, ratios: np.ndarray, seed: int, *, cover: bool = False) -> Assignment:
    """Splits interactions at random, whoever they belong to (MLLM-SRec, experiments: random 80/10/10).

    Args:
        dataset: The dataset.
        ratios: Shares of training, validation and test.
        seed: The seed.
        cover: Users and items stand in training and in test, as far as that can be (see
            `recllm.data.coverage`); the paper says that it is ensured.
    """
    rows = len(dataset.user_codes)
    train, valid = _cut(rows, ratios)
    part = np.full(rows, TEST, dtype=np.int8)
    random = np.random.default_rng(seed)
    if cover:
        timed = np.ones(rows, dtype=bool)
        if dataset.has_timestamps:
            timed = dataset.timestamps != NO_TIME
        counts = len(dataset.users), len(dataset.items)
        sizes = valid, rows - train - valid
        held_out = covering_parts(dataset.user_codes, dataset.item_codes, *counts, timed, sizes, random)
        part[:] = TRAIN
        part[held_out[0]], part[held_out[1]] = VALID, TEST
    else:
        shuffled = random.permutation(rows)
        part[shuffled[:train]], part[shuffled[train : train + valid]] = TRAIN, VALID
    protocol = f"random-{_name(ratios)}{'-cover' * cover}-seed{seed}"
    assignment = Assignment(protocol, part, np.ones(rows, dtype=bool))
    _without_untimed_targets(dataset, assignment)
    return assignment


def by_user(dataset: Dataset, ratios: np.ndarray, seed: int) -> Assignment:
    """Splits the users (MMSRARec, MLLM-MSR: 8:1:1); a held-out user's last interaction is the target.

    The held-out users' earlier interactions are in their part with `target` false. Users with one
    interaction, or whose last one has no time, are training users.
    """
    order, offsets = _in_time(dataset)
    n_users = len(dataset.users)
    last = order[np.maximum(offsets[1:] - 1, 0)]
    eligible = np.diff(offsets) >= 2
    if dataset.has_timestamps:
        eligible &= dataset.timestamps[last] != NO_TIME
    train, valid = _cut(n_users, ratios)
    user_part = np.full(n_users, TEST, dtype=np.int8)
    shuffled = np.random.default_rng(seed).permutation(n_users)
    user_part[shuffled[:train]], user_part[shuffled[train : train + valid]] = TRAIN, VALID
    user_part[~eligible] = TRAIN
    part = user_part[dataset.user_codes]
    target = part == TRAIN
    target[last[user_part != TRAIN]] = True
    assignment = Assignment(f"users-{_name(ratios)}-seed{seed}", part, target)
    assignment.facts |= {
        f"{name}_users": int(np.count_nonzero(user_part == code)) for code, name in enumerate(PARTS)
    }
    return assignment


def by_item(dataset: Dataset, ratios: np.ndarray, seed: int) -> Assignment:
    """Splits the items: all interactions with a held-out item are targets, and training has none of them.

    Validation and test have items of their own, so that settings are chosen for items that are as cold as
    those of the test. Interactions without a time are training, or left out if their item is held out.
    """
    train, valid = _cut(len(dataset.items), ratios)
    item_part = np.full(len(dataset.items), TEST, dtype=np.int8)
    shuffled = np.random.default_rng(seed).permutation(len(dataset.items))
    item_part[shuffled[:train]], item_part[shuffled[train : train + valid]] = TRAIN, VALID
    part = item_part[dataset.item_codes]
    if dataset.has_timestamps:
        part[(dataset.timestamps == NO_TIME) & (part != TRAIN)] = UNUSED
    assignment = Assignment(f"cold-items-{_name(ratios)}-seed{seed}", part, np.ones(len(part), dtype=bool))
    assignment.facts |= {
        f"{name}_items": int(np.count_nonzero(item_part == code)) for code, name in enumerate(PARTS)
    }
    return assignment


def temporal(dataset: Dataset, ratios: np.ndarray) -> Assignment:
    """Splits at two points in time, the same for all users; equal times fall on the same side.

    Interactions without a time are left out.
    """
    if not dataset.has_timestamps:
        raise DataError(
            f"{dataset.folder} has no timestamps, which the temporal split needs; use loo or ratio"
        )
    times = dataset.timestamps
    timed = np.sort(times[times != NO_TIME])
    train, valid = _cut(len(timed), ratios)
    first_valid = timed[min(train, len(timed) - 1)]
    first_test = timed[min(train + valid, len(timed) - 1)]
    part = np.where(times < first_valid, TRAIN, np.where(times < first_test, VALID, TEST)).astype(np.int8)
    part[times == NO_TIME] = UNUSED
    assignment = Assignment(f"temporal-{_name(ratios)}", part, np.ones(len(part), dtype=bool))
    assignment.facts |= {"first_validation_time": int(first_valid), "first_test_time": int(first_test)}
    return assignment


def given(dataset: Dataset) -> Assignment:
    """Restores the parts that the source came with, from the interactions' column `part`."""
    if "part" not in dataset.scan_interactions().collect_schema():
        raise DataError(
            f"{dataset.folder} came without given parts (column 'part'); use another split method"
        )
    parts = dataset.scan_interactions().select("part").collect(engine="streaming")["part"]
    unknown = parts.filter(~parts.is_in(PARTS).fill_null(False))
    if len(unknown):
        raise DataError(f"{dataset.folder}: column 'part' has {unknown[0]!r}; expected {', '.join(PARTS)}")
    codes = parts.cast(pl.Enum(PARTS)).to_physical().cast(pl.Int8).to_numpy()
    assignment = Assignment("given", codes.copy(), np.ones(len(codes), dtype=bool))
    _without_untimed_targets(dataset, assignment)
    return assignment


def _in_time(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    return group_by_user_in_time(dataset.user_codes, dataset.timestamps, len(dataset.users))


def _cut(count: int, ratios: np.ndarray) -> tuple[int, int]:
    """Numbers of training and validation samples out of `count`; the rest is test."""
    ends = np.round(np.cumsum(ratios / ratios.sum()) * count).astype(int)
    return int(ends[0]), int(ends[1] - ends[0])


def _name(ratios: np.ndarray) -> str:
    """The ratios in their lowest terms: 8:1:1 also for 0.8, 0.1, 0.1."""
    parts = [Fraction(float(ratio)).limit_denominator(10_000) for ratio in ratios]
    whole = [part * math.lcm(*(part.denominator for part in parts)) for part in parts]
    return ":".join(str(int(part / math.gcd(*map(int, whole)))) for part in whole)


def _without_untimed_targets(dataset: Dataset, assignment: Assignment) -> None:
    if dataset.has_timestamps:
        assignment.part[dataset.timestamps == NO_TIME] = TRAIN
