"""Splits: every method against its definition, ties in input order, nothing lost."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from recllm.data import Dataset, write_dataset
from recllm.data.importing import import_dataset
from recllm.data.ordering import group_by_user_in_time
from recllm.data.readers import PreSplit
from recllm.data.splits import PARTS, Split, SplitOptions, make_split
from recllm.errors import DataError
from tests.conftest import make_dataset

METHODS = ("loo", "ratio", "random", "users", "temporal", "cold-items")


def split(dataset: Dataset, method: str, **options) -> Split:
    return make_split(dataset, SplitOptions(dataset.folder, method, overwrite=True, **options))


def in_order(dataset: Dataset) -> dict[str, list[int]]:
    """Each user's rows by (time, row), the slow way."""
    rows: dict[str, list[tuple]] = {}
    for row, (user, time) in enumerate(dataset.interactions.select("user", "timestamp").rows()):
        rows.setdefault(user, []).append((time if time is not None else -1, row))
    return {user: [row for _, row in sorted(entries)] for user, entries in rows.items()}


@examples(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=50),
    st.booleans(),
)
def test_grouping_equals_a_stable_sort(rows, timed):
    users, times = (np.array(column) for column in zip(*rows, strict=True))
    order, offsets = group_by_user_in_time(users, times if timed else None, 5)
    keys = [(user, time if timed else 0, row) for row, (user, time) in enumerate(rows)]
    assert order.tolist() == [row for *_, row in sorted(keys)]
    assert offsets.tolist() == [sum(user < code for user in users) for code in range(6)]


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_disjoint_and_lose_nothing(small_dataset, method):
    made = split(small_dataset, method)
    rows = np.concatenate([made.rows(part) for part in PARTS])
    assert len(rows) == len(np.unique(rows)) == 900
    for part in PARTS:
        kept = made.scan(part).collect()
        source = small_dataset.interactions[kept["row"].to_list()]
        assert kept.select("user", "item", "timestamp", "rating").equals(
            source.select("user", "item", "timestamp", "rating")
        )
        assert kept["row"].is_sorted()


@pytest.mark.parametrize("method", ["ratio", "random", "users", "cold-items"])
def test_random_splits_depend_on_the_seed_alone(small_dataset, method):
    first = split(small_dataset, method, seed=1).rows("test")
    again = split(small_dataset, method, seed=1).rows("test")
    other = split(small_dataset, method, seed=2).rows("test")
    assert first.tolist() == again.tolist() != other.tolist()
    assert split(small_dataset, method, seed=7).protocol.endswith("-seed7")


def test_leave_one_out_takes_the_last_two_with_ties_in_input_order(small_dataset):
    made = split(small_dataset, "loo")
    orders = in_order(small_dataset)
    assert made.protocol == "loo"
    assert sorted(made.rows("test")) == sorted(rows[-1] for rows in orders.values())
    assert sorted(made.rows("valid")) == sorted(rows[-2] for rows in orders.values())


def test_leave_one_out_without_times_takes_input_order(tmp_path):
    dataset = make_dataset(tmp_path / "d", timed=False)
    made = split(dataset, "loo")
    assert sorted(made.rows("test")) == sorted(rows[-1] for rows in in_order(dataset).values())
    assert "input order stands for time order" in made.manifest["warnings"][0]


def test_leave_one_out_warns_of_training_data_from_the_future(tmp_path, capsys):
    log = pl.DataFrame({"user": list("aaabbb"), "item": list("123123"), "timestamp": [1, 2, 3, 11, 12, 13]})
    dataset = write_log(tmp_path / "leaky", log)
    warning = split(dataset, "loo").manifest["warnings"][0]
    assert warning.startswith(
        "50.0% of the test targets are older than some training interaction of another user"
    )
    safe = write_log(tmp_path / "safe", log.with_columns(timestamp=pl.Series([1, 20, 30, 2, 21, 31])))
    assert split(safe, "loo").manifest["warnings"] == []


