"""Coverage, novelty, diversity, exposure and calibration by hand and against scikit-learn."""

import numpy as np
import pytest

from recllm.errors import DataError
from recllm.evaluation import (
    brier,
    calibration,
    catalog_coverage,
    gini_exposure,
    intra_list_diversity,
    log_loss,
    novelty,
)

LISTS = np.array([[0, 1], [0, 2], [0, -1]])


def test_coverage_and_exposure():
    assert catalog_coverage(LISTS, 6) == 0.5
    exposure = np.array([3, 1, 1, 0, 0, 0])
    pairwise = np.abs(exposure[:, None] - exposure).sum() / (2 * 6 * exposure.sum())
    assert gini_exposure(LISTS, 6) == pytest.approx(pairwise)
    assert gini_exposure(np.arange(6).reshape(3, 2), 6) == 0


def test_novelty_in_bits_with_unseen_items_as_one_user():
    assert novelty(LISTS, np.array([8, 2, 0]), 8) == pytest.approx(((0 + 2) / 2 + (0 + 3) / 2 + 0) / 3)


def test_diversity_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 70))
    lists = np.array([rng.permutation(30)[:5] for _ in range(20)])
    lists[0, 3:], lists[1, 1:] = -1, -1
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    wanted = []
    for row in lists:
        row = row[row >= 0]
        if len(row) > 1:
            cosine = unit[row] @ unit[row].T
            wanted.append(1 - cosine[np.triu_indices(len(row), 1)].mean())
    assert intra_list_diversity(lists, features) == pytest.approx(np.mean(wanted))


def test_probabilities_against_scikit_learn():
    from sklearn.metrics import brier_score_loss
    from sklearn.metrics import log_loss as sk_log_loss

    rng = np.random.default_rng(0)
    p = rng.random(500)
    y = (rng.random(500) < p).astype(int)
    assert log_loss(p, y) == pytest.approx(sk_log_loss(y, p))
    assert brier(p, y) == pytest.approx(brier_score_loss(y, p))
    assert (
        log_loss(np.array([1.0]), np.array([0])) == np.inf and log_loss(np.array([1.0]), np.array([1])) == 0
    )


def test_calibration_bins_by_hand():
    p, y = np.array([0.0, 0.2, 0.5, 0.6, 1.0]), np.array([0, 1, 0, 1, 1])
    table = calibration(p, y, bins=2)  # (0, .5] holds 0 too, (.5, 1]
    assert table.count.tolist() == [3, 2]
    np.testing.assert_allclose(table.confidence, [0.7 / 3, 0.8])
    np.testing.assert_allclose(table.frequency, [1 / 3, 1])
    assert table.error == pytest.approx((3 * abs(0.7 / 3 - 1 / 3) + 2 * 0.2) / 5)
    assert np.isnan(calibration(p, y).confidence[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalog_coverage(np.array([[0, 6]]), 6), "from 0 to 5"),
        (lambda: catalog_coverage(np.array([[0.5]]), 6), "integers"),
        (lambda: catalog_coverage(np.array([[3, 2, 3]]), 6), "row 0 lists an item twice"),
        (lambda: gini_exposure(np.array([[-1]]), 6), "empty"),
        (lambda: novelty(np.array([[-1]]), np.ones(3), 4), "too short"),
        (lambda: novelty(LISTS, np.array([5, 1, 1]), 4), "from 0 to 4"),
        (lambda: intra_list_diversity(LISTS, np.zeros((3, 2))), "item 0 is listed but its vector is zero"),
        (lambda: intra_list_diversity(LISTS[:, :1], np.ones((3, 2))), "too short"),
        (lambda: brier(np.array([0.1, 1.5]), np.array([0, 1])), "row 1 is 1.5"),
        (lambda: brier(np.array([0.1, np.nan]), np.array([0, 1])), "row 1 is nan"),
        (lambda: log_loss(np.array([0.1, 0.2]), np.array([0, 2])), "row 1 is 2"),
        (lambda: calibration(np.array([]), np.array([])), "n > 0"),
        (lambda: calibration(np.array([0.5]), np.array([1]), bins=0), "bins is 0"),
    ],
)
def test_impossible_input_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
