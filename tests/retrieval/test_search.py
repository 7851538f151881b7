"""Exact search: equal to sorting all scores, whatever the blocks, from memory or from a file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data.candidates import full_ranking
from recllm.data.splits import SplitOptions, make_split
from recllm.errors import DataError
from recllm.retrieval.profiles import MeanProfiles
from recllm.retrieval.search import search


def brute_force(vectors, queries, k, hidden, cosine):
    vectors, found = vectors.astype(float), []
    for query, out in zip(queries.astype(float), hidden, strict=True):
        scores = []
        for item, vector in enumerate(vectors):
            length = np.linalg.norm(vector)
            if length and item not in out:
                scores.append((-float(query @ vector) / (length if cosine else 1), item))
        found.append([item for _, item in sorted(scores)[:k]])
    return found


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.booleans(), st.sampled_from([1, 7, 40, 2**20]))
def test_lists_equal_brute_force_in_blocks_of_any_size(seed, k, cosine, held):
    """Whole numbers, so that many scores tie and none is rounded; lengths are powers of two."""
    rng = np.random.default_rng(seed)
    vectors = np.zeros((23, 4), np.float32)
    vectors[np.arange(23), rng.integers(0, 4, 23)] = 2.0 ** rng.integers(-2, 3, 23) * rng.choice([-1, 1], 23)
    vectors[rng.integers(0, 23, 3)] = 0
    queries = rng.integers(-3, 4, (6, 4)).astype(np.float32)
    hidden = [rng.permutation(23)[: rng.integers(0, 20)] for _ in range(6)]
    excluded = np.cumsum([0, *map(len, hidden)]), np.concatenate(hidden)
    items, scores = search(vectors, queries, k, excluded=excluded, cosine=cosine, held=held)
    for row, expected in enumerate(brute_force(vectors, queries, k, hidden, cosine)):
        assert items[row].tolist() == expected + [-1] * (k - len(expected))
        assert np.array_equal(np.isnan(scores[row]), items[row] < 0)
        for item, score in zip(expected, scores[row], strict=False):
            length = np.linalg.norm(vectors[item]) if cosine else 1
            assert score == queries[row] @ vectors[item] / length


def test_a_file_gives_what_memory_gives_and_float16_is_read(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(500, 16)), rng.normal(size=(40, 16)).astype(np.float32)
    np.save(tmp_path / "items.npy", vectors.astype(np.float16))
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    items, scores = search(mapped, queries, 12, held=300)
    again, same = search(np.asarray(mapped, dtype=np.float32), queries, 12)
    assert np.array_equal(items, again) and np.allclose(scores, same, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all() and np.abs(scores).max() <= np.linalg.norm(
        queries, axis=1
    ).max()


def test_what_does_not_fit_is_named():
    vectors, queries = np.ones((5, 3), np.float32), np.ones((2, 3), np.float32)
    broken = vectors.copy()
    broken[3, 1] = np.nan
    for arguments, message in (
        ((vectors, queries, 0), "k is 0"),
        ((vectors, queries[:, :2], 1), r"expected \[n, 3\]"),
        ((vectors, queries * np.inf, 1), "query 0 has a number that is not finite"),
        ((broken, queries, 1), "item code 3 has a number that is not finite"),
    ):
        with pytest.raises(DataError, match=message):
            search(*arguments)
    for excluded, message in (
        ((np.array([0, 1]), np.array([1])), "one more than 2 queries"),
        ((np.array([0, 1, 1]), np.array([5])), "item codes go from 0 to 4"),
    ):
        with pytest.raises(DataError, match=message):
            search(vectors, queries, 1, excluded=excluded)


def test_profiles_and_lists_from_a_file_of_vectors_read_the_rows_they_need(tmp_path, small_dataset):
    """What a user with a large catalog does: blocks of users, vectors that stay on disk."""
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, "loo"))
    values = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    np.save(tmp_path / "items.npy", values)
    mapped, present = np.load(tmp_path / "items.npy", mmap_mode="r"), np.ones(40, bool)
    model, eager = (MeanProfiles(split, "test", each, present, history=10) for each in (mapped, values))
    ranking = full_ranking(split, "test")
    scores = eager.of_users(ranking.users) @ eager.item_vectors.T
    for start in range(0, len(ranking.users), 16):
        users = ranking.users[start : start + 16]
        offsets = ranking.masked_offsets[start : start + len(users) + 1]
        excluded = offsets - offsets[0], ranking.masked[offsets[0] : offsets[-1]]
        items, _ = search(mapped, model.of_users(users), 5, excluded=excluded)
        for row in range(len(users)):
            hidden = excluded[1][excluded[0][row] : excluded[0][row + 1]]
            open_to = np.setdiff1d(np.arange(40), hidden)
            expected = open_to[np.argsort(-scores[start + row, open_to], kind="stable")[:5]]
            assert items[row].tolist() == expected.tolist()
    assert "item_vectors" not in vars(model)  # nothing has asked for the whole catalog
