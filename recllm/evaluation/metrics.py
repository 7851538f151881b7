"""Ranking metrics from rank records: the exact expected value when ties are broken uniformly at random.

Notation. The candidates of a list with equal scores form a tie group; only groups with a positive matter. A
group has `g` candidates above it, `t` candidates, `r` positives among them, and `G` positives above it; the
list has `n` candidates and `P` positives. Every order of a group is equally likely, so each of its positives
stands at each of the ranks g + 1 ... g + t with probability 1 / t. A list with one positive has one group
with r = 1, G = 0, P = 1, and every formula below is then a difference of two prefix sums. (McSherry
and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores",
ECIR 2008, take the same expectations; the closed forms here are ours.)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from recllm.errors import DataError
from recllm.evaluation.frames import LARGEST_LIST
from recllm.evaluation.ranks import RankRecords, as_scores

LARGEST_CUTOFF = 10**9


@dataclass(frozen=True, eq=False)
class Metrics:
    """The metrics of one system: an array over lists for each."""

    user: pl.Series
    """[L] the user of each list; with `lists="target"` a user may own several."""
    lists: dict[str, np.ndarray]
    """Metric name to [L] float64; NaN where it is undefined."""
    records: int
    """Number of positives."""
    tie_rate: float
    """Share of the positives that tie with at least one negative."""
    protocol: str
    system: str

    def per_user(self) -> pl.DataFrame:
        """Averages the lists of each user: `user` (text, sorted as text, so that rows of two systems match
        whatever kind their ids are), then a column per metric, NaN where undefined.
        """
        return self._averaged().with_columns(pl.col("user").cast(pl.String)).sort("user")

    def mean(self) -> dict[str, float]:
        """Averages over users, each the average of its lists; undefined values are left out."""
        return {name: _mean(values.to_numpy()) for name, values in self._columns().items()}

    def undefined(self) -> dict[str, int]:
        """Counts the users that each mean leaves out; only AUC has any: lists without a negative."""
        return {name: int(values.is_nan().sum()) for name, values in self._columns().items()}

    def _columns(self) -> dict[str, pl.Series]:
        return self._averaged().drop("user").to_dict(as_series=True)

    def _averaged(self) -> pl.DataFrame:
        frame = pl.DataFrame({"user": self.user, **self.lists})
        if self.user.n_unique() == frame.height:
            return frame
        # Sorted, for the last bits of a sum depend on the order of its terms.
        averages = [
            pl.col(name).filter(pl.col(name).is_not_nan()).sort().mean().fill_null(np.nan)
            for name in self.lists
        ]
        return frame.group_by("user", maintain_order=True).agg(averages)


def compute_metrics(
    records: RankRecords, ks: Sequence[int] = (5, 10, 20), names: Sequence[str] | None = None
) -> Metrics:
    """Computes metrics per list.

    Args:
        records: R rank records.
        ks: Cutoffs at which all of `METRICS` are taken.
        names: Exactly these metrics instead: `ndcg@10`, or without a cutoff (the whole list) `ndcg`, `mrr`
            and `map`; `auc` has none.

    Raises:
        DataError: No records, or a metric or cutoff that does not exist.
    """
    if not len(records):
        raise DataError(f"{records.system}: there are no rank records to measure")
    groups = _Groups.of(records)
    values = {name: _metric(name, groups) for name in (metric_names(ks) if names is None else names)}
    tied = groups.spread(groups.total(np.where(groups.t > groups.r, groups.r, 0)))
    tie_rate = float(tied.sum() / len(records))
    return Metrics(groups.user, values, len(records), tie_rate, records.protocol, records.system)


def metric_names(ks: Sequence[int]) -> list[str]:
    """Lists what `compute_metrics` returns for `ks`: all at each cutoff, then `mrr`, `map` and `auc`."""
    if wrong := [k for k in ks if not isinstance(k, int | np.integer) or k < 1]:
        raise DataError(f"cutoff {wrong[0]!r}: cutoffs (--ks) must be whole numbers of at least 1")
    if max(ks, default=1) > LARGEST_CUTOFF:
        raise DataError("cutoffs (--ks) must be at most 10^9")
    return [f"{name}@{k}" for k in ks for name in METRICS] + ["mrr", "map", "auc"]


def distinct_metric_names(records: RankRecords, ks: Sequence[int]) -> list[str]:
    """Lists the metrics that differ: all of `metric_names` where a list has several positives, else fewer.

    With one positive in every list recall@k = hr@k, precision@k = hr@k / k, map = mrr (at cutoffs too) and
    ndcg@1 = hr@1. Tests of one hypothesis under several names would only enlarge Holm's family, so that
    `hr` and `ndcg` at each cutoff, `mrr` and `auc` are left.
    """
    names = metric_names(ks)
    if not one_positive_each(records):
        return names
    kept = [name for name in names if name.split("@")[0] in ("hr", "ndcg") and name != "ndcg@1"]
    return [*kept, "mrr", "auc"]


def one_positive_each(records: RankRecords) -> bool:
    """Tells whether every list has one positive."""
    return records.lists == "target" or records.user.n_unique() == len(records)


def pooled_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve of all candidates of all users taken together, ties counting one half.

    It asks whether scores can be compared between users; `auc` of `compute_metrics` (GAUC) does not. This is
    the Mann-Whitney statistic over P x N, in O(n log n).

    Args:
        scores: [n] finite numbers.
        labels: [n] 1 or 0.

    Raises:
        DataError: A score is NaN or infinite, or one of the classes is empty.
    """
    scores, labels = as_scores(scores), np.asarray(labels).astype(bool)
    if scores.shape != labels.shape or scores.ndim != 1 or not np.isfinite(scores).all():
        raise DataError(f"scores {scores.shape} and labels {labels.shape}: expected two finite arrays [n]")
    positive, negative = scores[labels], np.sort(scores[~labels])
    if not len(positive) or not len(negative):
        raise DataError("pooled AUC needs at least one positive and one negative")
    below = np.searchsorted(negative, positive, "left").sum()
    not_above = np.searchsorted(negative, positive, "right").sum()
    return float((below + not_above) / 2 / len(positive) / len(negative))