def test_short_histories_and_untimed_rows_stay_in_training(tmp_path):
    log = pl.DataFrame(
        {
            "user": ["short", "short", "u", "u", "u", "n", "n", "n"],
            "item": ["1", "2", "1", "2", "3", "1", "2", "3"],
            "timestamp": [1, 2, None, 2, 1, None, None, 5],
        }
    )
    made = split(write_log(tmp_path / "d", log), "loo")
    assert made.rows("test").tolist() == [3] and made.rows("valid").tolist() == [4]
    assert made.manifest["facts"]["users_without_targets"] == 2


@settings(deadline=None)
@examples(st.integers(3, 60))
def test_per_user_ratio_has_the_sizes_of_mmrec_files(length):
    train, valid, test = mmrec_sizes(length)
    assert train + valid + test == length and min(train, valid, test) >= 1


def mmrec_sizes(length: int) -> tuple[int, int, int]:
    """Sizes as the Baby files have them that MMRec uses."""
    test = max(1, length // 10)
    train = min(-(-length * 8 // 10), length - 1 - test)
    return train, length - train - test, test


@pytest.mark.parametrize("order", ["random", "time"])
def test_per_user_ratio_splits_each_user(small_dataset, order):
    made = split(small_dataset, "ratio", order=order)
    sizes = [Counter(made.scan(part).collect()["user"]) for part in PARTS]
    for user, rows in in_order(small_dataset).items():
        assert tuple(size[user] for size in sizes) == mmrec_sizes(len(rows))
    if order == "time":
        last = [
            row for rows in in_order(small_dataset).values() for row in rows[-mmrec_sizes(len(rows))[2] :]
        ]
        assert sorted(last) == made.rows("test").tolist()


def test_per_user_ratio_gives_the_sizes_of_the_baby_files(tmp_path, shared_data):
    dataset, _ = import_dataset(PreSplit(shared_data("amazon-baby-interactions"), tmp_path / "baby"))
    published = split(dataset, "given")
    ours = split(dataset, "ratio")
    assert published.protocol == "given" and ours.protocol == "ratio-8:1:1-seed42"
    for part in PARTS:
        sizes = [Counter(made.scan(part).collect()["user"]) for made in (published, ours)]
        assert sizes[0] == sizes[1]
    assert [len(published.rows(part)) for part in PARTS] == [118_551, 21_682, 20_559]


def test_random_samples_have_the_shares(small_dataset):
    made = split(small_dataset, "random")
    assert [len(made.rows(part)) for part in PARTS] == [720, 90, 90]
    made = split(small_dataset, "random", ratios=(6, 2, 2))
    assert made.protocol == "random-3:1:1-seed42" and len(made.rows("test")) == 180


def test_by_user_holds_out_users_with_their_last_interaction_as_target(small_dataset):
    made = split(small_dataset, "users")
    users = {part: set(made.scan(part).collect()["user"]) for part in PARTS}
    assert [len(users[part]) for part in PARTS] == [48, 6, 6]
    assert not users["train"] & users["test"] and not users["valid"] & users["test"]
    targets = made.rows("test", targets=True)
    orders = in_order(small_dataset)
    assert sorted(targets) == sorted(orders[user][-1] for user in users["test"])
    history = made.history_rows("test")
    assert set(orders[next(iter(users["test"]))][:-1]) <= set(history)
    assert not set(history) & set(targets)
    assert not set(made.history_rows("valid")) & (
        set(made.rows("test")) | set(made.rows("valid", targets=True))
    )


def test_cold_items_are_in_no_training_row_and_in_one_part_alone(small_dataset):
    made = split(small_dataset, "cold-items", ratios=(6, 2, 2))
    items = {part: set(made.scan(part).collect()["item"]) for part in PARTS}
    assert not items["train"] & items["valid"] and not (items["train"] | items["valid"]) & items["test"]
    assert [made.manifest["facts"][f"{part}_items"] for part in PARTS] == [24, 8, 8]
    assert made.protocol == "cold-items-3:1:1-seed42"
    assert all(made.scan(part).collect()["target"].all() for part in PARTS)
    with pytest.raises(DataError, match="those of cold-items all are"):
        split(small_dataset, "cold-items", drop_cold=True)


def test_a_cold_item_without_a_time_does_not_get_into_training(tmp_path):
    log = pl.DataFrame({"user": ["u", "v"] * 20, "item": [f"i{n // 2}" for n in range(40)]})
    log = log.with_columns(timestamp=pl.when(pl.int_range(40) % 2 == 0).then(pl.int_range(40) + 5))
    made = split(write_log(tmp_path / "d", log), "cold-items", ratios=(2, 1, 1))
    assert not set(made.scan("train").collect()["item"]) & set(made.scan("test").collect()["item"])
    assert made.manifest["counts"]["unused"] > 0


def test_temporal_split_has_one_border_for_all_users(small_dataset):
    made = split(small_dataset, "temporal")
    times = {part: made.scan(part).collect()["timestamp"] for part in PARTS}
    assert times["train"].max() < times["valid"].min() <= times["valid"].max() < times["test"].min()
    assert abs(len(times["test"]) / 900 - 0.1) < 0.05


def test_temporal_split_needs_times(tmp_path):
    with pytest.raises(DataError, match="has no timestamps"):
        split(make_dataset(tmp_path / "d", timed=False), "temporal")


def test_drop_cold_leaves_targets_that_training_knows(tmp_path):
    log = pl.DataFrame({"user": list("aabbaabc"), "item": list("12121329"), "timestamp": range(8)})
    dataset = write_log(tmp_path / "d", log)
    warm = split(dataset, "temporal", ratios=(4, 2, 2), drop_cold=True)
    assert warm.protocol == "temporal-2:1:1-warm" and warm.manifest["facts"]["cold_targets_left_out"] >= 1
    known = warm.scan("train").collect()
    held_out = pl.concat([warm.scan(part).filter(pl.col("target")).collect() for part in ("valid", "test")])
    assert (
        held_out["user"].is_in(known["user"].implode()).all()
        and held_out["item"].is_in(known["item"].implode()).all()
    )


def test_a_cold_target_is_no_target_and_is_known_afterwards(tmp_path):
    histories = {
        "d": ["p", "q", "cold", "r"],
        "a": ["r", "p", "q"],
        "b": ["q", "r", "p"],
        "c": ["p", "q", "r"],
    }
    rows = [(user, item) for user, items in histories.items() for item in items]
    dataset = write_log(tmp_path / "d", pl.DataFrame(rows, schema=["user", "item"], orient="row"))
    warm = split(dataset, "loo", drop_cold=True)
    assert warm.manifest["facts"]["cold_targets_left_out"] == 1
    assert warm.manifest["counts"]["valid_targets"] == 3 and warm.manifest["counts"]["test_targets"] == 4
    assert 2 not in warm.rows("valid", targets=True) and 2 not in warm.history_rows("valid")
    assert 2 in warm.history_rows("test")


def test_facts_and_warnings_are_of_the_targets_that_are_left(tmp_path):
    log = pl.DataFrame(
        {
            "user": list("aaabbbccceee"),
            "item": list("12x213321132"),
            "timestamp": [1, 2, 3, 11, 40, 41, 12, 42, 43, 13, 44, 45],
        }
    )
    plain = split(write_log(tmp_path / "d", log), "loo")
    warm = split(plain.dataset, "loo", drop_cold=True)
    assert plain.manifest["warnings"][0].startswith("25.0% of the test targets")
    assert warm.manifest["warnings"] == [] and warm.manifest["facts"]["cold_targets_left_out"] == 1


def test_given_parts_never_make_an_untimed_row_a_target(tmp_path):
    rows = [("u", "a", 1, "train"), ("u", "b", 2, "train"), ("u", "c", None, "valid"), ("u", "d", 3, "valid")]
    rows += [("u", "e", 4, "test"), ("u", "f", None, "test")]
    log = pl.DataFrame(rows, schema=["user", "item", "timestamp", "part"], orient="row")
    made = split(write_log(tmp_path / "d", log), "given")
    assert made.rows("valid").tolist() == [3] and made.rows("test").tolist() == [4]


def test_a_split_opens_by_any_path_to_it(small_dataset, monkeypatch):
    folder = split(small_dataset, "loo").folder
    monkeypatch.chdir(folder)
    for path in (".", "../loo", folder / ".." / "loo"):
        assert Split.open(path).protocol == "loo"


def test_a_split_of_another_state_of_the_dataset_is_refused(tmp_path):
    made = split(make_dataset(tmp_path / "d"), "loo")
    other = make_dataset(tmp_path / "other", seed=1)
    (tmp_path / "other" / "splits").mkdir()
    made.folder.rename(tmp_path / "other" / "splits" / "loo")
    with pytest.raises(DataError, match="made from another state"):
        Split.open(tmp_path / "other" / "splits" / "loo")
    assert other.folder.exists()


def test_a_damaged_split_is_refused(small_dataset):
    made = split(small_dataset, "loo")
    (made.folder / "test.parquet").write_bytes((made.folder / "train.parquet").read_bytes())
    with pytest.raises(DataError, match=r"test.parquet is missing or not the file"):
        Split.open(made.folder)


def test_the_manifest_states_protocol_seed_and_origin(small_dataset):
    made = split(small_dataset, "users", seed=3)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["protocol"] == "users-8:1:1-seed3" and made.folder.name == "users-8-1-1-seed3"
    assert manifest["settings"]["seed"] == 3 and manifest["data_hash"] == small_dataset.data_hash
    assert Split.open(made.folder).split_hash == made.split_hash


def test_equal_shares_have_one_name(small_dataset):
    assert split(small_dataset, "random", ratios=(0.8, 0.1, 0.1)).protocol == "random-8:1:1-seed42"
    for ratios in ((5, 3, 2), (0.5, 0.3, 0.2), (50, 30, 20)):
        assert split(small_dataset, "random", ratios=ratios).protocol == "random-5:3:2-seed42"


def test_methods_that_need_an_order_say_what_stands_for_it(tmp_path):
    dataset = make_dataset(tmp_path / "d", timed=False)
    for method, options in (("loo", {}), ("users", {}), ("ratio", {"order": "time"})):
        assert (
            "input order stands for time order" in split(dataset, method, **options).manifest["warnings"][0]
        )


def test_too_little_data_says_why(tmp_path):
    log = pl.DataFrame({"user": list("aabb"), "item": list("1212")})
    with pytest.raises(
        DataError, match=r"valid part of loo has no targets \(2 users, .*users without targets: 2"
    ):
        split(write_log(tmp_path / "d", log), "loo")


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", ""])
def test_a_split_stays_in_its_folder(small_dataset, name):
    if name:
        with pytest.raises(DataError, match="expected a plain folder name"):
            split(small_dataset, "loo", name=name)
    else:
        assert split(small_dataset, "loo", name=name).folder.name == "loo"


def test_a_negative_seed_is_refused(small_dataset):
    with pytest.raises(DataError, match="--seed -1"):
        split(small_dataset, "random", seed=-1)


@pytest.mark.parametrize("ratios", [(0, 1, 1), (8, -1, 1), (1, 0, 0), (float("nan"), 1, 1)])
def test_impossible_ratios_are_refused(small_dataset, ratios):
    with pytest.raises(DataError):
        split(small_dataset, "random", ratios=ratios)


def write_log(out, log: pl.DataFrame) -> Dataset:
    items, users = log.select("item").unique().sort("item"), log.select("user").unique().sort("user")
    return write_dataset(out, items=items, interactions=log, users=users, source={})
