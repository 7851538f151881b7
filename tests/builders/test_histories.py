"""Who may be told what: histories, windows and training reviews against their definitions."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.builders.histories import Histories, first_seen, training_reviews, windows
from recllm.data.splits import PARTS
from recllm.errors import DataError
from tests.builders.worlds import split_of
from tests.conftest import make_dataset


@given(st.integers(0, 60), st.integers(1, 9), st.data())
def test_windows_reach_every_interaction_and_end_with_the_last(length, window, data):
    step = data.draw(st.integers(1, window))
    cuts = windows(length, window, step)
    assert {place for begin, end in cuts for place in range(begin, end)} == set(range(length))
    assert [end for _, end in cuts] == sorted({end for _, end in cuts})
    assert all(
        begin == number * step and 0 < end - begin <= window for number, (begin, end) in enumerate(cuts)
    )
    if length:
        assert cuts[-1][1] == length
        assert all(end - begin == window for begin, end in cuts[:-1])


def test_a_longer_history_keeps_the_full_windows_that_it_had():
    for length in range(1, 30):
        full = [cut for cut in windows(length, 3, 2) if cut[1] - cut[0] == 3]
        assert windows(length + 1, 3, 2)[: len(full)] == full


@pytest.mark.parametrize(("window", "step"), [(3, 4), (3, 0), (0, 0), (2, -1)])
def test_windows_that_would_pass_over_interactions_are_refused(window, step):
    with pytest.raises(DataError, match="window"):
        windows(5, window, step)


@pytest.mark.parametrize("method", ["loo", "users", "ratio", "random", "temporal"])
@pytest.mark.parametrize("part", PARTS)
def test_histories_are_what_the_split_allows_in_order_of_time(tmp_path, method, part):
    dataset = make_dataset(tmp_path / "d")
    split = split_of(dataset, method)
    log = dataset.interactions.with_row_index("row")
    files = {name: set(split.scan(name).collect()["row"].to_list()) for name in PARTS}
    not_targets = (
        set(split.scan(part).filter(~pl.col("target")).collect()["row"].to_list())
        if part != "train"
        else set()
    )
    allowed = {"train": files["train"], "valid": files["train"] | not_targets}
    allowed["test"] = files["train"] | files["valid"] | not_targets
    histories = Histories(split, part)
    assert set(np.flatnonzero(histories.allowed).tolist()) == allowed[part]
    seen_targets = []
    for user in range(len(dataset.users)):
        name = dataset.users["user"][user]
        mine = log.filter((pl.col("user") == name) & pl.col("row").is_in(sorted(allowed[part])))
        expected = mine.sort("timestamp", maintain_order=True)
        history = histories.history(user)
        assert history.rows.tolist() == expected["row"].to_list()
        assert [dataset.items["item"][code] for code in history.items.tolist()] == expected["item"].to_list()
        for target in histories.targets(user):
            seen_targets.append(target.row)
            assert dataset.items["item"][target.item] == log["item"][target.row]
            when = log["timestamp"][target.row], target.row
            earlier = [row for row in history.rows.tolist() if (log["timestamp"][row], row) < when]
            assert history.first(target.known).rows.tolist() == earlier
            assert histories.known_before(target.row, history.rows[: target.known])
            for row in set(range(len(log))) - set(earlier):
                assert not histories.known_before(target.row, np.array([*earlier, row]))
    if part == "train":
        firsts = [
            histories.history(user).rows[0]
            for user in range(len(dataset.users))
            if len(histories.history(user).rows)
        ]
        assert sorted([*seen_targets, *firsts]) == sorted(files["train"])
    else:
        targets = split.scan(part).filter(pl.col("target")).collect()["row"].to_list()
        assert sorted(seen_targets) == sorted(targets)


def test_the_test_file_is_not_opened_for_other_parts(tmp_path, monkeypatch):
    split = split_of(make_dataset(tmp_path / "d"))
    opened = []
    scan = type(split).scan
    monkeypatch.setattr(
        type(split), "scan", lambda self, part, **kind: opened.append(part) or scan(self, part, **kind)
    )
    Histories(split, "train")
    list(training_reviews(split))
    first_seen(split)
    assert set(opened) == {"train"}
    Histories(split, "valid")
    assert "test" not in opened
    Histories(split, "test")
    assert "test" in opened


def test_training_reviews_are_all_of_them_and_no_others(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    split = split_of(dataset)
    rows = sorted(split.rows("train").tolist())
    expected: dict[str, list[str]] = {}
    for row in rows:
        expected.setdefault(dataset.interactions["item"][row], []).append(dataset.interactions["review"][row])
    found = {dataset.items["item"][code]: reviews for code, reviews in training_reviews(split)}
    assert found == expected


def test_first_seen_is_the_first_training_time(tmp_path):
    dataset = make_dataset(tmp_path / "d", interactions=120)
    split = split_of(dataset)
    train = split.scan("train").collect()
    times = dict(train.group_by("item").agg(pl.col("timestamp").min()).iter_rows())
    for code, seen in enumerate(first_seen(split).tolist()):
        assert seen == times.get(dataset.items["item"][code], np.iinfo(np.int64).max)
