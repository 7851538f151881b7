"""Mean profiles: the paper's formula, what may be known, what has no text, and ties."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from recllm.data.candidates import CandidateOptions, full_ranking, make_candidates
from recllm.data.dataset import write_dataset
from recllm.data.splits import SplitOptions, make_split
from recllm.data.texts import item_texts
from recllm.errors import DataError
from recllm.evaluation import compute_metrics, rank_candidates, rank_catalog
from recllm.evaluation.coverage import fill_catalog
from recllm.retrieval.profiles import MeanProfiles
from tests.conftest import make_dataset


def split_of(dataset, method="loo", **options):
    return make_split(dataset, SplitOptions(dataset.folder, method, name=method, **options))


def by_hand(tmp_path):
    """One user takes a, b, c, d in time (c validates, d tests); another takes c, a, b, e."""
    log = [("u", item, time) for time, item in enumerate("abcd")] + [
        ("v", item, time) for time, item in enumerate("cabe")
    ]
    return write_dataset(
        tmp_path / "hand",
        items=pl.DataFrame({"item": list("abcdef")}),
        interactions=pl.DataFrame(log, schema=["user", "item", "timestamp"], orient="row"),
        users=pl.DataFrame({"user": ["u", "v"]}),
        source={"made": "by a test"},
    )


HAND = np.array([[2, 0], [0, 10], [-3, 0], [3, 4], [1, 1], [0, 0]], np.float32)
PRESENT = np.array([True] * 5 + [False])


def test_an_example_by_hand(tmp_path):
    split = split_of(by_hand(tmp_path))
    model = MeanProfiles(split, "valid", HAND, PRESENT)
    # u knows a and b: unit vectors (1, 0) and (0, 1), so the profile is (1, 1) / sqrt 2.
    asked = pl.DataFrame({"user": ["u"] * 6, "target": ["c"] * 6, "item": list("abcdef")})
    scores = model.score(asked)["score"]
    half = np.sqrt(0.5)
    assert np.allclose(scores, [half, half, -half, 7 / 5 * half, 1, 0], atol=1e-6)
    # At test time u knows c too, at (-1, 0): the mean is (0, 1/3).
    with pytest.raises(DataError, match="row 0: its `target` is not held out of its user in this part"):
        MeanProfiles(split, "test", HAND, PRESENT).score(asked)
    asked = asked.with_columns(target=pl.lit("d"))
    scores = MeanProfiles(split, "test", HAND, PRESENT).score(asked)["score"]
    assert np.allclose(scores, [0, 1, 0, 0.8, half, 0], atol=1e-6)
    # Only the latest two, b and c: (-1, 1) / sqrt 2.
    scores = MeanProfiles(split, "test", HAND, PRESENT, history=2).score(asked)["score"]
    assert np.allclose(scores, [-half, half, half, half / 5, 0, 0], atol=1e-6)


def naive_profile(split, part, user, vectors, present, history, target=None):
    """Sorts the user's known rows by time, and averages unit vectors of those with a text."""
    dataset = split.dataset
    known = set(split.rows("train")) | (set(split.rows("valid")) if part == "test" else set())
    known |= set(split.rows(part, targets=False))

    def place(row):
        return (0 if dataset.timestamps is None else dataset.timestamps[row]), row

    targets = [
        place(row)
        for row in split.rows(part, targets=True)
        if dataset.user_codes[row] == user and target in (None, dataset.item_codes[row])
    ]
    rows = sorted((row for row in known if dataset.user_codes[row] == user), key=place)
    rows = [row for row in rows if not targets or place(row) < min(targets)]
    items = [dataset.item_codes[row] for row in rows if present[dataset.item_codes[row]]]
    if not items:
        return None
    unit = [vectors[item] / np.linalg.norm(vectors[item]) for item in items[-history:]]
    return np.mean(unit, axis=0) / np.linalg.norm(np.mean(unit, axis=0))


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("history", [0, 1, 4])
@pytest.mark.parametrize(
    ("method", "timed"), [("loo", True), ("users", True), ("random", True), ("random", False)]
)
def test_scores_equal_a_naive_computation(tmp_path, part, history, method, timed):
    dataset = make_dataset(tmp_path / "d", timed=timed)
    split = split_of(dataset, method)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6)).astype(np.float32) * rng.uniform(0.1, 9, (40, 1)).astype(np.float32)
    present = rng.random(40) < 0.7
    vectors[~present] = 0
    model = MeanProfiles(split, part, vectors, present, history=history)
    users = np.arange(len(dataset.users))
    expected = np.zeros((len(users), 40))
    for user in users:
        profile = naive_profile(split, part, user, vectors.astype(np.float64), present, history)
        assert model.without_profile[user] == (profile is None)
        if profile is not None:
            expected[user] = vectors @ profile / np.maximum(np.linalg.norm(vectors, axis=1), 1e-9)
            expected[user, ~present] = 0  # nothing is said of them; see `recllm.evaluation.coverage`
    assert np.allclose(model.of_users(users) @ model.item_vectors.T, expected, atol=1e-5)
    pairs = pl.DataFrame(
        {
            "user": dataset.users["user"].gather(np.repeat(users, 40)),
            "item": dataset.items["item"].gather(np.tile(np.arange(40), len(users))),
        }
    )
    assert np.allclose(model.score(pairs)["score"], expected.ravel(), atol=1e-5)
    asked = split.scan(part).filter(pl.col("target")).select("user", target="item", item="item").collect()
    found = model.score(asked)["score"].to_list()
    for row, score in zip(split.rows(part, targets=True), found, strict=True):
        user, item = dataset.user_codes[row], dataset.item_codes[row]
        profile = naive_profile(split, part, user, vectors.astype(np.float64), present, history, item)
        expected = 0.0 if not present[item] else None
        if profile is None:
            expected = 0.0
        elif expected is None:
            expected = vectors[item] @ profile / np.linalg.norm(vectors[item])
        assert score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_nothing_held_out_enters_a_profile(small_dataset, part):
    """Of each user, her own target's vector is turned: profiles stay as they were, bit for bit."""
    split = split_of(small_dataset)
    codes, users = small_dataset.item_codes, small_dataset.user_codes
    rng = np.random.default_rng(0)
    vectors, present = rng.normal(size=(40, 5)).astype(np.float32), np.ones(40, bool)
    before = MeanProfiles(split, part, vectors, present)
    held_out = {"valid": ("valid", "test"), "test": ("test",)}[part]
    entered = 0
    for name in held_out:
        for row in split.rows(name):
            turned = vectors.copy()
            turned[codes[row]] *= -1
            after = MeanProfiles(split, part, turned, present).of_users(users[row : row + 1])
            assert np.array_equal(after, before.of_users(users[row : row + 1]))
    for row in split.rows("train")[:20]:
        turned = vectors.copy()
        turned[codes[row]] *= -1
        after = MeanProfiles(split, part, turned, present).of_users(users[row : row + 1])
        entered += not np.array_equal(after, before.of_users(users[row : row + 1]))
    assert entered == 20


