"""Two stages equal the ranking that they describe, counted by brute force; what does not belong together."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data.candidates import FullRanking
from recllm.errors import DataError
from recllm.evaluation import rank_catalog
from recllm.evaluation.frames import check_ranks
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.rerank import rerank, share_listed
from recllm.evaluation.top_k_files import TopK, write_stage


def world(seed: int, users: int = 5, items: int = 12, levels: int = 4):
    """Integer scores with many ties, one to three targets of a user, masked items."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, levels, (users, items)).astype(np.float32)
    second = rng.integers(0, 3, (users, items)).astype(np.float32)
    positives = [np.sort(rng.permutation(items)[: rng.integers(1, 4)]) for _ in range(users)]
    masked = [np.setdiff1d(rng.permutation(items)[: rng.integers(0, 6)], own) for own in positives]
    ranking = FullRanking(
        users=np.arange(users),
        positives=np.concatenate(positives),
        positive_offsets=np.cumsum([0, *map(len, positives)]),
        masked=np.concatenate(masked),
        masked_offsets=np.cumsum([0, *map(len, masked)]),
        protocol="random-8:1:1-seed42/full/mask-seen",
        user_ids=pl.Series([f"u{user}" for user in range(users)]),
        item_ids=pl.Series([f"i{item}" for item in range(items)]),
        candidates="0123",
    )
    return rng, first, second, positives, masked, ranking


def top_of(path, frame: pl.DataFrame, ranking: FullRanking, system="first") -> TopK:
    metadata = {"recllm.protocol": ranking.protocol, "recllm.system": system, "recllm.candidates": "0123"}
    frame.write_parquet(path, metadata=metadata)
    return TopK.read(path)


def some_lists(rng, first, positives, masked, k: int) -> list[list[int]]:
    """The k best candidates of each user; of equal scores any, as another system may have it."""
    lists = []
    for user in range(len(first)):
        candidates = np.setdiff1d(np.arange(first.shape[1]), masked[user])
        order = sorted(candidates, key=lambda item: (-first[user, item], rng.random()))
        lists.append([int(item) for item in order[:k]])
    return lists


def rows_of(lists, positives, scores) -> pl.DataFrame:
    rows = [
        (f"u{user}", f"i{target}", f"i{item}", float(scores[user, item]))
        for user, items in enumerate(lists)
        for target in positives[user]
        for item in items
    ]
    return pl.DataFrame(rows, schema=["user", "target", "item", "score"], orient="row")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 8))
def test_two_stages_equal_brute_force(seed, k, levels):
    rng, first, second, positives, masked, ranking = world(seed, levels=levels)
    lists = some_lists(rng, first, positives, masked, k)
    stage = rank_catalog(ranking, first, system="first")
    with tempfile.TemporaryDirectory() as folder:
        top = top_of(Path(folder) / "t.parquet", rows_of(lists, positives, first), ranking)
    records = rerank(stage, top, rows_of(lists, positives, second), system="both")
    row = 0
    for user, own in enumerate(positives):
        candidates = [item for item in range(first.shape[1]) if item not in masked[user]]

        def place(item, user=user):
            listed = item in lists[user]
            return (listed, second[user, item] if listed else first[user, item])

        for target in own:
            above = sum(place(item) > place(target) for item in candidates)
            tied = sum(place(item) == place(target) for item in candidates)
            assert (records.user[row], records.item[row]) == (f"u{user}", f"i{target}")
            assert (records.above[row], records.tied[row], records.n[row]) == (above, tied, len(candidates))
            row += 1
    assert row == len(records)
    columns = {name: getattr(records, name) for name in ("user", "item", "above", "tied", "n")}
    check_ranks(pl.DataFrame(columns), records.lists, "records")  # one consistent ranking of each user
    share = np.mean([target in lists[user] for user, own in enumerate(positives) for target in own])
    assert share_listed(stage, top) == pytest.approx(share)
    assert (records.protocol, records.candidates, records.ignored) == (ranking.protocol, "0123", 0)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_written_lists_are_the_best_unmasked_items(tmp_path, k):
    _, first, _, positives, masked, ranking = world(3)
    write_stage(ranking, first, k, system="first", ranks=tmp_path / "r.parquet", lists=tmp_path / "t.parquet")
    top = TopK.read(tmp_path / "t.parquet")
    assert (top.protocol, top.system, top.candidates) == (ranking.protocol, "first", "0123")
    expected = []
    for user, own in enumerate(positives):
        best = sorted(set(range(12)) - set(masked[user]), key=lambda item: (-first[user, item], item))[:k]
        expected += [(f"u{user}", f"i{t}", f"i{item}", first[user, item]) for t in own for item in best]
    assert top.frame.rows() == expected
    assert top.reranked_protocol == f"{ranking.protocol}/top{top.k}-first"
    stage = rank_catalog(ranking, first, system="first")
    saved = RankRecords.load(tmp_path / "r.parquet")
    assert np.array_equal(saved.above, stage.above) and np.array_equal(saved.tied, stage.tied)


