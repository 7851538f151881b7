"""A split with --like: targets and positives are likes alone, in whatever is made from it."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from recllm.cli import main
from recllm.data import write_dataset
from recllm.data.candidates import CandidateOptions, full_ranking, make_candidates
from recllm.data.sequences import open_sequences
from recllm.data.splits import PARTS, Split, SplitOptions, make_split
from recllm.errors import DataError
from recllm.rankers import Popularity
from recllm.report.protocols import explain
from tests.conftest import make_dataset

METHODS = ("loo", "ratio", "ratio-time", "random", "users", "temporal", "cold-items", "given")


def rated_split(tmp_path, method: str, like: float = 4.0, **options):
    dataset = make_dataset(tmp_path / "plain")
    parts = np.random.default_rng(0).choice(list(PARTS), len(dataset.interactions), p=[0.6, 0.2, 0.2])
    log = dataset.interactions.with_columns(part=pl.Series(parts))
    dataset = write_dataset(
        tmp_path / "d", items=dataset.items, interactions=log, users=dataset.users, source={}
    )
    if method == "ratio-time":
        method, options = "ratio", {**options, "order": "time"}
    return make_split(dataset, SplitOptions(dataset.folder, method, like=like, **options))


@pytest.mark.parametrize("method", METHODS)
def test_no_target_and_no_training_positive_is_below_the_threshold(tmp_path, method):
    split = rated_split(tmp_path, method)
    dataset = split.dataset
    assert split.protocol.endswith("-like4") and Split.open(split.folder).like == 4
    ratings = dataset.interactions["rating"].to_numpy()
    liked = set(np.flatnonzero(ratings >= 4).tolist())
    parts = [set(split.rows(part).tolist()) for part in PARTS]
    beside = [set(split.rows(part, disliked=True).tolist()) for part in PARTS]
    assert set.union(*parts) == liked and sum(map(len, parts)) == len(liked)
    assert set.union(*beside) == set(range(len(ratings))) - liked
    assert sum(map(len, beside)) == len(ratings) - len(liked) and beside[0] and beside[2]
    pairs = {
        (user, item)
        for user, item, rating in dataset.interactions.select("user", "item", "rating").iter_rows()
        if rating >= 4
    }
    candidates = CandidateOptions(split.folder, negatives=3)
    make_candidates(split, candidates)
    for part in ("valid", "test"):
        lists = pl.read_parquet(split.folder / "candidates" / candidates.name / f"{part}.parquet")
        assert set(lists.filter(pl.col("label") == 1).select("user", "item").iter_rows()) <= pairs
        touched = set(dataset.interactions.select("user", "item").iter_rows())
        assert not set(lists.filter(pl.col("label") == 0).select("user", "item").iter_rows()) & touched
        ranking = full_ranking(split, part)
        users = ranking.user_ids.gather(
            np.repeat(np.arange(len(ranking.users)), np.diff(ranking.positive_offsets))
        )
        assert set(zip(users, ranking.item_ids.gather(ranking.positives), strict=True)) <= pairs
        masked = ranking.user_ids.gather(
            np.repeat(np.arange(len(ranking.users)), np.diff(ranking.masked_offsets))
        )
        masked = set(zip(masked, ranking.item_ids.gather(ranking.masked), strict=True))
        seen = dataset.interactions[split.history_rows(part, disliked=True).tolist()]
        seen = set(
            seen.filter(pl.col("user").is_in(ranking.user_ids.implode())).select("user", "item").iter_rows()
        )
        assert seen and seen <= masked  # rated low, and so no candidate
        sequences = open_sequences(split, part)
        owner = dataset.users["user"].gather(np.repeat(sequences.users, np.diff(sequences.offsets)))
        assert set(zip(owner, dataset.items["item"].gather(sequences.items - 1), strict=True)) <= pairs
    counts = np.bincount(dataset.item_codes[split.rows("train")], minlength=40)
    assert Popularity(split).scores.tolist() == counts.tolist()
    assert "Ratings of 4 and more are likes" in explain(f"{split.protocol}/full/mask-seen")


@pytest.mark.parametrize("method", ["loo", "ratio-time", "temporal", "users"])
def test_dislikes_are_split_in_time_where_the_likes_are(tmp_path, method):
    """A dislike of training precedes the user's held-out likes."""
    split = rated_split(tmp_path, method)
    users, times = split.dataset.user_codes, split.dataset.timestamps

    def place(row):
        return times[row], row

    checked = 0
    for number, part in enumerate(PARTS):
        for row in split.rows(part, disliked=True, targets=True).tolist():
            for later in PARTS[number + 1 :]:
                mine = [
                    each for each in split.rows(later, targets=True).tolist() if users[each] == users[row]
                ]
                assert all(place(row) < place(each) for each in mine)
                checked += len(mine)
    if method == "users":
        for row in split.rows("test", disliked=True, targets=False).tolist():
            (target,) = [each for each in split.rows("test", targets=True) if users[each] == users[row]]
            assert place(row) < place(target)
            checked += 1
    assert checked > 10


def test_one_dislike_more_changes_no_like(tmp_path):
    made = [rated_split(tmp_path / str(like), "loo", like) for like in (4, 3)]
    assert made[0].split_hash != made[1].split_hash and made[0].protocol != made[1].protocol
    assert len(made[0].rows("train")) < len(made[1].rows("train"))


def test_a_dataset_without_ratings_is_refused(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    bare = write_dataset(
        tmp_path / "bare",
        items=dataset.items,
        interactions=dataset.interactions.drop("rating"),
        users=dataset.users,
        source={},
    )
    with pytest.raises(DataError, match="bare has no ratings, which --like needs"):
        make_split(bare, SplitOptions(bare.folder, "loo", like=4))
    with pytest.raises(DataError, match=r"no rating is 6 or more \(--like\); the highest is 5"):
        make_split(dataset, SplitOptions(dataset.folder, "loo", like=6))
    with pytest.raises(DataError, match="expected a rating"):
        make_split(dataset, SplitOptions(dataset.folder, "loo", like=float("nan")))
    assert not (bare.folder / "splits").exists() and not (dataset.folder / "splits").exists()


def test_ratings_are_compared_as_they_are_stored_and_missing_ones_are_in_no_part(tmp_path, capsys):
    ratings = [4.1, 4.1, 4.1, None, 4.0]
    log = pl.DataFrame(
        {"user": ["u"] * 5, "item": list("abcde"), "timestamp": [1, 2, 3, 4, 5], "rating": ratings}
    )
    items, users = log.select("item"), pl.DataFrame({"user": ["u"]})
    dataset = write_dataset(tmp_path / "d", items=items, interactions=log, users=users, source={})
    main(["data", "split", str(dataset.folder), "loo", "--like", "4.1"])
    split = Split.open(dataset.folder / "splits" / "loo-like4.1")
    assert [split.rows(part).tolist() for part in PARTS] == [[0], [1], [2]]
    assert split.rows("test", disliked=True).tolist() == [4]
    assert split.manifest["counts"]["unused"] == 1
    assert split.manifest["facts"]["interactions_without_rating"] == 1
    assert "1 interactions have no rating" in capsys.readouterr().out
