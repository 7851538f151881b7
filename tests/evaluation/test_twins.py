"""Items with equal vectors tie exactly, wherever they are stored and however the work is cut."""

import numpy as np
import pytest
import torch

from recllm.evaluation import rank_full, top_k, twins

DEVICES = ["numpy", "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]  # fmt: skip # noqa: E501


def put(array, device):
    return array if device == "numpy" else torch.from_numpy(array).to(device)


def one_each(users, items):
    return np.arange(users + 1), np.asarray(items)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block", "threads"), [(1, 1), (7, 2), (16, 1), (None, None)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_one_vector_for_all_items_is_one_tie(device, block, threads, kind):
    rng = np.random.default_rng(0)
    users, items = (
        rng.normal(size=(40, 37)).astype(kind),
        np.tile(rng.normal(size=37).astype(kind), (1003, 1)),
    )
    vectors = put(users, device), put(items, device)
    positives = one_each(40, np.r_[1002, 0, rng.integers(0, 1003, 38)])
    records = rank_full(vectors, positives, 1003, block=block, threads=threads)
    assert set(records.above) == {0} and set(records.tied) == {1003}
    listed, _ = top_k(vectors, 5, 40, 1003, block=block, threads=threads)
    assert (listed == np.arange(5)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [1, 5, 16, 64])
def test_twins_tie_wherever_they_are_stored(device, block):
    rng = np.random.default_rng(1)
    users, items = (rng.normal(size=(rows, 29)).astype(np.float32) for rows in (64, 1003))
    pairs = rng.permutation(1003)[:200].reshape(2, 100)
    items[pairs[0], 3] = 0.0
    items[pairs[1]] = items[pairs[0]]
    items[pairs[1], 3] = -0.0  # which equals 0.0
    both = []
    for one in pairs:
        asked = one_each(64, one[:64])
        both.append(rank_full((put(users, device), put(items, device)), asked, 1003, block=block))
    np.testing.assert_array_equal(both[0].above, both[1].above)
    assert (both[0].tied == both[1].tied).all() and (both[0].tied == 2).all()


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_rows_are_found_even_where_hashes_collide(device, monkeypatch):
    table = np.random.default_rng(2).integers(-1, 2, (500, 4)).astype(np.float32) * np.float32(0.5)
    _, first, which = np.unique(table, axis=0, return_index=True, return_inverse=True)
    wanted = first[which.reshape(-1)]
    for collide in (False, True):
        if collide:
            monkeypatch.setattr(twins, "_hashes", lambda table: np.zeros(len(table), np.int64))
        later, earliest = (
            np.asarray(torch.as_tensor(rows).cpu()) for rows in twins.twin_rows(put(table, device))
        )
        assert later.tolist() == np.flatnonzero(wanted != np.arange(500)).tolist()
        assert earliest.tolist() == wanted[later].tolist()
    different = put(np.eye(9, dtype=np.float32), device)
    assert twins.twin_rows(different) is None  # by sorted rows, for the hashes are still all one
    monkeypatch.undo()
    assert twins.twin_rows(different) is None and twins.twin_rows(put(table[:, :0], device)) is None
    assert twins.twin_rows(put(np.asfortranarray(table), device)) is not None