def test_reranking_by_the_first_stage_itself_changes_nothing_without_ties(tmp_path):
    rng, _, _, positives, masked, ranking = world(5)
    first = rng.permutation(60).reshape(5, 12).astype(np.float32)
    lists = some_lists(rng, first, positives, masked, 4)
    top = top_of(tmp_path / "t.parquet", rows_of(lists, positives, first), ranking)
    stage = rank_catalog(ranking, first, system="first")
    again = rerank(stage, top, rows_of(lists, positives, first), system="both")
    assert np.array_equal(again.above, stage.above) and np.array_equal(again.tied, stage.tied)


@pytest.fixture
def stages(tmp_path):
    rng, first, second, positives, masked, ranking = world(1, levels=40)
    lists = some_lists(rng, first, positives, masked, 4)
    frame = rows_of(lists, positives, first)
    top = top_of(tmp_path / "t.parquet", frame, ranking)
    return rank_catalog(ranking, first, system="first"), top, rows_of(lists, positives, second), ranking


def test_the_order_of_rows_and_rows_of_others_do_not_matter(stages, tmp_path):
    stage, top, scores, ranking = stages
    expected = rerank(stage, top, scores, system="both")
    strangers = pl.DataFrame(
        {"user": ["u0", "x"], "target": ["i0"] * 2, "item": ["nowhere"] * 2, "score": [9.0, 9.0]}
    )
    shuffled = pl.concat([scores, strangers]).sample(fraction=1, shuffle=True, seed=0)
    ranked = top.frame.with_columns(rank=pl.int_range(pl.len()).over("user", "target")).sample(
        fraction=1, shuffle=True, seed=1
    )
    other = top_of(tmp_path / "shuffled.parquet", ranked, ranking)
    for rows in (shuffled, shuffled.drop("target").unique(["user", "item"])):
        got = rerank(stage, other, rows, system="both")
        assert np.array_equal(got.above, expected.above) and np.array_equal(got.tied, expected.tied)
        assert got.ignored == 2


def test_what_does_not_belong_together_is_refused(stages):
    stage, top, scores, _ = stages
    for changed, message in (
        (replace(stage, protocol="loo/full/mask-seen"), "is of the protocol"),
        (replace(stage, system="other"), "holds the lists of 'first'"),
        (replace(stage, candidates="9999"), "another set of candidate lists than"),
        (replace(stage, lists="target"), "several lists for one user"),
        (replace(stage, user=stage.user.str.replace("u0", "u9")), "no list for user 'u9'"),
        (replace(stage, above=np.zeros_like(stage.above), tied=np.ones_like(stage.tied)), "contradicts"),
        (replace(stage, above=stage.above + 4, n=stage.n + 4), "contradicts"),
    ):
        with pytest.raises(DataError, match=message):
            rerank(changed, top, scores, system="both")
    fewer = replace(
        stage, **{name: getattr(stage, name)[:-1] for name in ("user", "item", "above", "tied", "n")}
    )
    with pytest.raises(DataError, match="not among the first stage's rank records"):
        rerank(fewer, top, scores, system="both")
    for rows, message in (
        (scores.filter(pl.col("item") != scores["item"][0]), "listed items have no score"),
        (pl.concat([scores, scores[:1]]), "more than one score"),
        (scores.with_columns(score=pl.lit(float("nan"))), "expected finite numbers"),
        (scores.drop("score"), "no numeric column 'score'"),
    ):
        with pytest.raises(DataError, match=message):
            rerank(stage, top, rows, system="both")


def test_a_broken_file_of_lists_is_refused(stages, tmp_path):
    _, top, _, ranking = stages
    path = tmp_path / "broken.parquet"
    frame = top.frame
    several = frame.group_by("user").agg(pl.col("target").n_unique()).filter(pl.col("target") > 1)["user"][0]
    one = frame.filter(pl.col("user") == several)["target"][0]
    of_one = (pl.col("user") == several) & (pl.col("target") == one)
    lowest = frame.filter(of_one)["item"][-1]
    shorter = frame.filter(~(of_one & (pl.col("item") == lowest)))
    for broken, message in (
        (frame.drop("item"), "no column 'item'"),
        (frame.drop("score"), "no numeric column 'score'"),
        (frame.with_columns(score=pl.lit(float("inf"))), "is not finite"),
        (pl.concat([frame, frame[:1]]), "stands twice"),
        (frame.reverse(), "rank by falling score"),
        (frame.with_columns(rank=pl.lit("1")), "must hold integers"),
        (frame[:0], "has no rows"),
        (shorter, "different lists for several targets"),
    ):
        with pytest.raises(DataError, match=message):
            top_of(path, broken, ranking)
    frame.write_parquet(path, metadata={"recllm.protocol": "loo/1+20-uniform-seed42"})
    with pytest.raises(DataError, match="expected that of a full ranking"):
        TopK.read(path)
    frame.write_parquet(path, metadata={"recllm.protocol": ranking.protocol})
    assert TopK.read(path).system == "broken"