@dataclass(frozen=True, eq=False)
class _Groups:
    """Tie groups by list, top down within a list: one array entry per group, L lists."""

    g: np.ndarray
    t: np.ndarray
    r: np.ndarray
    G: np.ndarray
    n: np.ndarray
    P: np.ndarray
    first: np.ndarray
    """[L] the group with which each list starts."""
    user: pl.Series
    """[L]"""
    harmonic: np.ndarray
    """[max n + 1] sums of 1 / rank over the first x ranks."""
    discount: np.ndarray
    """[max n + 1] sums of 1 / log2(rank + 1) over the first x ranks."""
    which: np.ndarray | None = None
    """[users] the list, counted once, that stands for each user's list; None where that is its own."""

    @classmethod
    def of(cls, records: RankRecords) -> _Groups:
        above, tied, n = (np.asarray(column, np.int64) for column in (records.above, records.tied, records.n))
        if n.max() > LARGEST_LIST:
            raise DataError(
                f"{records.system}: a list of {n.max()} candidates; lists may have {LARGEST_LIST} at most"
            )
        rank = np.arange(1, n.max() + 1)
        # Extended precision where the machine has it, so that differences of sums keep all their digits.
        tables = [np.cumsum(np.append(0, 1 / x), dtype=np.longdouble) for x in (rank, np.log2(rank + 1))]
        if one_positive_each(records):
            above, tied, n, which = _distinct(above, tied, n)
            ones = np.ones(len(n), np.int64)
            return cls(above, tied, ones, 0 * ones, n, ones, np.arange(len(n)), records.user, *tables, which)
        rows = np.arange(len(records))
        owner = records.user.rank("dense").to_numpy()
        order = np.lexsort((above, owner))
        owner, above = owner[order], above[order]
        new_list = np.diff(owner, prepend=-1) != 0
        new_group = new_list | (np.diff(above, prepend=-1) != 0)
        start, first = rows[new_group], np.flatnonzero(new_list[new_group])
        size = np.diff(rows[new_list], append=len(rows))
        groups_in_list = np.diff(first, append=len(start))
        return cls(
            g=above[start],
            t=tied[order][start],
            r=np.diff(start, append=len(rows)),
            G=start - np.repeat(rows[new_list], groups_in_list),
            n=n[order][start],
            P=np.repeat(size, groups_in_list),
            first=first,
            user=records.user[order[new_list]],
            harmonic=tables[0],
            discount=tables[1],
        )

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Gives each list its value from those of the lists that were counted once."""
        return values if self.which is None else values[self.which]

    def within(self, k: int) -> np.ndarray:
        """Ranks of each group that lie in the top k."""
        return np.clip(k - self.g, 0, self.t)

    def summed(self, table: np.ndarray, k: int) -> np.ndarray:
        """The terms of a prefix-sum table over the ranks of each group that lie in the top k."""
        return (table[self.g + self.within(k)] - table[self.g]).astype(np.float64)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums over the groups of each list."""
        return values if len(self.first) == len(values) else np.add.reduceat(values, self.first)


