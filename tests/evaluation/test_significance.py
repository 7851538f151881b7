"""The tests and intervals against scipy, enumeration and hand calculation."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from recllm.errors import DataError
from recllm.evaluation import RankRecords, bootstrap_means, compare, compute_metrics, holm, sign_flip_test
from recllm.evaluation.commands import report_table
from recllm.evaluation.inputs import System
from recllm.evaluation.significance import cohen_dz, paired_differences, paired_t, rank_biserial, wilcoxon


def ranked(above, system="a", protocol="p", users=None, n=21) -> RankRecords:
    above = np.asarray(above)
    users = pl.Series([f"u{i}" for i in range(len(above))] if users is None else users)
    items = pl.Series([f"i{i}" for i in range(len(above))])
    columns = above, np.ones_like(above), np.full_like(above, n)
    return RankRecords(users, items, *columns, lists="target", protocol=protocol, system=system)


def test_p_values_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for d in (rng.normal(0.1, 1, 40), rng.integers(-2, 3, 60).astype(float)):
        assert paired_t(d) == pytest.approx(stats.ttest_rel(d, 0 * d).pvalue)
        assert wilcoxon(d) == pytest.approx(stats.wilcoxon(d, 0 * d).pvalue)
        monte_carlo = sign_flip_test(d[:, None], resamples=20_000)[0]
        theirs = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
        )
        assert monte_carlo == pytest.approx(theirs.pvalue, abs=0.015)


def test_few_differences_are_flipped_in_every_way():
    d = np.array([0.5, -0.25, 0.0, 1.0, 0.1, 0.1, np.nan])
    sums = [abs(np.dot(signs, d[:6])) for signs in itertools.product([1, -1], repeat=6)]
    exact = np.mean(np.array(sums) >= abs(np.nansum(d)) - 1e-12)
    both = sign_flip_test(np.stack([d, -d], axis=1))
    assert both.tolist() == [exact, exact]
    assert sign_flip_test(np.zeros((5, 1))).tolist() == [1]


def test_monte_carlo_p_is_never_zero_and_is_the_same_for_collapsed_users():
    assert sign_flip_test(np.ones((30, 1)), resamples=99)[0] == 1 / 100
    rng = np.random.default_rng(1)
    d = rng.integers(-3, 4, (2000, 1)) * 1.0 + 0.05  # seven outcomes: users are drawn by outcome
    e = d + rng.normal(0, 1e-9, d.shape)  # all different: users are drawn one by one
    assert sign_flip_test(d)[0] == pytest.approx(sign_flip_test(e)[0], abs=0.02)
    np.testing.assert_allclose(bootstrap_means(d), bootstrap_means(e), atol=0.004)


def test_bootstrap_interval_is_that_of_scipy():
    values = np.random.default_rng(0).exponential(1, (200, 2))
    values[:50, 1] = np.nan
    found = bootstrap_means(values, resamples=20_000)
    for column in range(2):
        known = values[~np.isnan(values[:, column]), column]
        theirs = stats.bootstrap((known,), np.mean, method="percentile", n_resamples=20_000, rng=0)
        np.testing.assert_allclose(found[column], theirs.confidence_interval, atol=0.015)
    np.testing.assert_array_equal(found, bootstrap_means(values, resamples=20_000))
    assert np.isnan(bootstrap_means(np.full((3, 1), np.nan))).all()


def test_no_differences_are_no_evidence():
    zero = np.zeros(10)
    assert (paired_t(zero), wilcoxon(zero), cohen_dz(zero), rank_biserial(zero)) == (1, 1, 0, 0)
    one = np.ones(10)
    assert (paired_t(one), cohen_dz(one), rank_biserial(one)) == (0, np.inf, 1)
    assert np.isnan([paired_t(one[:1]), cohen_dz(one[:1])]).all()


def test_effect_sizes_by_hand():
    d = np.array([1.0, -2.0, 3.0, 4.0])
    assert cohen_dz(d) == pytest.approx(1.5 / np.sqrt(7))
    assert rank_biserial(np.append(d, 0)) == pytest.approx((1 + 3 + 4 - 2) / 10)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, np.nan, 0.6]), [1, np.nan, 1])


def test_compare_averages_the_lists_of_a_user_first():
    users = ["u", "u", "v", "w"]
    a, b = ranked([0, 1, 0, 3], "a", users=users), ranked([1, 1, 3, 3], "b", users=users)
    found = compare(a, b, names=["mrr"])[0]
    assert (found.a, found.b, found.users) == ("a", "b", 3)
    assert found.mean_a == pytest.approx((0.75 + 1 + 0.25) / 3)
    assert found.difference == pytest.approx((0.25 + 0.75 + 0) / 3)
    assert found.low <= found.difference <= found.high
    assert found.permutation_p == 0.5
    assert found == compare(a, b, names=["mrr"])[0]


def test_the_order_of_records_does_not_matter():
    rng = np.random.default_rng(0)
    above, order = rng.integers(0, 20, 30), rng.permutation(30)
    a, b = ranked(above), ranked(above[order], "b", users=[f"u{i}" for i in order])
    b = RankRecords(b.user, pl.Series([f"i{i}" for i in order]), b.above, b.tied, b.n, "target", "p", "b")
    assert all(c.difference == 0 and c.permutation_p == 1 for c in compare(a, b))
    assert compute_metrics(a).per_user().equals(compute_metrics(b).per_user())


def test_rounding_noise_is_no_difference():
    rng = np.random.default_rng(0)
    b = rng.random(300)
    noisy = b + rng.normal(1e-16, 1e-16, 300)
    d = paired_differences(noisy, b)
    assert not d.any() and not np.signbit(d).any() and (noisy != b).any()
    assert paired_differences(noisy + 0.25, b).tolist() == [0.25] * 300  # equal ones are one tie
    assert paired_differences(np.array([3e-12, np.nan]), np.zeros(2))[0] == 3e-12


def lists_of_users(order, system) -> RankRecords:
    """300 users with 7 lists each, the same ones in whatever order they are stored."""
    rng = np.random.default_rng(3)
    above = rng.integers(0, 20, 2100)
    users, items = np.repeat(np.arange(300), 7), np.arange(2100)
    columns = above[order], np.ones(2100, int), np.full(2100, 21)
    names = pl.Series(users[order].astype(str)), pl.Series(items[order].astype(str))
    return RankRecords(*names, *columns, lists="target", protocol="p", system=system)


def test_equal_systems_stored_in_another_order_are_equal():
    rng = np.random.default_rng(4)
    a, b = (
        lists_of_users(order, name) for name, order in (("a", np.arange(2100)), ("b", rng.permutation(2100)))
    )
    assert compute_metrics(a).per_user().equals(compute_metrics(b).per_user())
    for one in compare(a, b, names=["ndcg@10", "mrr", "auc"], resamples=500):
        assert (one.difference, one.low, one.high, one.cohen_dz, one.rank_biserial) == (0, 0, 0, 0, 0)
        assert (one.t_p, one.wilcoxon_p, one.permutation_p) == (1, 1, 1)


def test_no_table_marks_a_system_for_rounding_noise(monkeypatch):
    from recllm.evaluation import metrics

    plain, rng = metrics.Metrics._averaged, np.random.default_rng(5)
    noise = (pl.col(pl.Float64) + pl.lit(pl.Series(rng.normal(-1e-16, 1e-17, 300)))).clip(0)
    monkeypatch.setattr(
        metrics.Metrics,
        "_averaged",
        lambda self: plain(self).with_columns(noise) if self.system == "a" else plain(self),
    )
    a, b = (lists_of_users(np.arange(2100), name) for name in "ab")
    assert [one.permutation_p for one in compare(a, b, names=["ndcg@10"], resamples=200)] == [1]
    table = report_table(
        [System(Path(x.system), x, None) for x in (a, b)], names=("ndcg@10", "auc"), resamples=200
    )
    assert not any("†" in cell for row in table.rows for cell in row)
    assert table.bold == {(0, 1), (1, 1)}  # of equal systems the first


@pytest.mark.parametrize("kind", [pl.Int64, pl.Categorical, pl.Enum])
def test_users_are_paired_by_their_names_whatever_kind_their_ids_are(kind):
    above = np.random.default_rng(6).integers(0, 20, 30)
    names = [str(u) for u in range(30)]  # "10" sorts before "9"
    if kind == pl.Int64:
        other = pl.Series(range(30))
    else:
        other = pl.Series(names, dtype=pl.Enum(names[::-1]) if kind == pl.Enum else kind)
    a, b = ranked(above, users=names), ranked(above, "b", users=other)
    assert all(c.difference == 0 and c.permutation_p == 1 and c.users == 30 for c in compare(a, b))
    table = report_table([System(Path(x.system), x, None) for x in (a, replace(b, above=above // 2))])
    same = report_table(
        [System(Path(x.system), x, None) for x in (a, replace(b, above=above // 2, user=a.user))]
    )
    np.testing.assert_equal(table.records, same.records)


def test_records_are_compared_as_often_as_they_stand():
    def twice(items, system):
        columns = np.zeros(3, int), np.ones(3, int), np.full(3, 9)
        return RankRecords(pl.Series(["u"] * 3), pl.Series(items), *columns, lists="target", system=system)

    with pytest.raises(DataError, match="b lacks 1 of 3 records of a, the first is user 'u', item 'x'"):
        compare(twice(["x", "x", "y"], "a"), twice(["x", "y", "y"], "b"))
    compare(twice(["x", "x", "y"], "a"), twice(["y", "x", "x"], "b"))


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (ranked([0, 1, 2], "b"), "b lacks 1 of 4 records of a, the first is user 'u3'"),
        (ranked([0, 1, 2, 3, 4], "b"), "a lacks 1 of 5 records of b, the first is user 'u4'"),
        (ranked([0, 1, 2, 3], "b", n=101), "of 21 candidates"),
        (ranked([0, 1, 2, 3], "b", protocol="q"), "'p'.*'q'"),
        (
            replace(ranked([0, 1, 2, 3], "b"), candidates="beef"),
            "a and b were both measured under 'p', but their candidates differ .*cafe and beef",
        ),
    ],
)
def test_systems_that_did_not_rank_the_same_are_refused(b, message):
    a = replace(ranked([0, 1, 2, 3]), candidates="cafe")
    with pytest.raises(DataError, match=message):
        compare(a, b)
    compare(a, ranked([0, 1, 2, 3], "b"))  # whose candidates are not known


def test_what_cannot_be_drawn_is_refused():
    few = np.ones((3, 1))  # so few that every flip is tried and none drawn
    for draw in (bootstrap_means, sign_flip_test):
        with pytest.raises(DataError, match="seed is -1; expected 0 or more"):
            draw(few, seed=-1)
        with pytest.raises(DataError, match="resamples is 0; expected at least 1"):
            draw(few, resamples=0)
