"""Is one system better than another? Paired by user: bootstrap intervals, three tests, Holm, effect sizes.

The unit is the user: the lists of a user are averaged first, for they are not independent. All metrics share
one set of resamples, and users with equal values in every metric are drawn together, so that the work grows
with the number of different outcomes rather than with the number of users where that is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from recllm.errors import DataError
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import RankRecords, check_one_setting

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """System `a` against system `b` in one metric; differences are a - b, per user."""

    metric: str
    a: str
    b: str
    users: int
    """Users for whom the metric is defined in both systems."""
    mean_a: float
    mean_b: float
    difference: float
    low: float
    """Lower end of the bootstrap percentile interval of the difference."""
    high: float
    t_p: float
    """Paired t-test, two-sided, as are the other two."""
    wilcoxon_p: float
    """Wilcoxon signed-rank test, zero differences dropped."""
    permutation_p: float
    """Sign-flip permutation test of the mean difference."""
    cohen_dz: float
    """Mean difference over its standard deviation (Cohen 1988); infinite where only the latter is 0."""
    rank_biserial: float
    """Matched-pairs rank-biserial correlation, -1 to 1 (Kerby 2014): (W+ - W-) / (W+ + W-)."""


def compare(
    a: RankRecords,
    b: RankRecords,
    ks: Sequence[int] = (5, 10, 20),
    names: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Compares two systems on the same positives; one comparison per metric.

    Args:
        a: Records of the first system.
        b: Records of the second.
        ks: Cutoffs, as in `compute_metrics`.
        names: Metric names, as in `compute_metrics`.
        level: Coverage of the interval.
        resamples: Bootstrap resamples, and Monte Carlo sign flips.
        seed: Seeds both.

    Raises:
        DataError: The protocols or the candidates differ, or a (user, item) record or candidate count of one
            system is not in the other.
    """
    check_same_records(a, b)
    per_user = [compute_metrics(records, ks, names).per_user() for records in (a, b)]
    names = per_user[0].columns[1:]
    of_a, of_b = (frame.drop("user").to_numpy() for frame in per_user)
    difference = paired_differences(of_a, of_b)
    intervals = bootstrap_means(difference, level=level, resamples=resamples, seed=seed)
    flips = sign_flip_test(difference, resamples=resamples, seed=seed)
    comparisons = []
    for column, name in enumerate(names):
        defined = ~np.isnan(difference[:, column])
        d = difference[defined, column]
        comparisons.append(
            Comparison(
                *(name, a.system, b.system, len(d)),
                *(_mean(of_a[defined, column]), _mean(of_b[defined, column]), _mean(d)),
                *(float(end) for end in intervals[column]),
                *(paired_t(d), wilcoxon(d), float(flips[column])),
                *(cohen_dz(d), rank_biserial(d)),
            )
        )
    return comparisons


def paired_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Subtracts metrics of the same users, a - b, and rounds to 12 decimals (our choice).

    Averages of equal lists may differ in their last bits, by some 1e-17. Unrounded, such differences would
    have a sign and a rank, and systems that are the same would differ significantly.
    """
    return np.round(a - b, 12) + 0.0


def check_same_records(a: RankRecords, b: RankRecords) -> None:
    """Raises a `DataError` unless both systems ranked the same positives, each as often, among as many
    candidates.
    """
    check_one_setting([(a.system, a), (b.system, b)])
    keys = ["user", "item", "n"]
    left, right = (
        pl.DataFrame(
            {"user": x.user.cast(pl.String), "item": x.item.cast(pl.String), "n": np.asarray(x.n, np.int64)}
        )
        .group_by(keys, maintain_order=True)
        .agg(pl.len().cast(pl.Int64).alias("times"))
        for x in (a, b)
    )
    for has, lacks, frame, other in ((a, b, left, right), (b, a, right, left)):
        found = frame.join(other, on=keys, how="left", maintain_order="left")
        lacking = found["times"] - found["times_right"].fill_null(0)
        if (lacking > 0).any():
            user, item, n = found.row((lacking > 0).arg_max())[:3]
            raise DataError(
                f"{lacks.system} lacks {lacking.clip(0).sum()} of {len(has)} records of {has.system}, "
                f"the first is user {user!r}, item {item!r} of {n} candidates; rank both on the same file"
            )


def check_draws(resamples: int, seed: int) -> None:
    """Raises a `DataError` for a number of resamples or a seed from which nothing can be drawn."""
    if resamples < 1:
        raise DataError(f"resamples is {resamples}; expected at least 1")
    if seed < 0:
        raise DataError(f"seed is {seed}; expected 0 or more")


def bootstrap_means(
    values: np.ndarray, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Percentile bootstrap intervals of column means (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: [U, M], one row per user; NaN entries are left out of their column.

    Returns:
        [M, 2] lower and upper ends; NaN for a column without values.
    """
    check_draws(resamples, seed)
    rows, counts = _collapse(values)
    known = ~np.isnan(rows)
    table = np.concatenate([np.where(known, rows, 0.0), known], axis=1)
    rng = np.random.default_rng(seed)
    means = []
    for size in _chunks(resamples, len(counts)):
        drawn = _draw(rng, counts, size) @ table
        total, users = np.split(drawn, 2, axis=1)
        means.append(np.divide(total, users, out=np.full_like(total, np.nan), where=users > 0))
    tail = (1 - level) / 2
    means = np.concatenate(means)
    ends = np.full((2, values.shape[1]), np.nan)
    usable = ~np.isnan(means).all(0)
    ends[:, usable] = np.nanquantile(means[:, usable], [tail, 1 - tail], axis=0)
    return ends.T


