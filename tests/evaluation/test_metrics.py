"""Every metric against the enumeration of all orders of its ties, and without ties against others."""

import itertools
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import DataError
from recllm.evaluation import (
    RankRecords,
    compute_metrics,
    pooled_auc,
    rank_candidates,
    rank_score_matrix,
)
from recllm.evaluation import metrics as module
from recllm.evaluation.metrics import distinct_metric_names

KS = (1, 2, 3, 5, 9)


def ordered_metrics(labels: tuple[int, ...], k: int) -> dict[str, float]:
    """The textbook definitions on one list without ties, best candidate first."""
    positives = sum(labels)
    ranks = [rank for rank, label in enumerate(labels, 1) if label]
    top = [rank for rank in ranks if rank <= k]
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(positives, k) + 1))
    return {
        "hr": float(bool(top)),
        "recall": len(top) / positives,
        "precision": len(top) / k,
        "ndcg": sum(1 / math.log2(rank + 1) for rank in top) / ideal,
        "mrr": 1 / top[0] if top else 0.0,
        "map": sum((place + 1) / rank for place, rank in enumerate(top)) / positives,
    }


def enumerated(scores: list[int], labels: list[int]) -> dict[str, float]:
    """Averages `ordered_metrics` over all orders that the scores allow, and takes AUC over all pairs."""
    groups = [
        sorted(
            set(itertools.permutations(label for s, label in zip(scores, labels, strict=True) if s == score))
        )
        for score in sorted(set(scores), reverse=True)
    ]  # the different label sequences of a group are equally likely
    orders = [tuple(itertools.chain(*parts)) for parts in itertools.product(*groups)]
    found = {}
    for k in KS:
        every = [ordered_metrics(order, k) for order in orders]
        found |= {f"{name}@{k}": np.mean([one[name] for one in every]) for name in every[0]}
    whole = [ordered_metrics(order, len(scores)) for order in orders]
    found |= {name: np.mean([one[name] for one in whole]) for name in ("mrr", "map")}
    pairs = [
        (p > n) + (p == n) / 2
        for p, is_positive in zip(scores, labels, strict=True)
        for n, other in zip(scores, labels, strict=True)
        if is_positive and not other
    ]
    return found | {"auc": np.mean(pairs) if pairs else math.nan}