def _distinct(above: np.ndarray, tied: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, ...]:
    """The different triples, and for each row which one is its own (None where they would not be few)."""
    least = n.min()
    shape = int(above.max()) + 1, int(tied.max()) + 1, int(n.max() - least) + 1
    if math.prod(shape) * 10 > len(n):
        return above, tied, n, None
    code = (above * shape[1] + tied) * shape[2] + (n - least)
    present = np.flatnonzero(np.bincount(code))
    place = np.zeros(math.prod(shape), np.int64)
    place[present] = np.arange(len(present))
    above, tied, n = np.unravel_index(present, shape)
    return above, tied, n + least, place[code]


def _hits(x: _Groups, k: int) -> np.ndarray:
    """The expected number of positives in the top k."""
    return x.total(x.r * x.within(k) / x.t)


def _recall(x: _Groups, k: int) -> np.ndarray:
    return _hits(x, k) / x.P[x.first]


def _precision(x: _Groups, k: int) -> np.ndarray:
    """Divides by k even where the list is shorter, as trec_eval does."""
    return _hits(x, k) / k


def _hit_rate(x: _Groups, k: int) -> np.ndarray:
    """The probability of a positive in the top k.

    A group that lies in the top k gives one for certain. Of a group that straddles it, s = k - g ranks are
    in, and all are negatives with probability C(t - r, s) / C(t, s), the product of 1 - max(r, s) / (t - i)
    over i < min(r, s).
    """
    s = x.within(k)
    hit = (s == x.t).astype(np.float64)
    rows = np.flatnonzero((s > 0) & (s < x.t))
    s, t, r = s[rows], x.t[rows], x.r[rows]
    few, many, miss = np.minimum(r, s), np.maximum(r, s), np.ones(len(rows))
    for i in range(few.max(initial=0)):
        miss *= np.where(i < few, np.maximum(0.0, 1 - many / np.maximum(t - i, 1)), 1.0)
    hit[rows] = np.where(r == 1, s / t, 1 - miss)
    return hit if len(x.first) == len(hit) else np.maximum.reduceat(hit, x.first)


def _ndcg(x: _Groups, k: int) -> np.ndarray:
    """Expected DCG over the DCG of min(P, k) positives on top; gain 1, discount log2(rank + 1)."""
    ideal = x.discount[np.minimum(x.P[x.first], k)].astype(np.float64)
    return x.total(x.r / x.t * x.summed(x.discount, k)) / ideal


def _mrr(x: _Groups, k: int) -> np.ndarray:
    """The expected reciprocal rank of the first positive, 0 where that rank exceeds k."""
    top = x.first
    mean = x.summed(x.harmonic, k)[top] / x.t[top]
    if (several := np.flatnonzero(x.r[top] > 1)).size:
        shapes = np.stack([x.g, x.t, x.r, x.within(k)])[:, top[several]]
        shapes, which = np.unique(shapes, axis=1, return_inverse=True)
        mean[several] = _first_of_several(*shapes)[which.reshape(-1)]
    return mean


