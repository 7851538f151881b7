"""Candidates: never touched, all of N, the same whatever the order of the log, drawn as the protocol says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recllm.data import Dataset, write_dataset
from recllm.data.candidates import CandidateOptions, NegativeSampler, full_ranking, make_candidates
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.errors import DataError
from tests.conftest import make_dataset


def loo(dataset: Dataset) -> Split:
    return make_split(dataset, SplitOptions(dataset.folder, "loo", overwrite=True))


def draw(split: Split, **options) -> tuple[Path, pl.DataFrame]:
    folder = make_candidates(split, CandidateOptions(split.folder, overwrite=True, **options))
    return folder, pl.read_parquet(folder / "test.parquet")


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("method", ["loo", "ratio", "users", "temporal"])
def test_each_target_has_one_positive_and_n_items_the_user_never_touched(small_dataset, method, sampling):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, method))
    folder, _test = draw(split, negatives=7, sampling=sampling)
    assert folder.name == f"1+7-{sampling}-seed42"
    for part in ("valid", "test"):
        lists = pl.read_parquet(folder / f"{part}.parquet")
        targets = small_dataset.interactions[split.rows(part, targets=True).tolist()].select(
            "user", item="item"
        )
        positives = lists.filter(label=1)
        assert positives.filter(pl.col("item") != pl.col("target")).is_empty()
        assert Counter(positives.select("user", "item").rows()) == Counter(targets.rows())
        negatives = lists.filter(label=0)
        assert negatives.join(small_dataset.interactions, on=["user", "item"], how="semi").is_empty()
        assert lists.select("user", "target", "item").is_unique().all()
        assert set(lists.group_by("user", "target").len()["len"]) == {8}


def test_the_protocol_stands_in_the_files(small_dataset):
    folder, _ = draw(loo(small_dataset), negatives=5, seed=9)
    for part in ("valid", "test"):
        metadata = pl.read_parquet_metadata(folder / f"{part}.parquet")
        assert metadata["recllm.protocol"] == "loo/1+5-uniform-seed9" + ("/valid" if part == "valid" else "")


def test_negatives_do_not_depend_on_the_order_of_the_log_or_on_other_users(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    log = dataset.interactions.with_columns(timestamp=pl.int_range(pl.len()))
    some = log.filter(pl.col("user") < "u030")
    drawn = []
    for name, rows in (
        ("whole", log),
        ("shuffled", log.sample(fraction=1, shuffle=True, seed=1)),
        ("some", some),
    ):
        users = rows.select("user").unique().sort("user")
        copy = write_dataset(tmp_path / name, items=dataset.items, interactions=rows, users=users, source={})
        drawn.append(draw(loo(copy), negatives=10)[1].filter(pl.col("user") < "u030"))
    key = ["user", "target", "item"]
    assert drawn[0].sort(key).equals(drawn[1].sort(key)) and drawn[0].sort(key).equals(drawn[2].sort(key))


def test_another_seed_draws_other_negatives(small_dataset):
    split = loo(small_dataset)
    assert draw(split, seed=1, negatives=5)[1].equals(draw(split, seed=1, negatives=5)[1])
    assert not draw(split, seed=1, negatives=5)[1].equals(draw(split, seed=2, negatives=5)[1])


def test_positives_stand_anywhere_in_their_list(tmp_path):
    _, test = draw(loo(make_dataset(tmp_path / "d", users=400, items=60, interactions=4000)), negatives=4)
    places = test.with_columns(place=pl.int_range(pl.len()).over("user", "target")).filter(label=1)["place"]
    counts = np.bincount(places.to_numpy(), minlength=5)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("popular", [False, True])
def test_single_draws_follow_the_stated_distribution(popular):
    weights = np.array([5, 3, 0, 1, 1, 10, 2])
    lists = 40_000
    sampler = NegativeSampler(np.zeros(1, int), np.array([5]), 1, 7, weights if popular else None)
    drawn = sampler.draw(np.zeros(lists, int), np.arange(lists, dtype=np.uint64), 1)[:, 0]
    expected = np.where(np.arange(7) == 5, 0, weights if popular else 1).astype(float)
    counts = np.bincount(drawn, minlength=7)
    assert (counts[expected == 0] == 0).all()
    assert (
        stats.chisquare(counts[expected > 0], expected[expected > 0] / expected.sum() * lists).pvalue > 1e-4
    )


def test_drawing_without_replacement_by_popularity_equals_successive_sampling():
    weights = np.array([4.0, 2.0, 1.0])
    lists = 40_000
    sampler = NegativeSampler(np.zeros(1, int), np.array([0]), 1, 4, np.concatenate(([1.0], weights)))
    drawn = sampler.draw(np.zeros(lists, int), np.arange(lists, dtype=np.uint64), 2) - 1
    counts = Counter(map(tuple, drawn.tolist()))
    for (first, second), count in counts.items():
        total = weights.sum()
        chance = weights[first] / total * weights[second] / (total - weights[first])
        assert abs(count / lists - chance) < 0.01


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 2**63))
def test_the_stream_is_a_prefix_whatever_the_block(count, seed):
    """More negatives only add to fewer: the first ones stay (so results at several N are nested)."""
    sampler = NegativeSampler(np.zeros(3, int), np.array([1, 5, 7]), 1, 50)
    streams = np.array([seed], dtype=np.uint64)
    longer = sampler.draw(np.zeros(1, int), streams, 13)[0]
    assert sampler.draw(np.zeros(1, int), streams, count)[0].tolist() == longer[:count].tolist()


def test_a_user_who_touched_nearly_everything_gets_what_is_left():
    items = 20_000
    touched = np.arange(items - 6)
    sampler = NegativeSampler(np.zeros(len(touched), int), touched, 1, items)
    drawn = sampler.draw(np.zeros(200, int), np.arange(200, dtype=np.uint64), 3)
    assert drawn.min() == items - 6 and drawn.max() == items - 1
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    assert stats.chisquare(np.bincount(drawn.ravel() - (items - 6), minlength=6)).pvalue > 1e-4


def test_a_repeated_pair_is_one_list(tmp_path):
    log = pl.DataFrame({"user": ["u"] * 5, "item": list("abcbb"), "timestamp": range(5)})
    catalog, users = pl.DataFrame({"item": list("abcdefgh")}), pl.DataFrame({"user": ["u"]})
    dataset = write_dataset(tmp_path / "d", items=catalog, interactions=log, users=users, source={})
    split = make_split(dataset, SplitOptions(dataset.folder, "temporal", (1, 1, 3)))
    _, test = draw(split, negatives=3)
    assert test.select("user", "target", "item").is_unique().all()
    assert sorted(test["target"].unique()) == ["b", "c"]


def test_fingerprints_tell_lists_apart(small_dataset):
    split = loo(small_dataset)
    kinds = [(part, mask) for part in ("valid", "test") for mask in ("seen", "train", "none")]
    assert len({full_ranking(split, part, mask=mask).candidates for part, mask in kinds}) == 6
    assert full_ranking(split, "test").candidates == full_ranking(Split.open(split.folder), "test").candidates


def test_users_with_too_few_items_left_are_left_out_and_named(tmp_path):
    log = pl.DataFrame({"user": ["u"] * 4 + ["greedy"] * 9, "item": [*"abcd", *"abcdefghi"]})
    items, users = log.select("item").unique().sort("item"), log.select("user").unique().sort("user")
    catalog = pl.concat([items, pl.DataFrame({"item": ["j", "k"]})])
    dataset = write_dataset(tmp_path / "d", items=catalog, interactions=log, users=users, source={})
    split = loo(dataset)
    folder = make_candidates(split, CandidateOptions(split.folder, negatives=3))
    lists = pl.read_parquet(folder / "test.parquet")
    assert lists["user"].unique().to_list() == ["u"] and len(lists) == 4
    left_out = json.loads((folder / "manifest.json").read_text())["left_out"]
    assert left_out["test"] == {"lists": 1, "users": ["greedy"]}
    with pytest.raises(
        DataError, match=r"fewer than 8 items are left to draw negatives.*user 'u' has the most, 7"
    ):
        make_candidates(split, CandidateOptions(split.folder, negatives=8))


@pytest.mark.parametrize("method", ["loo", "ratio", "users", "temporal"])
@pytest.mark.parametrize("mask", ["seen", "train", "none"])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_full_ranking_lists_equal_the_definition(small_dataset, method, mask, part):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, method))
    ranking = full_ranking(split, part, mask=mask)
    log = small_dataset.interactions.with_row_index("row")
    known = split.history_rows(part) if mask == "seen" else split.rows("train") if mask == "train" else []
    targets = log[split.rows(part, targets=True).tolist()]
    name = {"seen": "mask-seen", "train": "mask-train", "none": "no-mask"}[mask]
    assert ranking.protocol == f"{split.protocol}/full/{name}" + ("/valid" if part == "valid" else "")
    assert ranking.user_ids.equals(small_dataset.users["user"].gather(ranking.users))
    ids = small_dataset.items["item"]
    assert set(small_dataset.users["user"].gather(ranking.users)) == set(targets["user"])
    for place, user in enumerate(small_dataset.users["user"].gather(ranking.users)):
        positives = ranking.positives[ranking.positive_offsets[place] : ranking.positive_offsets[place + 1]]
        masked = ranking.masked[ranking.masked_offsets[place] : ranking.masked_offsets[place + 1]]
        wanted = set(targets.filter(user=user)["item"])
        seen = set(log[list(known)].filter(user=user)["item"]) if len(known) else set()
        assert set(ids.gather(positives)) == wanted and len(positives) == len(wanted)
        assert set(ids.gather(masked)) == seen - wanted and len(masked) == len(seen - wanted)
