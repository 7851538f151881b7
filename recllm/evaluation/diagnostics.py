"""What ranking metrics do not see: coverage, novelty and diversity of lists, truth of probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recllm.errors import DataError


def catalog_coverage(lists: np.ndarray, n_items: int) -> float:
    """The share of the catalog that stands in at least one list.

    Args:
        lists: [U, K] item numbers as `top_k` returns them; -1 marks an empty place.
        n_items: The size of the catalog.
    """
    return float(np.count_nonzero(_exposure(lists, n_items)) / n_items)


def gini_exposure(lists: np.ndarray, n_items: int) -> float:
    """The Gini coefficient of the exposure of items: 0 when it is equal, near 1 when one item has it all."""
    exposure = np.sort(_exposure(lists, n_items))
    if exposure[-1] == 0:
        raise DataError("lists: all places are empty; the Gini coefficient needs at least one item")
    weights = 2 * np.arange(1, n_items + 1) - n_items - 1
    return float((weights * exposure).sum() / (n_items * exposure.sum()))


def novelty(lists: np.ndarray, popularity: np.ndarray, n_users: int) -> float:
    """Mean self-information of the listed items, -log2(users who took the item / users), in bits.

    Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender systems", PNAS 2010. The mean
    is over each list, then over the lists that are not empty. An item without a training user has no finite
    self-information; it counts as one user, the most novel item that can be told (our choice).

    Args:
        lists: [U, K] item numbers, -1 for an empty place.
        popularity: [I] number of different training users of each item.
        n_users: Number of training users.
    """
    popularity = np.asarray(popularity)
    if popularity.ndim != 1 or not ((popularity >= 0) & (popularity <= n_users)).all():
        raise DataError(f"popularity: expected [I] counts of users from 0 to {n_users}")
    lists = _checked(lists, len(popularity))
    information = np.log2(n_users / np.maximum(popularity, 1))
    return _mean_over_lists(np.where(lists >= 0, information[lists], 0.0).sum(1), (lists >= 0).sum(1))


def intra_list_diversity(lists: np.ndarray, features: np.ndarray) -> float:
    """Mean over lists of the mean of 1 - cosine over the pairs of items of a list.

    Ziegler et al., "Improving recommendation lists through topic diversification", WWW 2005, with cosine
    distance. The sum over all pairs is read off |sum of unit vectors|^2. Lists of fewer than two items are
    left out.

    Args:
        lists: [U, K] item numbers, -1 for an empty place.
        features: [I, D] a vector per item, none of them zero where it is listed.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise DataError("features: expected finite numbers [I, D]")
    lists = _checked(lists, len(features))
    norms = np.linalg.norm(features, axis=1)
    if (bare := norms[lists[lists >= 0]] == 0).any():
        raise DataError(f"features: item {lists[lists >= 0][bare.argmax()]} is listed but its vector is zero")
    unit = np.divide(features, norms[:, None], out=np.zeros_like(features), where=norms[:, None] > 0)
    unit = np.concatenate([unit, np.zeros((1, unit.shape[1]))])  # the row that -1 points to
    size = (lists >= 0).sum(1)
    squared = np.zeros(len(lists))
    for column in range(0, unit.shape[1], 64):  # [U, K, 64] at a time
        for start in range(0, len(lists), 4096):
            part = unit[:, column : column + 64][lists[start : start + 4096]].sum(1)
            squared[start : start + 4096] += (part**2).sum(1)
    pairs = size * (size - 1) / 2
    return _mean_over_lists(pairs - (squared - size) / 2, pairs)


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error and the bins that it is made of."""

    error: float
    lower: np.ndarray
    """[B] lower edge of each bin."""
    upper: np.ndarray
    count: np.ndarray
    """[B] predictions in the bin."""
    confidence: np.ndarray
    """[B] mean predicted probability; NaN in an empty bin."""
    frequency: np.ndarray
    """[B] share of positives; NaN in an empty bin."""


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> Calibration:
    """Expected calibration error of the probability of the positive class over equal-width bins.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equations 2, 3 and 5 and their 15 bins;
    bins are (lower, upper], the first one includes 0.

    Args:
        probabilities: [n] from 0 to 1.
        labels: [n] 1 or 0.
    """
    p, y = _probabilities(probabilities, labels)
    if bins < 1:
        raise DataError(f"bins is {bins}; expected at least 1")
    edges = np.linspace(0, 1, bins + 1)
    of = np.clip(np.searchsorted(edges, p, "left") - 1, 0, bins - 1)
    count = np.bincount(of, minlength=bins)
    sums = [np.bincount(of, weights=x, minlength=bins) for x in (p, y)]
    means = [np.divide(x, count, out=np.full(bins, np.nan), where=count > 0) for x in sums]
    error = float(np.abs(sums[0] - sums[1]).sum() / len(p))
    return Calibration(error, edges[:-1], edges[1:], count, *means)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, not clipped: infinite where a prediction of 0 or 1 is wrong."""
    p, y = _probabilities(probabilities, labels)
    with np.errstate(divide="ignore"):
        return float(-np.where(y == 1, np.log(p), np.log1p(-p)).mean())


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared difference of probability and label (Brier 1950, two classes, 0 to 1)."""
    p, y = _probabilities(probabilities, labels)
    return float(((p - y) ** 2).mean())


def _probabilities(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    if p.ndim != 1 or p.shape != y.shape or not len(p):
        raise DataError(f"probabilities {p.shape} and labels {y.shape}: expected two arrays [n], n > 0")
    if (wrong := ~((p >= 0) & (p <= 1))).any():
        row = int(wrong.argmax())
        raise DataError(
            f"probabilities: row {row} is {p[row]}; expected 0 to 1 (pass log-odds through a sigmoid)"
        )
    if (wrong := (y != 0) & (y != 1)).any():
        raise DataError(f"labels: row {int(wrong.argmax())} is {y[wrong.argmax()]}; expected 0 or 1")
    return p, y


def _checked(lists: np.ndarray, n_items: int) -> np.ndarray:
    lists = np.asarray(lists)
    if lists.ndim != 2 or not np.issubdtype(lists.dtype, np.integer) or n_items < 1:
        raise DataError(f"lists: expected integers [U, K], got {lists.dtype} {lists.shape}")
    if lists.size and (lists.min() < -1 or lists.max() >= n_items):
        raise DataError(f"lists: item numbers must go from 0 to {n_items - 1}, and -1 for an empty place")
    ordered = np.sort(lists, axis=1)
    if (twice := ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any(1)).any():
        raise DataError(f"lists: row {int(twice.argmax())} lists an item twice")
    return lists


def _exposure(lists: np.ndarray, n_items: int) -> np.ndarray:
    lists = _checked(lists, n_items)
    return np.bincount(lists[lists >= 0], minlength=n_items)


def _mean_over_lists(total: np.ndarray, terms: np.ndarray) -> float:
    """Averages total / terms over the lists that have any terms (items, or pairs of items)."""
    if not (kept := terms > 0).any():
        raise DataError("lists: all are too short to measure")
    return float((total[kept] / terms[kept]).mean())
