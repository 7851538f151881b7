"""What a split promises of users and items, and what it says of what it cannot avoid."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.cli import main
from recllm.data import Dataset, write_dataset
from recllm.data.coverage import covering_parts
from recllm.data.splits import SplitOptions, make_split
from recllm.errors import DataError
from recllm.report.protocols import explain
from tests.conftest import make_dataset


def write_log(out, log: pl.DataFrame) -> Dataset:
    items, users = log.select("item").unique().sort("item"), log.select("user").unique().sort("user")
    return write_dataset(out, items=items, interactions=log, users=users, source={})


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.booleans()), min_size=1, max_size=80),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_covering_parts_leave_training_whole_and_keep_their_sizes(rows, valid_size, test_size):
    users, items, timed = (np.array(column) for column in zip(*rows, strict=True))
    valid, test = covering_parts(
        users, items, 9, 9, timed, (valid_size, test_size), np.random.default_rng(len(rows))
    )
    held_out = np.concatenate([valid, test])
    assert len(set(held_out.tolist())) == len(held_out) and timed[held_out].all()
    train = np.setdiff1d(np.arange(len(rows)), held_out)
    assert set(users[train]) == set(users) and set(items[train]) == set(items)
    assert len(valid) <= valid_size and len(test) <= test_size
    if len(test) < test_size:
        assert len(valid) == 0  # nothing that training could spare is left


def test_every_user_and_item_of_five_interactions_stands_in_training_and_in_test(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    plain = make_split(dataset, SplitOptions(dataset.folder, "random", ratios=(7, 1, 2)))
    made = make_split(dataset, SplitOptions(dataset.folder, "random", ratios=(7, 1, 2), cover=True))
    assert made.protocol == "random-7:1:2-cover-seed42" != plain.protocol
    assert made.manifest["settings"]["cover"] is True
    for part in ("train", "valid", "test"):
        assert len(made.rows(part)) == len(plain.rows(part))
    for part in ("train", "test"):
        rows = made.rows(part)
        assert (
            len(np.unique(dataset.user_codes[rows])) == 60 and len(np.unique(dataset.item_codes[rows])) == 40
        )
    assert made.manifest["facts"]["users_without_test_target"] == 0
    assert made.manifest["facts"]["items_without_test_target"] == 0
    other = make_split(dataset, SplitOptions(dataset.folder, "random", ratios=(7, 1, 2), cover=True, seed=1))
    assert other.rows("test").tolist() != made.rows("test").tolist()
    assert "as far as that can be" in explain(f"{made.protocol}/full/mask-seen")
    with pytest.raises(DataError, match="--cover is for the random split"):
        make_split(dataset, SplitOptions(dataset.folder, "loo", cover=True))


def test_what_has_one_interaction_stays_in_training_and_is_counted(tmp_path):
    rows = [(f"u{user}", f"i{item}", 10 * user + item) for user in range(6) for item in range(6)]
    rows += [("u0", "once", 99), ("hapax", "i0", 98)]
    log = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    dataset = write_log(tmp_path / "d", log)
    made = make_split(dataset, SplitOptions(dataset.folder, "random", ratios=(6, 2, 3), cover=True))
    train = made.scan("train").collect()
    assert "once" in train["item"] and "hapax" in train["user"]
    facts = made.manifest["facts"]
    assert facts["users_without_test_target"] == 1 and facts["items_without_test_target"] == 1
    assert facts["users_without_training_row"] == facts["items_without_training_row"] == 0


def test_movielens_is_covered(shared_data, tmp_path, capsys):
    raw = shared_data("ml-latest-small-posters")
    main(["data", "import", "movielens", str(raw), str(tmp_path / "ml")])
    main(
        [
            "data",
            "filter",
            str(tmp_path / "ml"),
            str(tmp_path / "ml5"),
            "--user-core",
            "5",
            "--item-core",
            "5",
        ]
    )
    main(["data", "split", str(tmp_path / "ml5"), "random", "--cover"])
    main(["data", "split", str(tmp_path / "ml5"), "loo"])
    said = capsys.readouterr().out
    assert "users have no test target" not in said and "items are no test target" not in said
    assert "91 test targets share their second with another interaction of their user" in said


def test_what_cannot_be_avoided_is_printed_and_kept(tmp_path, capsys):
    rows = [("a", "1", 1), ("a", "2", 2), ("a", "3", 3), ("a", "4", 3)]
    rows += [("b", "1", 1), ("b", "2", None), ("b", "5", 4), ("b", "6", 5), ("c", "1", 9)]
    dataset = write_log(
        tmp_path / "d", pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    )
    main(["data", "split", str(dataset.folder), "loo"])
    said = capsys.readouterr().out
    assert "1 test targets share their second" in said and "1 validation targets share theirs" in said
    assert "4 items have no training interaction" in said and "1 users have no test target" in said
    assert "1 training interactions have no time" in said
    assert "follow a held-out target" not in said
    main(["data", "split", str(dataset.folder), "ratio", "--seed", "3"])
    assert "training interactions follow a held-out target of their user" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "in_time"), [("loo", True), ("users", True), ("temporal", True), ("random", False)]
)
def test_a_split_says_whether_it_is_in_time(tmp_path, method, in_time):
    dataset = make_dataset(tmp_path / "d")
    split = make_split(dataset, SplitOptions(dataset.folder, method))
    assert split.in_time == in_time
    late = 0
    times = dataset.timestamps
    for row in split.rows("train"):
        mine = [
            target
            for part in ("valid", "test")
            for target in split.rows(part, targets=True)
            if dataset.user_codes[target] == dataset.user_codes[row]
        ]
        late += any((times[target], target) < (times[row], row) for target in mine)
    name = "training_interactions_after_a_held_out_target_of_their_user"
    assert split.manifest["facts"][name] == late
    assert any("later than the targets" in warning for warning in split.manifest["warnings"]) != in_time
