"""Filters keep exactly what they say; the k-core equals the definition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.data import Dataset, write_dataset
from recllm.data.filtering import FilterOptions, filter_dataset, k_core
from recllm.data.importing import import_dataset
from recllm.data.readers import MovieLens
from recllm.errors import DataError


def brute_force_core(pairs: list[tuple[int, int]], user_core: int, item_core: int) -> set[int]:
    kept = set(range(len(pairs)))
    while True:
        users = Counter(pairs[row][0] for row in kept)
        items = Counter(pairs[row][1] for row in kept)
        weak = {row for row in kept if users[pairs[row][0]] < user_core or items[pairs[row][1]] < item_core}
        if not weak:
            return kept
        kept.remove(min(weak))  # one at a time: the core does not depend on the order


@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40),
    user_core=st.integers(0, 4),
    item_core=st.integers(0, 4),
)
def test_k_core_equals_removing_weak_interactions_one_by_one(pairs, user_core, item_core):
    users, items = (np.array(column) for column in zip(*pairs, strict=True))
    core = k_core(users, items, user_core, item_core)
    assert set(np.flatnonzero(core)) == brute_force_core(pairs, user_core, item_core)


def test_movielens_with_posters_has_the_published_five_core(tmp_path, shared_data):
    dataset, _ = import_dataset(MovieLens(shared_data("ml-latest-small-posters"), tmp_path / "ml"))
    counts = dataset.manifest["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (610, 9742, 100_836)
    assert (counts["images"], counts["items_with_text"]) == (3605, 7089)
    core = filter_dataset(
        dataset, FilterOptions(tmp_path / "ml", tmp_path / "core", 5, 5, require_image=True)
    )
    counts = core.manifest["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (610, 3605, 89_937)
    assert len(list((tmp_path / "core" / "images").iterdir())) == 3605
    again = Dataset.open(tmp_path / "core")
    assert (again.item_codes == core.item_codes).all() and (again.user_codes == core.user_codes).all()


def test_filters_apply_in_the_documented_order_and_are_counted(tmp_path):
    def stage(folder):
        (folder / "images").mkdir()
        (folder / "images" / "a.png").write_bytes(b"png")

    items = pl.DataFrame(
        {"item": ["a", "b", "c"], "title": ["A", "", "C"], "images": [["images/a.png"], ["images/a.png"], []]}
    )
    log = pl.DataFrame(
        {"user": ["u", "u", "u", "v", "v"], "item": ["a", "b", "c", "a", "a"], "rating": [5, 5, 5, 2, None]}
    )
    users = pl.DataFrame({"user": ["u", "v"]})
    whole = write_dataset(tmp_path / "d", items=items, interactions=log, users=users, source={}, stage=stage)
    options = FilterOptions(
        tmp_path / "d", tmp_path / "f", require_image=True, require_text=True, min_rating=3
    )
    filtered = filter_dataset(whole, options)
    assert filtered.interactions.select("user", "item").rows() == [("u", "a")]
    assert filtered.items["item"].to_list() == ["a"] and filtered.users["user"].to_list() == ["u"]
    assert filtered.manifest["dropped"]["left_out"] == {
        "items without an image": {"rows": 1},
        "items with neither title nor text": {"rows": 1},
        "interactions with left-out items": {"rows": 2},
        "interactions rated below 3, or not rated": {"rows": 2},
    }
    assert filtered.manifest["source"]["data_hash"] == whole.data_hash


def test_item_core_zero_keeps_items_nobody_touched_and_one_does_not(tmp_path, small_dataset):
    few = small_dataset.interactions.head(10)
    users = few.select("user").unique().sort("user")
    sparse = write_dataset(
        tmp_path / "d", items=small_dataset.items, interactions=few, users=users, source={}
    )
    kept = filter_dataset(sparse, FilterOptions(tmp_path / "d", tmp_path / "all"))
    assert len(kept.items) == 40
    touched = filter_dataset(sparse, FilterOptions(tmp_path / "d", tmp_path / "touched", item_core=1))
    assert set(touched.items["item"]) == set(few["item"])


def test_nothing_left_is_an_error_that_says_what_went(tmp_path, small_dataset):
    with pytest.raises(DataError, match=r"no interaction is left.*900 interactions outside the k-core"):
        filter_dataset(small_dataset, FilterOptions(small_dataset.folder, tmp_path / "f", user_core=100))
    assert not (tmp_path / "f").exists()


def test_a_rating_threshold_needs_ratings(tmp_path):
    log = pl.DataFrame({"user": ["u"], "item": ["a"]})
    dataset = write_dataset(
        tmp_path / "d", items=log.select("item"), interactions=log, users=log.select("user"), source={}
    )
    with pytest.raises(DataError, match="has no ratings"):
        filter_dataset(dataset, FilterOptions(tmp_path / "d", tmp_path / "f", min_rating=4))