def test_vectors_are_normalized_before_the_mean(small_dataset):
    split = split_of(small_dataset)
    rng = np.random.default_rng(0)
    vectors, present = rng.normal(size=(40, 5)).astype(np.float32), np.ones(40, bool)
    scale = (2.0 ** rng.integers(-6, 7, (40, 1))).astype(np.float32)
    users = np.arange(60)
    plain = MeanProfiles(split, "test", vectors, present).of_users(users)
    scaled = MeanProfiles(split, "test", vectors * scale, present).of_users(users)
    assert np.allclose(plain, scaled, atol=1e-6)


def test_equal_texts_tie_in_both_ways_of_ranking(small_dataset):
    """27 different vectors for 40 items: in lists and in the catalog, equal ones have equal scores."""
    split = split_of(small_dataset)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(27, 33)).astype(np.float32)[rng.integers(0, 27, 40)]
    model = MeanProfiles(split, "test", vectors, np.ones(40, bool))
    ranking = full_ranking(split, "test", mask="none")
    full = rank_catalog(ranking, (model.of_users(ranking.users), model.item_vectors), system="p")
    labels = pl.DataFrame(
        {
            "user": ranking.user_ids.gather(np.repeat(np.arange(len(ranking.users)), 40)),
            "item": pl.concat([ranking.item_ids] * len(ranking.users)),
        }
    )
    label = np.zeros((len(ranking.users), 40), np.int8)
    label[np.arange(len(ranking.users)), ranking.positives] = 1
    listed = rank_candidates(labels.with_columns(label=label.ravel()), model.score(labels))
    twins = (vectors[ranking.positives][:, None] == vectors[None]).all(2).sum(1)
    assert np.array_equal(full.tied, twins) and np.array_equal(listed.tied, twins) and twins.max() > 1
    assert np.array_equal(full.above, listed.above)