def _first_of_several(g: np.ndarray, t: np.ndarray, r: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Sums P(first at j) / (g + j) over j = 1 ... min(s, t - r + 1).

    P(first at j) = C(t - j, r - 1) / C(t, r): r / t at j = 1, then times (t - j - r + 1) / (t - j) at each
    step. Groups of like width are summed together, about a million terms at a time.
    """
    width = np.minimum(s, t - r + 1)
    order = np.argsort(-width)[: np.count_nonzero(width)]
    mean = np.zeros(len(g))
    start = 0
    while start < len(order):
        widest = width[order[start]]
        rows = order[start : start + max(1, 2**20 // widest)]
        start += len(rows)
        j = np.arange(1, widest + 1)
        g_, t_, r_, width_ = (column[rows, None] for column in (g, t, r, width))
        steps = np.where(j < width_, (t_ - j - r_ + 1) / np.maximum(t_ - j, 1), 0.0)
        first_at = np.cumprod(np.concatenate([r_ / t_, steps[:, :-1]], axis=1), axis=1)
        mean[rows] = (first_at / (g_ + j)).sum(1)
    return mean


def _average_precision(x: _Groups, k: int) -> np.ndarray:
    """Precision at the rank of each positive in the top k, summed and divided by P (trec_eval's map_cut).

    A positive at g + j has G + (j - 1) c others above it in expectation, c = (r - 1) / (t - 1), so its group
    adds r / t times the sum over j of (G + 1 + (j - 1) c) / (g + j) = c + (G + 1 - (g + 1) c) / (g + j).
    """
    s = x.within(k)
    c = (x.r - 1) / np.maximum(x.t - 1, 1)
    precision = c * s + (x.G + 1 - (x.g + 1) * c) * x.summed(x.harmonic, k)
    return x.total(x.r / x.t * precision) / x.P[x.first]


def _auc(x: _Groups, k: int) -> np.ndarray:
    """The share of (positive, negative) pairs in the right order, ties one half; NaN without a negative."""
    negatives = x.n - x.P
    tied = x.t - x.r
    below = negatives - (x.g - x.G) - tied
    right = x.total(x.r * (below + tied / 2))
    pairs = (x.P * negatives)[x.first]
    return np.divide(right, pairs, out=np.full(len(right), np.nan), where=pairs > 0)


METRICS: dict[str, Callable[[_Groups, int], np.ndarray]] = {
    "hr": _hit_rate,
    "recall": _recall,
    "precision": _precision,
    "ndcg": _ndcg,
    "mrr": _mrr,
    "map": _average_precision,
}
"""The metrics that take a cutoff."""


def _metric(name: str, groups: _Groups) -> np.ndarray:
    base, at, cutoff = name.partition("@")
    if base not in (*METRICS, "auc"):
        near = difflib.get_close_matches(base.lower(), [*METRICS, "auc"], n=1, cutoff=0.0)[0]
        if near == base.lower():  # only its letters are in the wrong case
            near += at + cutoff
        raise DataError(f"no metric {name!r}; the nearest is {near!r}; cutoffs are written as in 'ndcg@10'")
    if base == "auc":
        if at:
            raise DataError(f"{name!r}: 'auc' is of the whole list and takes no cutoff")
        return groups.spread(_auc(groups, 0))
    if cutoff.isdecimal() and (len(cutoff) > 10 or int(cutoff) > LARGEST_CUTOFF):
        raise DataError(f"'{base}@{cutoff[:10]}...': a cutoff must be at most 10^9")
    if at and not (cutoff.isdecimal() and int(cutoff) > 0):
        raise DataError(f"{name!r}: a cutoff must be a whole number of at least 1, as in 'ndcg@10'")
    if not at and base in ("hr", "recall", "precision"):  # of a whole list the first two are always 1
        raise DataError(f"{base!r} needs a cutoff, as in '{base}@10'")
    return groups.spread(METRICS[base](groups, int(cutoff) if cutoff else len(groups.harmonic) - 1))


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
