"""Curves, bins and choices against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest

from recllm.evaluation import RankRecords, compute_metrics, pooled_auc
from recllm.report.choice import choose, rest_of, shared
from recllm.report.measures import by_bin, curve, history_bins, in_random_order, over_cutoffs, thin
from recllm.report.plots import _apart


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_the_roc_area_is_the_pooled_auc_and_its_points_are_counts(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 400) / 7
    labels = (rng.random(400) < 0.2).astype(np.int8)
    one = curve(scores, labels)
    assert one.area == pytest.approx(pooled_auc(scores, labels), abs=1e-12)
    precision, recall, average = [], [], 0.0
    for threshold in np.unique(scores)[::-1]:
        predicted = scores >= threshold
        precision.append(labels[predicted].mean())
        recall.append(labels[predicted].sum() / labels.sum())
        average += (recall[-1] - (recall[-2] if len(recall) > 1 else 0)) * precision[-1]
    np.testing.assert_allclose(one.precision[1:], precision)
    np.testing.assert_allclose(one.true_positive_rate[1:], recall)
    assert one.average_precision == pytest.approx(average)
    assert one.base_rate == labels.mean()


def test_a_thinned_curve_keeps_its_ends_and_its_area() -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(100_000) % 20 == 0).astype(np.int8)
    one = curve(rng.normal(size=100_000) + 1.5 * labels, labels)
    x, y = one.false_positive_rate, one.true_positive_rate
    kept = thin(x, y)
    assert 100 < len(kept) <= 302
    assert kept[0] == 0 and kept[-1] == len(x) - 1 and (np.diff(kept) > 0).all()
    assert np.trapezoid(y[kept], x[kept]) == pytest.approx(one.area, abs=1e-3)
    assert len(thin(np.zeros(5000), np.zeros(5000))) <= 302  # a line of no length


def test_history_bins_hold_every_user_once_and_never_part_equal_ones() -> None:
    rng = np.random.default_rng(0)
    for known in (rng.integers(1, 100, 503), rng.integers(3, 6, 40), np.full(9, 7), rng.geometric(0.2, 1000)):
        bins = history_bins(known)
        assert 1 <= len(bins) <= 5
        assert sorted(np.concatenate([one.users for one in bins])) == list(range(len(known)))
        for one in bins:
            assert known[one.users].min() == one.low and known[one.users].max() == one.high
        assert all(before.high < after.low for before, after in itertools.pairwise(bins))


def test_a_bins_mean_is_that_of_its_users_and_lies_in_its_interval() -> None:
    rng = np.random.default_rng(0)
    records = _records(rng, 200)
    metrics = compute_metrics(records, names=["ndcg@10"])
    users = metrics.per_user()["user"]
    known = rng.integers(1, 30, 200)
    rows = by_bin(metrics, "ndcg@10", users, history_bins(known), resamples=500, seed=0)
    place = {user: at for at, user in enumerate(records.user)}
    for one, (value, low, high) in zip(history_bins(known), rows, strict=True):
        ranks = [
            records.above[place[user]] + 1
            for at, user in enumerate(users)
            if one.low <= known[at] <= one.high
        ]
        expected = np.mean([1 / np.log2(rank + 1) if rank <= 10 else 0.0 for rank in ranks])
        assert value == pytest.approx(expected)
        assert low < value < high


def test_a_random_order_is_what_guessing_comes_to() -> None:
    records = in_random_order(_records(np.random.default_rng(0), 30))
    lines = over_cutoffs(records, range(1, 22))
    np.testing.assert_allclose(lines["hr"], np.arange(1, 22) / 21)
    assert compute_metrics(records).mean()["auc"] == 0.5


def test_examples_are_the_first_middle_and_last_by_rank_and_repeat_with_the_seed() -> None:
    records = _records(np.random.default_rng(1), 101)
    ranks = np.sort(records.above + 1)
    chosen = choose(records, 6, seed=0)
    assert [one.why for one in chosen] == ["Best"] * 2 + ["Middle"] * 2 + ["Worst"] * 2
    assert [one.rank for one in chosen] == [*ranks[:2], *ranks[49:51], *ranks[-2:]]
    assert chosen == choose(records, 6, seed=0)
    assert {one.user for one in chosen} != {one.user for one in choose(records, 6, seed=5)}
    for count in (1, 2, 3, 4, 5, 101, 500):
        several = [one.user for one in choose(records, count, seed=0)]
        assert len(set(several)) == len(several) == min(count, 101)


def test_a_list_with_several_positives_is_chosen_by_its_best() -> None:
    records = RankRecords(
        user=pl.Series(["a", "a", "b", "b"]),
        item=pl.Series(["1", "2", "3", "4"]),
        above=np.array([5, 0, 3, 1]),
        tied=np.ones(4, int),
        n=np.full(4, 10),
        lists="user",
    )
    assert [(one.user, one.target, one.rank) for one in choose(records, 2, 0)] == [
        ("a", None, 1),
        ("b", None, 2),
    ]


def test_what_prompts_share_and_how_one_goes_on() -> None:
    chats = [
        [("user", "Hello"), ("assistant", "Hi"), ("user", "History:\n1. a\nTarget: x")],
        [("user", "Hello"), ("assistant", "Hi"), ("user", "History:\n1. a\nTarget: xy")],
    ]
    beginning = shared(chats)
    assert beginning == [("user", "Hello"), ("assistant", "Hi"), ("user", "History:\n1. a")]
    assert rest_of(chats[1], beginning) == [("user", "Target: xy")]
    assert shared([[("user", "a")], [("user", "b")]]) == []
    assert rest_of(chats[0], []) == [(role, text) for role, text in chats[0]]


def test_labels_that_touch_are_moved_apart_as_little_as_can_be() -> None:
    np.testing.assert_allclose(_apart(np.array([0.1, 0.5, 0.9]), 0.05), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(_apart(np.array([0.3, 0.3, 0.3]), 0.1), [0.2, 0.3, 0.4])
    moved = _apart(np.sort(np.random.default_rng(0).random(12)), 0.06)
    assert (np.diff(moved) > 0.06 - 1e-9).all()


def _records(rng: np.random.Generator, lists: int) -> RankRecords:
    return RankRecords(
        user=pl.Series([f"u{code:04d}" for code in rng.permutation(lists)]),
        item=pl.Series([f"i{code}" for code in range(lists)]),
        above=rng.integers(0, 21, lists),
        tied=np.ones(lists, int),
        n=np.full(lists, 21),
        lists="target",
    )