def test_what_has_no_text_is_ranked_by_chance_and_who_knows_nothing_gets_a_tie_of_all(tmp_path):
    split = split_of(by_hand(tmp_path))
    only_d = np.array([False, False, False, True, False, False])
    model = MeanProfiles(split, "test", HAND * only_d[:, None], only_d)
    assert model.without_profile.all()
    ranking = full_ranking(split, "test")
    records = rank_catalog(ranking, (model.of_users(ranking.users), model.item_vectors), system="p")
    assert (records.above == 0).all() and (records.tied == records.n).all()
    assert compute_metrics(records, names=["auc"]).mean()["auc"] == 0.5
    some = np.array([True, True, True, False, True, False])  # the target of u has no text
    model = MeanProfiles(split, "test", HAND * some[:, None], some)
    scores = fill_catalog((model.of_users(ranking.users), model.item_vectors), some, ranking)
    records = rank_catalog(ranking, scores, system="p")
    u = records.user.to_list().index("u")
    # e is the only candidate of u that has a text: d and f score as it does, not below it.
    assert (records.above[u], records.tied[u], records.n[u]) == (0, 3, 3)
    with pytest.raises(DataError, match="no item has a text"):
        MeanProfiles(split, "test", HAND * 0, np.zeros(6, bool))


def test_candidates_of_another_dataset_are_refused(tmp_path, small_dataset):
    split = split_of(small_dataset)
    make_candidates(split, CandidateOptions(split.folder, negatives=5))
    model = MeanProfiles(split, "test", np.ones((40, 3), np.float32), np.ones(40, bool))
    lists = pl.read_parquet(split.folder / "candidates/1+5-uniform-seed42/test.parquet")
    assert len(model.score(lists)) == len(lists)
    with pytest.raises(DataError, match="row 3: no item 'elsewhere'"):
        stranger = pl.when(pl.int_range(pl.len()) == 3).then(pl.lit("elsewhere")).otherwise("item")
        model.score(lists.with_columns(item=stranger))
    with pytest.raises(DataError, match="--history -1"):
        MeanProfiles(split, "test", np.ones((40, 3), np.float32), np.ones(40, bool), history=-1)


def test_texts_of_the_catalog(tmp_path):
    rows = [
        ("a", "Mug", "For tea."),
        ("b", "Mug!", "For tea."),
        ("c", "Mug", " "),
        ("d", "", "Tea"),
        ("e", " ", ""),
    ]
    dataset = write_dataset(
        tmp_path / "d",
        items=pl.DataFrame(rows, schema=["item", "title", "text"], orient="row"),
        interactions=pl.DataFrame({"user": ["u"], "item": ["a"]}),
        users=pl.DataFrame({"user": ["u"]}),
        source={"made": "by a test"},
    )
    assert item_texts(dataset) == ["Mug. For tea.", "Mug! For tea.", "Mug", "Tea", ""]
    with pytest.raises(DataError, match=r"imsg\.parquet does not exist"):
        item_texts(dataset, "imsg")
