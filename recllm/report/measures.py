"""What the figures show, computed: curves over pooled rows, bins of histories, points few enough to draw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from recllm.evaluation.metrics import Metrics, compute_metrics
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.significance import bootstrap_means

POINTS = 300
"""Points that a drawn curve keeps."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Pooled over all candidate rows of all users; equal scores are one threshold. Shape [thresholds + 1]."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    """The recall."""
    precision: np.ndarray
    """1 at the first point, where nothing is predicted."""
    base_rate: float
    """The share of positives: the precision of guessing."""

    @property
    def area(self) -> float:
        """The area under the ROC curve by trapezoids, which is the pooled AUC with ties counting one half."""
        return float(np.trapezoid(self.true_positive_rate, self.false_positive_rate))

    @property
    def average_precision(self) -> float:
        """The sum over thresholds of precision times the gain in recall, not interpolated."""
        return float((np.diff(self.true_positive_rate) * self.precision[1:]).sum())


def curve(scores: np.ndarray, labels: np.ndarray) -> Curve:
    """Returns the ROC and precision-recall points of scores [n] and labels [n] of both kinds."""
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order].astype(np.int64)
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    positives = np.cumsum(labels)[last]
    predicted = last + 1
    total = int(labels.sum())
    return Curve(
        np.append(0, predicted - positives) / (len(labels) - total),
        np.append(0, positives) / total,
        np.append(1, positives / predicted),
        total / len(labels),
    )


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Returns the positions of at most `points` of a curve [n], evenly along its length, both ends kept.

    Length is measured with each axis scaled to 1, as the eye sees it. Ours.
    """
    if len(x) <= points:
        return np.arange(len(x))
    steps = np.hypot(*(np.diff(axis) / (np.ptp(axis) or 1.0) for axis in (x, y)))
    along = np.append(0.0, np.cumsum(steps))
    kept = np.searchsorted(along, np.linspace(0, along[-1], points))
    return np.unique(np.append(kept.clip(0, len(x) - 1), [0, len(x) - 1]))


def over_cutoffs(records: RankRecords, ks: range) -> dict[str, list[float]]:
    """Returns the means of `hr` and `ndcg` at each cutoff."""
    mean = compute_metrics(records, names=[f"{name}@{k}" for name in ("hr", "ndcg") for k in ks]).mean()
    return {name: [mean[f"{name}@{k}"] for k in ks] for name in ("hr", "ndcg")}


def in_random_order(records: RankRecords) -> RankRecords:
    """Returns the records of a system that says the same of every candidate: what guessing comes to."""
    return replace(records, above=np.zeros_like(records.above), tied=records.n, system="random order")


@dataclass(frozen=True)
class Bin:
    """Users whose number of known interactions lies from `low` to `high`, both included."""

    low: int
    high: int
    users: np.ndarray
    """Positions of its users in the array that was binned."""

    @property
    def label(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


def history_bins(known: np.ndarray, wanted: int = 5) -> list[Bin]:
    """Groups users [U] by their number of known interactions, into bins of about equally many users.

    The borders are quantiles; equal numbers are never parted, so that there may be fewer bins. Ours.
    """
    borders = np.unique(np.quantile(known, np.linspace(0, 1, wanted + 1)[1:], method="inverted_cdf"))
    of = np.searchsorted(borders, known, "left")
    bins = []
    for place in range(len(borders)):
        users = np.flatnonzero(of == place)
        bins.append(Bin(int(known[users].min()), int(known[users].max()), users))
    return bins


def by_bin(
    metrics: Metrics, name: str, users: pl.Series, bins: list[Bin], *, resamples: int, seed: int
) -> np.ndarray:
    """Returns mean, lower and upper end of the 95% bootstrap interval of a metric in each bin: [bins, 3].

    Args:
        metrics: The lists of one system.
        name: The metric.
        users: [U] the users that `bins` count, as text.
        bins: As `history_bins` returns them.
    """
    frame = pl.DataFrame({"user": users}).join(
        metrics.per_user().select("user", name), on="user", how="left", maintain_order="left"
    )
    values = frame[name].to_numpy()
    rows = []
    for one in bins:
        inside = values[one.users]
        known = inside[~np.isnan(inside)]
        ends = bootstrap_means(inside[:, None], resamples=resamples, seed=seed)[0]
        rows.append([known.mean() if len(known) else np.nan, *ends])
    return np.array(rows)