@st.composite
def lists(draw):
    n = draw(st.integers(1, 8))
    scores = draw(st.lists(st.integers(0, draw(st.integers(0, 7))), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(any))
    return scores, labels


@settings(max_examples=300, deadline=None)
@given(st.lists(lists(), min_size=1, max_size=3), st.randoms())
def test_every_metric_is_the_mean_over_all_tie_orders(worlds, random):
    rows = [
        (f"u{u}", f"i{i}", label, score)
        for u, (scores, labels) in enumerate(worlds)
        for i, (score, label) in enumerate(zip(scores, labels, strict=True))
    ]
    random.shuffle(rows)
    table = pl.DataFrame(rows, schema=["user", "item", "label", "score"], orient="row")
    records = rank_candidates(table.drop("score"), table.drop("label"))
    per_user = compute_metrics(records, KS).per_user()
    expected = [enumerated(*world) for world in worlds]
    for row, want in zip(per_user.iter_rows(named=True), expected, strict=True):
        assert row.keys() - {"user"} == want.keys()
        for name, value in want.items():
            assert row[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    tied = sum(
        any(other == score and not label_ for other, label_ in zip(scores, labels, strict=True))
        for scores, labels in worlds
        for score, label in zip(scores, labels, strict=True)
        if label
    )
    assert compute_metrics(records).tie_rate == pytest.approx(tied / len(records))


@pytest.mark.parametrize("place", [0, 10, 20])
def test_equal_scores_are_worth_chance_wherever_the_positive_is_stored(place):
    metrics = compute_metrics(rank_score_matrix(np.zeros((1, 21)), np.array([place])), (10,))
    mean = metrics.mean()
    assert [round(mean[name], 5) for name in ("hr@10", "ndcg@10", "auc")] == [0.47619, 0.21636, 0.5]
    assert round(mean["mrr"], 4) == 0.1736
    assert metrics.tie_rate == 1


def test_long_ties_of_several_positives_stay_exact_and_fast():
    t, r = 12_000, 3
    records = RankRecords(
        pl.Series(["u"] * r), pl.Series(range(r)), np.zeros(r, int), np.full(r, t), np.full(r, t), "user"
    )
    j = np.arange(1, t - r + 2, dtype=float)
    first_at_j = r * (t - j) * (t - j - 1) / (t * (t - 1.0) * (t - 2))
    assert first_at_j.sum() == pytest.approx(1)
    metrics = compute_metrics(records, (10,)).mean()
    assert metrics["mrr"] == pytest.approx((first_at_j / j).sum(), rel=1e-12)
    assert metrics["mrr@10"] == pytest.approx((first_at_j / j)[:10].sum(), rel=1e-12)
    assert metrics["hr@10"] == pytest.approx(1 - math.comb(t - r, 10) / math.comb(t, 10), rel=1e-12)


def random_lists(rng, queries=200, width=30):
    scores = rng.permuted(np.tile(np.arange(width, dtype=float), (queries, 1)), axis=1)
    labels = (rng.random((queries, width)) < 0.15).astype(int)
    labels[np.arange(queries), rng.integers(0, width, queries)] = 1
    return scores, labels


def test_scikit_learn_agrees_with_and_without_ties():
    from sklearn.metrics import ndcg_score, roc_auc_score

    rng = np.random.default_rng(0)
    scores, labels = random_lists(rng)
    for tied in (scores, scores // 4, scores * 0):
        found = compute_metrics(rank_score_matrix(tied, labels), (5, 50)).lists
        for k in (5, 50):
            want = [ndcg_score([y], [s], k=k) for y, s in zip(labels, tied, strict=True)]
            np.testing.assert_allclose(found[f"ndcg@{k}"], want, atol=1e-12)
        want = [roc_auc_score(y, s) for y, s in zip(labels, tied, strict=True)]
        np.testing.assert_allclose(found["auc"], want, atol=1e-12)
        assert pooled_auc(tied.ravel(), labels.ravel()) == pytest.approx(
            roc_auc_score(labels.ravel(), tied.ravel()), abs=1e-12
        )


def test_pytrec_eval_and_ranx_agree_without_ties():
    import pytrec_eval
    import ranx

    scores, labels = random_lists(np.random.default_rng(1))
    ours = compute_metrics(rank_score_matrix(scores, labels), (5, 50)).lists
    names = [str(item) for item in range(scores.shape[1])]
    queries = [f"q{query:03}" for query in range(len(scores))]
    run = {q: dict(zip(names, map(float, row), strict=True)) for q, row in zip(queries, scores, strict=True)}
    qrels = {
        q: {name: 1 for name, label in zip(names, row, strict=True) if label}
        for q, row in zip(queries, labels, strict=True)
    }
    theirs = {
        "recall@5": "recall_5",
        "precision@5": "P_5",
        "precision@50": "P_50",
        "hr@5": "success_5",
        "ndcg@5": "ndcg_cut_5",
        "map@5": "map_cut_5",
        "map": "map",
        "mrr": "recip_rank",
    }
    evaluated = pytrec_eval.RelevanceEvaluator(
        qrels, {"recall.5", "P.5,50", "success.5", "ndcg_cut.5", "map_cut.5", "map", "recip_rank"}
    ).evaluate(run)
    for name, other in theirs.items():
        np.testing.assert_allclose(
            ours[name], [evaluated[q][other] for q in queries], atol=1e-12, err_msg=name
        )
    theirs = {"ndcg@5": "ndcg@5", "mrr@5": "mrr@5", "map": "map"}  # each costs ranx seconds of compilation
    found = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), list(theirs.values()), return_mean=False)
    for name, other in theirs.items():
        np.testing.assert_allclose(ours[name], found[other], atol=1e-12, err_msg=name)


def test_lists_without_a_negative_have_no_auc_and_are_counted():
    records = rank_score_matrix(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1, 1], [1, 0]]))
    metrics = compute_metrics(records)
    assert np.isnan(metrics.lists["auc"][0])
    assert metrics.mean()["auc"] == 1 and metrics.undefined()["auc"] == 1