def sign_flip_test(differences: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Two-sided permutation test of paired differences: under the null each may as well have the other sign.

    Exact, over all 2^z sign patterns, for a column with z <= 16 differences that are not zero; otherwise
    Monte Carlo with p = (b + 1) / (m + 1) for b of m patterns at least as extreme (Phipson and Smyth 2010),
    which is never 0.

    Args:
        differences: [U, M]; NaN entries are left out.

    Returns:
        [M] p-values; 1 where no difference is other than zero.
    """
    check_draws(resamples, seed)
    differences = np.nan_to_num(differences, nan=0.0)
    observed = np.abs(differences.sum(0))
    reach = observed - 1e-9 * np.abs(differences).sum(0)  # sums in another order differ in their last bits
    p = np.empty(len(observed))
    exact = np.count_nonzero(differences, axis=0) <= 16
    for column in np.flatnonzero(exact):
        d = differences[differences[:, column] != 0, column]
        flips = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        p[column] = np.mean(np.abs((1 - 2 * flips) @ d) >= reach[column])
    if exact.all():
        return p
    rows, counts = _collapse(differences[:, ~exact])
    rng = np.random.default_rng(seed)
    extreme = np.zeros(rows.shape[1], np.int64)
    for size in _chunks(resamples, len(counts)):
        flipped = (
            rng.binomial(counts, 0.5, (size, len(counts)))
            if counts.max() > 1
            else _coins(rng, size, len(counts))
        )
        extreme += (np.abs((counts - 2.0 * flipped) @ rows) >= reach[~exact]).sum(0)
    p[~exact] = (extreme + 1) / (resamples + 1)
    return p


def paired_t(d: np.ndarray) -> float:
    """p-value of the paired t-test on differences [U]; 1 where all are zero, NaN for fewer than two."""
    from scipy import stats

    if len(d) < 2:
        return float("nan")
    if (d == d[0]).all():
        return 1.0 if d[0] == 0 else 0.0
    return float(stats.ttest_1samp(d, 0.0).pvalue)


def wilcoxon(d: np.ndarray) -> float:
    """p-value of the Wilcoxon signed-rank test on differences [U]; 1 where all are zero, NaN for none."""
    from scipy import stats

    if not len(d):
        return float("nan")
    return float(stats.wilcoxon(d).pvalue) if d.any() else 1.0


def cohen_dz(d: np.ndarray) -> float:
    """Standardized mean of differences [U]; NaN for fewer than two."""
    if len(d) < 2:
        return float("nan")
    if (d == d[0]).all():
        return float(np.sign(d[0]) * np.inf) if d[0] else 0.0
    return float(d.mean() / d.std(ddof=1))


def rank_biserial(d: np.ndarray) -> float:
    """Signed share of the rank sum of |d| over the differences that are not zero; 0 where all are."""
    from scipy import stats

    d = d[d != 0]
    ranks = stats.rankdata(np.abs(d))
    return float((ranks * np.sign(d)).sum() / ranks.sum()) if len(d) else 0.0


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction (1979): p-values [m] adjusted for m tests, in the given order; NaN is no
    test.
    """
    p = np.asarray(p, np.float64)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _collapse(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows and their counts; all rows, once each, where that would not shrink them tenfold."""
    rows, counts = np.unique(values + 0.0, axis=0, return_counts=True)
    return (rows, counts) if len(rows) * 10 <= len(values) else (values, np.ones(len(values), np.int64))


def _chunks(resamples: int, width: int) -> Iterator[int]:
    """Sizes that add up to `resamples`, each with at most about two million draws."""
    step = max(1, 2**21 // max(width, 1))
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def _draw(rng: np.random.Generator, counts: np.ndarray, size: int) -> np.ndarray:
    """How often each row is drawn in `size` resamples of as many users as there are: [size, len(counts)]."""
    users, rows = int(counts.sum()), len(counts)
    if users != rows:
        return rng.multinomial(users, counts / users, size).astype(np.float64)
    cells = rng.integers(0, rows, (size, users)) + rows * np.arange(size)[:, None]
    return np.bincount(cells.reshape(-1), minlength=size * rows).reshape(size, rows).astype(np.float64)


def _coins(rng: np.random.Generator, size: int, width: int) -> np.ndarray:
    bits = np.frombuffer(rng.bytes(size * -(-width // 8)), np.uint8).reshape(size, -1)
    return np.unpackbits(bits, axis=1, count=width)
