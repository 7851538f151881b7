"""Explicit dislikes become "No." rows, in time; histories tell ratings or leave dislikes out."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from recllm.builders.instructions import build_instructions
from recllm.builders.items import summarize_items
from recllm.builders.options import InstructionOptions, ItemOptions, UserOptions
from recllm.builders.users import summarize_users
from recllm.data import write_dataset
from recllm.errors import DataError
from tests.builders.worlds import split_of, words_of
from tests.conftest import make_dataset


def rated_world(tmp_path, method: str, **options):
    dataset = make_dataset(tmp_path / "plain")
    catalog = dataset.items.with_columns(title=pl.col("item") + "!")
    dataset = write_dataset(
        tmp_path / "d", items=catalog, interactions=dataset.interactions, users=dataset.users, source={}
    )
    return split_of(dataset, method, **{"like": 4.0, **options})


def build(split, part: str, **options) -> tuple[pl.DataFrame, dict]:
    name = options.pop("name", f"rows-{part}")
    options = {"preference": "none", "history": 99, "history_as": "title", "targets_per_user": 0, **options}
    build_instructions(
        InstructionOptions(split.dataset.folder, split=split.folder.name, parts=(part,), name=name, **options)
    )
    folder = split.dataset.folder / "instructions" / name
    counts = json.loads((folder / "manifest.json").read_text())["counts"][part]
    return pl.read_parquet(folder / f"{part}.parquet"), counts


def answer(row) -> str:
    return row["completion"][0]["content"][0]["text"]


@pytest.mark.parametrize("tell_ratings", [False, True])
@pytest.mark.parametrize("method", ["loo", "random", "users", "temporal"])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_dislikes_become_no_rows_and_unobserved_items_fill_up(tmp_path, part, method, tell_ratings):
    split = rated_world(tmp_path, method)
    log = split.dataset.interactions
    rows, counts = build(split, part, tell_ratings=tell_ratings)
    rating = {(user, item): value for user, item, value in log.select("user", "item", "rating").iter_rows()}
    place = {
        (user, item): (time, row)
        for row, (user, item, time) in enumerate(log.select("user", "item", "timestamp").iter_rows())
    }
    asked = {
        tuple(pair)
        for pair in log[split.rows(part, disliked=True).tolist()].select("user", "item").iter_rows()
    }
    # What a user likes in a part that is not opened may be drawn: to leave it out would be to tell it.
    known = np.union1d(split.history_rows(part), split.rows(part))
    likes = set(log[known.tolist()].select("user", "item").iter_rows())
    explicit = 0
    for row in rows.iter_rows(named=True):
        pair = row["user"], row["item"]
        shown = [(log["user"][at], log["item"][at]) for at in row["shown"]]
        if row["label"]:
            assert answer(row) == "Yes." and rating[pair] >= 4
        else:
            assert answer(row) == "No." and pair not in likes
            if pair in asked:
                explicit += 1
                assert all(place[each] < place[pair] for each in shown)
        assert all(place[each] < (log["timestamp"][row["target_row"]], row["target_row"]) for each in shown)
        assert tell_ratings or all(rating[each] >= 4 for each in shown)
    assert explicit == counts.get("explicit_negatives", 0)
    if part == "train" or method == "random":
        assert explicit > 5
    assert counts["positives"] == counts["negatives"] + counts.get("negatives_missing", 0)
    dislikes = rows.filter(pl.col("label") == 0).select("user", "item")
    in_asked = dislikes.filter(pl.struct("user", "item").is_in([{"user": u, "item": i} for u, i in asked]))
    assert not in_asked.is_duplicated().any()  # each is asked about once


def test_a_dislike_goes_to_the_latest_target_whose_history_precedes_it(tmp_path):
    log = [("u", "a", 1, 5), ("u", "early", 2, 1), ("u", "b", 3, 5), ("u", "c", 4, 4), ("u", "mid", 5, 2)]
    log += [("u", "d", 6, 5), ("u", "e", 7, 5), ("u", "f", 8, 5), ("u", "late", 9, 1)]
    log += [("v", item, time, 5) for time, item in enumerate("axyzw")]
    frame = pl.DataFrame(log, schema=["user", "item", "timestamp", "rating"], orient="row")
    items = frame.select("item").unique().sort("item").with_columns(title="item")
    dataset = write_dataset(
        tmp_path / "d", items=items, interactions=frame, users=pl.DataFrame({"user": ["u", "v"]}), source={}
    )
    split = split_of(dataset, "loo", like=4.0)

    def no_of(part, **options):
        rows, _ = build(split, part, name=f"{part}{len(options)}", **options)
        mine = rows.filter((pl.col("user") == "u") & (pl.col("label") == 0))
        return list(mine.select("target", "item").iter_rows()), rows

    told, rows = no_of("train")
    assert ("b", "early") in told and ("d", "mid") in told
    assert "late" not in rows["item"] and set(item for _, item in told) - {"early", "mid"} <= set("xyz")
    assert no_of("test")[0] == [("f", "late")]
    _, rows = no_of("train", tell_ratings=True)
    (asked,) = rows.filter(
        (pl.col("user") == "u") & (pl.col("target") == "d") & (pl.col("label") == 1)
    ).to_dicts()
    words = words_of(asked["prompt"])
    assert (
        "a (rated 5)" in words
        and "early (rated 1)" in words
        and "c (rated 4)" in words
        and "mid" not in words
    )
    (asked,) = (
        no_of("test", tell_ratings=True, negatives=2)[1]
        .filter((pl.col("user") == "u") & (pl.col("label") == 1))
        .to_dicts()
    )
    assert "mid (rated 2)" in words_of(asked["prompt"]) and "late" not in words_of(asked["prompt"])


@pytest.mark.parametrize("tell_ratings", [False, True])
def test_windows_tell_what_rows_recall(tmp_path, backend, tell_ratings):
    split = rated_world(tmp_path, "random")
    folder = split.dataset.folder
    summarize_items(ItemOptions(folder, "rule"))
    backend.asked.clear()
    summarize_users(UserOptions(folder, "rule", split="random", parts=("test",), tell_ratings=tell_ratings))
    told = " ".join(words_of(request.messages) for request in backend.asked)
    assert ("(rated 1)" in told) == ("(rated 5)" in told) == tell_ratings
    rows, counts = build(split, "test", preference="tubc", form="cot", tell_ratings=tell_ratings, history=3)
    assert len(rows) and counts.get("rows_without_summary", 0) < len(rows)
    with pytest.raises(DataError, match=r"was written with(out)? --tell-ratings"):
        build(split, "test", preference="tubc", tell_ratings=not tell_ratings, name="other")
    with pytest.raises(DataError, match="--tell-ratings is for --system mllm_srec"):
        summarize_users(UserOptions(folder, "rule", split="random", system="mllmrec", tell_ratings=True))


def test_ratings_that_are_not_there_are_not_told(tmp_path):
    dataset = make_dataset(tmp_path / "plain")
    log = dataset.interactions.drop("rating")
    bare = write_dataset(
        tmp_path / "bare", items=dataset.items, interactions=log, users=dataset.users, source={}
    )
    split = split_of(bare)
    with pytest.raises(DataError, match="has no ratings, which --tell-ratings needs"):
        build(split, "train", tell_ratings=True)
    rated = rated_world(tmp_path / "rated", "loo", like=None)
    rows, counts = build(rated, "train", tell_ratings=True)
    ratings = rated.dataset.interactions["rating"].to_numpy()
    assert "explicit_negatives" not in counts or not counts["explicit_negatives"]
    for row in rows.head(50).iter_rows(named=True):
        assert words_of(row["prompt"]).count("(rated ") == len(row["shown"])
        latest = max(row["shown"], key=lambda at: (rated.dataset.timestamps[at], at))
        assert f"(rated {ratings[latest]:g})" in words_of(row["prompt"])
    assert np.isfinite(ratings).all()
