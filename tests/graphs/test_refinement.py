"""MLLMRec's refined item graph against eq. 6 to 11 by dense matrices, and without the release's defects."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from recllm.graphs.knn import Neighbors, nearest_neighbors
from recllm.graphs.propagation import symmetric_normalized
from recllm.graphs.refinement import audience_graph, refined_graph, semantic_graph


def dense_semantic(vectors: np.ndarray, present: np.ndarray, k: int, threshold: float) -> np.ndarray:
    """Eq. 6 and 7."""
    items = len(vectors)
    known = [item for item in range(items) if present[item]]
    found = np.zeros((items, items))
    for item in known:
        cosine = {
            other: vectors[item] @ vectors[other] / np.sqrt((vectors[[item, other]] ** 2).sum(1).prod())
            for other in known
        }
        nearest = sorted(known, key=lambda other, c=cosine: (other != item, -round(c[other], 5), other))[:k]
        for other in nearest:
            found[item, other] = cosine[other] >= threshold - 1e-6 or other == item
    return found


def dense_audience(interactions: np.ndarray, k: int) -> np.ndarray:
    """Eq. 8 and 9, in exact fractions."""
    items = interactions.shape[1]
    users = [set(np.flatnonzero(interactions[:, item])) for item in range(items)]
    found = np.zeros((items, items))
    for item in range(items):
        others = [other for other in range(items) if other != item and users[item] & users[other]]
        jaccard = {
            other: Fraction(len(users[item] & users[other]), len(users[item] | users[other]))
            for other in others
        }
        others.sort(key=lambda other, c=jaccard: (-c[other], -len(users[item] & users[other]), other))
        found[item, others[:k]] = [float(jaccard[other]) for other in others[:k]]
    return found


@given(
    seed=st.integers(0, 2**32 - 1),
    users=st.integers(1, 25),
    items=st.integers(1, 25),
    k=st.integers(1, 8),
    share=st.sampled_from([0.05, 0.2, 0.6, 1.0]),
    block=st.sampled_from([1, 30, 2**22]),
)
@settings(max_examples=60, deadline=None)
def test_the_graph_equals_the_dense_equations(seed, users, items, k, share, block):
    random = np.random.default_rng(seed)
    interactions = random.random((users, items)) < share
    interactions[:, random.integers(items)] = False  # an item without users
    vectors = random.standard_normal((items, 5))
    present = random.random(items) < 0.8
    threshold = float(random.uniform(-0.2, 0.9))
    audience = audience_graph(sparse.csr_array(interactions.astype(np.float32)), k, block=block)
    np.testing.assert_allclose(audience.toarray(), dense_audience(interactions, k), rtol=1e-6)
    assert audience.dtype == np.float32
    tensors = torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(present)
    found = refined_graph(nearest_neighbors(*tensors, k), threshold, audience)
    whole = dense_semantic(vectors, present, k, threshold) + dense_audience(interactions, k)
    np.testing.assert_allclose(found.toarray(), whole, rtol=1e-6)
    degrees = whole.sum(1)
    scale = np.where(degrees > 0, np.where(degrees > 0, degrees, 1) ** -0.5, 0)
    normalized = symmetric_normalized(found).toarray()
    np.testing.assert_allclose(normalized, scale[:, None] * whole * scale, rtol=1e-5, atol=1e-7)


def test_an_item_is_not_its_own_audience_and_equal_audiences_are_the_strongest_edge():
    """The release tells the diagonal by values of 1: it loses twins, and keeps loops of single users."""
    single, both = [1, 0, 0], [0, 1, 1]
    interactions = np.array([single, both, both, [0, 1, 0]]).T.astype(np.float32)  # users x items
    found = audience_graph(sparse.csr_array(interactions), 5).toarray()
    assert not found.diagonal().any()
    assert found[1, 2] == found[2, 1] == 1
    assert found[3, 1] == found[3, 2] == 0.5
    assert not found[0].any() and not found[:, 0].any()


def test_a_threshold_keeps_loops_and_cuts_what_is_below_it():
    edges = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0])
    neighbors = Neighbors(3, *edges, torch.tensor([0.9999999, 0.6, 1.0, 0.6]))
    assert semantic_graph(neighbors, 1.0).toarray().tolist() == np.diag([1, 1, 0]).tolist()
    assert semantic_graph(neighbors, 0.61).nnz == 2 and semantic_graph(neighbors, 0.6).nnz == 4
    assert semantic_graph(neighbors, 0.5).nnz == semantic_graph(neighbors, None).nnz == 4


def test_planted_false_edges_go_and_missing_ones_come():
    """Items of 4 kinds; a fifth of them look like nothing, so that kNN joins them to anybody."""
    random = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 30)
    vectors = 3 * np.eye(4, 16)[kinds] + 0.7 * random.standard_normal((120, 16))
    vectors[::5] = random.standard_normal((24, 16))
    wanted = random.integers(4, size=300)
    interactions = np.zeros((300, 120), np.float32)
    for user, kind in enumerate(wanted):
        interactions[user, random.choice(np.flatnonzero(kinds == kind), 6, replace=False)] = 1
    present = torch.ones(120, dtype=torch.bool)
    neighbors = nearest_neighbors(torch.from_numpy(vectors.astype(np.float32)), present, 10)
    audience = audience_graph(sparse.csr_array(interactions), 10)

    def quality(graph: sparse.csr_array) -> tuple[float, float]:
        """Share of edges within a kind, and share of items with one to another item of their kind."""
        edges = graph.tocoo()
        rows, columns = edges.coords
        apart = rows != columns
        alike = kinds[rows[apart]] == kinds[columns[apart]]
        return alike.mean(), len(np.unique(rows[apart][alike])) / 120

    plain, cut = quality(refined_graph(neighbors, None, None)), quality(refined_graph(neighbors, 0.6, None))
    whole = quality(refined_graph(neighbors, 0.6, audience))
    assert plain[0] < 0.9 < 0.95 < cut[0] < whole[0]
    assert cut[1] < 0.85 < whole[1] == 1.0


def test_memory_is_a_block_and_not_items_by_items():
    """One item that everybody has makes all items co-occur: 4 million pairs."""
    import tracemalloc

    random = np.random.default_rng(0)
    items, users = 2000, 2000
    columns = np.concatenate([np.zeros(users, int), random.integers(1, items, 10 * users)])
    rows = np.concatenate([np.arange(users), np.repeat(np.arange(users), 10)])
    interactions = sparse.csr_array(sparse.coo_array((np.ones(len(rows), np.float32), (rows, columns))))
    tracemalloc.start()
    found = audience_graph(interactions, 10, block=5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nnz > 10 * 1900
    assert peak < 12 * 2**20


def test_no_neighbors_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        audience_graph(sparse.csr_array((3, 3), dtype=np.float32), 0)
