"""Nearest neighbors against brute force, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.graphs.knn import Neighbors, nearest_neighbors
from recllm.graphs.screening import Screen
from tests.graphs.sizes import LargestTensor


def by_item(found: Neighbors) -> dict[int, list[int]]:
    lists: dict[int, list[int]] = {}
    for item, neighbor in zip(found.items.tolist(), found.neighbors.tolist(), strict=True):
        lists.setdefault(item, []).append(neighbor)
    return lists


def brute_force(vectors: np.ndarray, present: np.ndarray, k: int) -> dict[int, list[int]]:
    """Itself, then by falling cosine, then by number; among the items that are there and not zero."""
    length = np.linalg.norm(vectors, axis=1)
    known = [item for item in range(len(vectors)) if present[item] and length[item] > 0]
    lists = {}
    for item in known:
        cosine = {n: round(vectors[item] @ vectors[n] / (length[item] * length[n]), 5) for n in known}
        lists[item] = sorted(known, key=lambda n, i=item, c=cosine: (n != i, -c[n], n))[:k]
    return lists


@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.integers(1, 40),
    k=st.integers(1, 12),
    block=st.sampled_from([1, 7, 90, 1000, 2**24]),
)
@settings(max_examples=60, deadline=None)
def test_neighbors_are_those_of_brute_force(seed, items, k, block):
    """Vectors of -1, 0 and 1, which tie all the time, some of them zero, and some items without one."""
    random = np.random.default_rng(seed)
    vectors = random.integers(-1, 2, (items, 4)).astype(np.float32)
    present = random.random(items) < 0.8
    found = nearest_neighbors(torch.from_numpy(vectors), torch.from_numpy(present), k, block=block)
    assert by_item(found) == brute_force(vectors, present, k)


@pytest.mark.parametrize("block", [1, 100, 1000, 2**24])
def test_of_twins_the_first_are_taken_and_the_item_itself_always(block):
    torch.manual_seed(0)
    for width in (3, 33, 384):
        vectors = torch.randn(1, width).expand(50, -1).clone()
        vectors[7] *= -1
        found = by_item(nearest_neighbors(vectors, torch.ones(50, dtype=torch.bool), 3, block=block))
        for item, neighbors in found.items():
            others = [0, 1, 2] if item < 3 else [0, 1]
            assert neighbors == [item, *(other for other in others if other != item)], (width, item)


def test_cosines_are_of_item_and_neighbor_and_may_be_left_out():
    torch.manual_seed(0)
    vectors = torch.randn(30, 5) * torch.rand(30, 1) * 10
    present = torch.arange(30) != 4
    found = nearest_neighbors(vectors, present, 6)
    dense = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1).numpy()
    matrix = found.matrix().toarray()
    edges = matrix != 0
    assert edges.sum() == 29 * 6 and edges.diagonal().sum() == 29
    assert not edges[4].any() and not edges[:, 4].any()
    np.testing.assert_allclose(matrix[edges], dense[edges], rtol=1e-5, atol=1e-6)
    assert (found.cosines.view(29, 6).diff(dim=1) <= 0).all()
    np.testing.assert_array_equal(found.matrix(weighted=False).toarray(), edges.astype(np.float32))


def test_nothing_to_join():
    found = nearest_neighbors(torch.ones(5, 3), torch.zeros(5, dtype=torch.bool), 3)
    assert found.matrix().shape == (5, 5) and found.matrix().nnz == 0
    with pytest.raises(ValueError, match="at least 1"):
        nearest_neighbors(torch.ones(5, 3), torch.ones(5, dtype=torch.bool), 0)


def test_memory_is_a_block_and_not_items_by_items():
    torch.manual_seed(0)
    items, width, block = 2500, 8, 2**17
    with LargestTensor() as largest:
        nearest_neighbors(torch.randn(items, width), torch.ones(items, dtype=torch.bool), 10, block=block)
    assert largest.numbers <= block < items**2 / 40


@given(seed=st.integers(0, 2**32 - 1), items=st.integers(400, 700), k=st.integers(1, 5), cut=st.booleans())
@settings(max_examples=15, deadline=None)
def test_screening_in_bfloat16_loses_no_neighbor(seed, items, k, cut):
    """With twins, and lengths from 1e-6 to 1e6."""
    random = np.random.default_rng(seed)
    vectors = 0.8 + random.standard_normal((items, 24))
    vectors[random.integers(items, size=20)] = vectors[random.integers(items, size=20)]
    vectors *= 10 ** random.uniform(-6, 6, (items, 1))
    vectors = torch.from_numpy(vectors.astype(np.float32))
    present = torch.from_numpy(random.random(items) < 0.9)
    with Answers() as answers:
        found = nearest_neighbors(vectors, present, k, screen=True, block=20_000 if cut else 2**24)
    unit = torch.nn.functional.normalize(vectors.double())
    cosine = (unit @ unit.T).fill_diagonal_(2).masked_fill(~present, -2).masked_fill(~present[:, None], -2)
    expected = cosine.topk(k, dim=1).values[present].clamp(max=1)
    assert found.items.view(-1, k)[:, 0].equal(present.nonzero()[:, 0])
    assert found.neighbors.view(-1, k)[:, 0].equal(present.nonzero()[:, 0])
    torch.testing.assert_close(found.cosines.view(-1, k).double(), expected, rtol=0, atol=2e-6)
    assert answers.given


def test_where_bfloat16_tells_nothing_apart_the_plain_way_answers():
    """Cosines of 0, and more twins than are worth a second look."""
    for vectors in (
        torch.eye(300),
        torch.ones(600, 24),
        torch.cat([torch.ones(1, 24), -torch.ones(599, 24)]),
    ):
        present = torch.ones(len(vectors), dtype=torch.bool)
        with Answers() as answers:
            found = nearest_neighbors(vectors, present, 3, screen=True)
        plain = nearest_neighbors(vectors, present, 3, screen=False)
        assert answers.refused and not answers.given
        assert found.neighbors.equal(plain.neighbors) and found.cosines.equal(plain.cosines)


class Answers:
    """Counts how often the screen has found neighbors and how often it has left that to the plain way."""

    given = refused = 0

    def __enter__(self) -> Answers:
        self._patch = pytest.MonkeyPatch()
        nearest = Screen.nearest

        def counted(screen: Screen, rows: slice, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
            found = nearest(screen, rows, k)
            self.given, self.refused = self.given + (found is not None), self.refused + (found is None)
            return found

        self._patch.setattr(Screen, "nearest", counted)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