def test_lists_of_one_user_are_averaged_before_users():
    records = RankRecords(
        pl.Series(["a", "a", "b"]),
        pl.Series(["x", "y", "x"]),
        np.array([0, 1, 3]),
        *(np.ones(3, int), np.full(3, 4)),
        lists="target",
    )
    metrics = compute_metrics(records, names=["mrr"])
    assert metrics.lists["mrr"].tolist() == [1, 0.5, 0.25]
    assert metrics.per_user()["mrr"].to_list() == [0.75, 0.25]
    assert metrics.mean() == {"mrr": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndgc@10", "no metric 'ndgc@10'; the nearest is 'ndcg'"),
        *((f"ndcg@{cutoff}", "a cutoff must be a whole number of at least 1") for cutoff in ("", 0, -1, 1.5)),
        ("NDCG@10", "no metric 'NDCG@10'; the nearest is 'ndcg@10'"),
        ("MRR", "the nearest is 'mrr'"),
        *((f"hr@{cutoff}", r"a cutoff must be at most 10\^9") for cutoff in (10**9 + 1, 10**30, "9" * 5000)),
        ("auc@5", "takes no cutoff"),
        *((name, f"'{name}' needs a cutoff, as in '{name}@10'") for name in ("hr", "recall", "precision")),
    ],
)
def test_unknown_metrics_are_refused(name, message):
    with pytest.raises(DataError, match=message):
        compute_metrics(rank_score_matrix(np.eye(2), np.array([0, 1])), names=[name])


@pytest.mark.parametrize("k", [0, -5, 2.5])
def test_cutoffs_are_refused_as_cutoffs(k):
    with pytest.raises(DataError, match=rf"cutoff {k}: cutoffs \(--ks\) must be whole numbers"):
        compute_metrics(rank_score_matrix(np.eye(2), np.array([0, 1])), (10, k))


def test_huge_cutoffs_and_lists_are_refused():
    records = rank_score_matrix(np.eye(2), np.array([0, 1]))
    for k in (10**9 + 1, 10**30):
        with pytest.raises(DataError, match=r"at most 10\^9"):
            compute_metrics(records, (10, k))
    assert compute_metrics(records, (10**9,)).mean()["hr@1000000000"] == 1
    with pytest.raises(DataError, match="a list of 4294967296 candidates"):
        compute_metrics(replace(records, n=np.array([3, 2**32])))


def test_lists_that_repeat_are_measured_once_with_the_same_result(monkeypatch):
    rng = np.random.default_rng(0)
    n = rng.integers(5, 8, 3000)
    above = rng.integers(0, n - 2)
    tied = rng.integers(1, n - above)
    ids = pl.Series(range(3000))
    records = RankRecords(ids, ids, above, tied, n, "user")
    measured, lengths = module._auc, []
    monkeypatch.setattr(module, "_auc", lambda x, k: lengths.append(len(x.n)) or measured(x, k))
    once = compute_metrics(records, (1, 3))
    triples = set(zip(above.tolist(), tied.tolist(), n.tolist(), strict=True))
    assert lengths == [len(triples)] and len(triples) < 50
    monkeypatch.setattr(module, "_distinct", lambda *columns: (*columns, None))
    each = compute_metrics(records, (1, 3))
    assert lengths[1] == 3000 and once.lists.keys() == each.lists.keys()
    for name, values in each.lists.items():
        np.testing.assert_array_equal(once.lists[name], values, err_msg=name)
    assert once.tie_rate == each.tie_rate == np.mean(tied > 1)


def test_metrics_that_are_one_for_lists_of_one_positive_are_named_once():
    one = rank_score_matrix(np.random.default_rng(0).normal(size=(9, 6)), np.arange(9) % 6)
    names = distinct_metric_names(one, (1, 5))
    assert names == ["hr@1", "hr@5", "ndcg@5", "mrr", "auc"]
    values = compute_metrics(one, (1, 5)).mean()
    for same, other in [("recall@5", "hr@5"), ("ndcg@1", "hr@1"), ("map", "mrr"), ("map@5", "mrr@5")]:
        assert values[same] == values[other]
    assert values["precision@5"] == pytest.approx(values["hr@5"] / 5)
    several = rank_score_matrix(np.eye(2), np.ones((2, 2)))
    assert distinct_metric_names(several, (1, 5)) == list(compute_metrics(several, (1, 5)).lists)


def test_pooled_auc_needs_both_classes():
    with pytest.raises(DataError, match="at least one"):
        pooled_auc(np.ones(3), np.ones(3))
    with pytest.raises(DataError, match="finite"):
        pooled_auc(np.array([1, np.nan]), np.array([1, 0]))
