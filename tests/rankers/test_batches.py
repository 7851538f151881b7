"""Batches against plain loops, what negatives are drawn from, and that training data has nothing later."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data.dataset import write_dataset
from recllm.data.splits import SplitOptions, make_split
from recllm.rankers.batches import Batch, Epochs, TrainingNegatives, history_batch, windows
from recllm.rankers.criteria import Criterion
from recllm.rankers.models.sasrec import SASRec, SASRecConfig
from recllm.rankers.ranker import states_at_targets
from recllm.rankers.training_data import TrainingData
from tests.conftest import make_dataset
from tests.rankers import worlds
from tests.rankers.worlds import histories, padded

DATA = worlds.tiny_data()
LENGTHS = st.lists(st.integers(0, 23), max_size=9)
KINDS = ("positions", "next", "cloze")


def numbered(lengths: list[int]) -> TrainingData:
    """Sequences in which each interaction has an item and a time of its own."""
    ends = np.cumsum([0, *lengths])
    rows = [np.arange(a, b) + 1 for a, b in pairwise(ends)]
    train = histories(rows, [row / 8 for row in rows] or [np.empty(0)], 3 * np.arange(len(rows)))
    return TrainingData(3 * len(rows) + 1, int(ends[-1]) + 3, train)


def cut_by_hand(row: list[int], kind: str, length: int) -> list[list[int]]:
    """What a row gives: inputs, and for `positions` and `next` the target after them."""
    if kind == "next":
        return [row[max(0, stop - length - 1) : stop] for stop in range(2, len(row) + 1)]
    found, stop, shift = [], len(row), kind == "positions"
    while stop > shift:
        found.append(row[max(0, stop - length - shift) : stop])
        stop -= length
    return found


@given(LENGTHS, st.integers(1, 8), st.sampled_from(KINDS))
@settings(deadline=None, max_examples=150)
def test_windows_are_those_of_a_plain_loop(lengths, length, kind):
    train = numbered(lengths).train
    expected = Counter(
        (place, *piece)
        for place, (a, b) in enumerate(pairwise(train.offsets))
        for piece in cut_by_hand(train.items[a:b].tolist(), kind, length)
    )
    cut = zip(*windows(train, kind, length), strict=True)
    assert Counter((place, *train.items[a:b].tolist()) for place, a, b in cut) == expected


@given(LENGTHS, st.integers(1, 8), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_every_interaction_is_a_target_once(lengths, length, batch_size):
    """But a user's first, which has nothing before it; and each target follows its own input in the log."""
    data = numbered(lengths)
    later = [item for a, b in pairwise(data.train.offsets) for item in range(a + 2, b + 1)]
    for kind in ("positions", "next"):
        targets = []
        for batch, _ in Epochs(data, kind, batch_size=batch_size, length=length).epoch(0):
            found = batch.targets > 0
            assert batch.items.shape[1] <= length
            assert torch.equal(batch.targets[found], batch.items[found] + 1)
            targets += batch.targets[found].tolist()
            if kind == "next":
                assert torch.equal(found.nonzero()[:, 1], batch.lengths - 1)
        assert sorted(targets) == later
    hidden = [batch for batch, _ in Epochs(data, "cloze", batch_size=batch_size, length=length).epoch(0)]
    assert all(torch.equal(batch.targets, batch.items) for batch in hidden)
    everything = [item for batch in hidden for item in batch.items[batch.known].tolist()]
    assert sorted(everything) == data.train.items.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_carry_their_user_and_their_times(kind):
    data = numbered([5, 1, 12, 3])
    owner = dict(
        zip(data.train.items.tolist(), np.repeat(data.train.users, [5, 1, 12, 3]).tolist(), strict=True)
    )
    for batch, _ in Epochs(data, kind, batch_size=4, length=6).epoch(0):
        assert torch.equal(batch.days, batch.items.double() / 8) and batch.days.dtype == torch.float64
        for user, row in zip(batch.users.tolist(), batch.items.tolist(), strict=True):
            assert {owner[item] for item in row if item} == {user}
        assert ((batch.items == 0).int().diff(dim=1) >= 0).all()  # padding on the right


def test_pairs_are_the_distinct_training_pairs():
    found = Counter()
    for batch, weight in Epochs(DATA, "pairs", batch_size=50, negatives=3).epoch(0):
        assert batch.items.shape == (len(batch), 0) and batch.days is None and weight == 1
        assert batch.negatives.shape == (len(batch), 1, 3)
        found.update(zip(batch.users.tolist(), (batch.targets[:, 0] - 1).tolist(), strict=True))
    owner = np.repeat(DATA.train.users, np.diff(DATA.train.offsets)).tolist()
    assert set(found) == set(zip(owner, (DATA.train.items - 1).tolist(), strict=True))
    assert set(found.values()) == {1} and len(found) == len(DATA.train.items) - 1  # one pair is there twice


def epoch_of(kind: str, number: int = 0, seed: int = 42, **options: object) -> list[tuple[Batch, float]]:
    return list(Epochs(DATA, kind, batch_size=8, length=5, negatives=2, seed=seed, **options).epoch(number))


def rows_of(batch: Batch) -> list[tuple]:
    """Each row with its items, targets and negatives, without padding."""
    rows = []
    for row in range(len(batch)):
        kept = batch.targets[row] > 0 if batch.items.shape[1] == 0 else batch.known[row]
        parts = [
            batch.items[row][batch.known[row]],
            batch.targets[row][kept],
            batch.negatives[row][kept].flatten(),
        ]
        rows.append((batch.users[row].item(), *(tuple(part.tolist()) for part in parts)))
    return rows


@pytest.mark.parametrize("kind", [*KINDS, "pairs"])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_processes_rows_are_together_the_batch(kind, processes):
    whole = epoch_of(kind)
    parts = [epoch_of(kind, part=(rank, processes)) for rank in range(processes)]
    full = [batch for batch, _ in whole if len(batch) >= processes]
    assert [len(part) for part in parts] == [len(full)] * processes
    for batch, *pieces in zip(full, *parts, strict=True):
        assert sorted(rows_of(batch)) == sorted(row for piece, _ in pieces for row in rows_of(piece))
        weights = [weight for _, weight in pieces]
        assert np.mean(weights) == pytest.approx(1)
        shares = [int((piece.targets > 0).sum()) / int((batch.targets > 0).sum()) for piece, _ in pieces]
        assert weights == pytest.approx([share * processes for share in shares])


def test_gradients_averaged_over_processes_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    model = SASRec(DATA, SASRecConfig(width=8, length=5, dropout=0))
    criterion = Criterion("bpr")

    def gradient(batch: Batch, weight: float) -> torch.Tensor:
        loss = weight * model.loss(batch, criterion)
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])

    parts = [epoch_of("positions", part=(rank, 3)) for rank in range(3)]
    for (batch, one), *pieces in list(zip(epoch_of("positions"), *parts, strict=False))[:3]:
        assert one == 1
        averaged = sum(gradient(*piece) for piece in pieces) / 3
        assert torch.allclose(averaged, gradient(batch, one), atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "pairs"])
def test_order_and_negatives_come_from_seed_and_epoch(kind):
    def told(number: int, seed: int) -> list[list[tuple]]:
        return [rows_of(batch) for batch, _ in epoch_of(kind, number, seed)]

    assert told(1, 42) == told(1, 42)
    for other in (told(2, 42), told(1, 43)):
        assert other != told(1, 42)
        both = [sorted(row[:3] for batch in each for row in batch) for each in (other, told(1, 42))]
        assert both[0] == both[1]  # the same examples, in another order


@pytest.mark.parametrize("kind", [*KINDS, "pairs"])
def test_a_process_makes_its_own_rows_alone(kind, monkeypatch):
    """It used to make the whole batch, negatives and all, and to throw the others' rows away."""
    asked = []
    draw = TrainingNegatives.draw

    def noted(sampler, users, *rest):
        asked.append(len(users))
        return draw(sampler, users, *rest)

    monkeypatch.setattr(TrainingNegatives, "draw", noted)
    made = [len(batch) for batch, _ in epoch_of(kind, part=(1, 4))]
    assert asked == made and max(made) == 2


def test_the_next_batch_is_made_while_a_step_is_computed():
    """And no further one: memory stays that of two batches."""
    epochs = Epochs(DATA, "positions", batch_size=4, length=16)
    made, whole = [], epochs._own_rows
    begun = threading.Semaphore(0)

    def noted(chosen, seed):
        made.append(len(chosen))
        begun.release()
        return whole(chosen, seed)

    epochs._own_rows = noted
    running = epochs.epoch(0)
    next(running)
    assert begun.acquire(timeout=30) and begun.acquire(timeout=30)
    time.sleep(0.1)
    assert len(made) == 2
    next(running)
    assert begun.acquire(timeout=30) and len(made) == 3
    running.close()  # the thread ends with it


def test_an_error_in_making_a_batch_ends_the_epoch():
    epochs = Epochs(DATA, "positions", batch_size=4, length=16)
    epochs._start = epochs._start[:3]
    with pytest.raises(IndexError):
        list(epochs.epoch(0))


def test_draws_of_a_row_depend_on_its_place_and_the_seed_alone():
    users = np.random.default_rng(0).integers(worlds.USERS, size=50)
    sampler = TrainingNegatives(DATA)
    whole = sampler.draw(users, (7, 3), 5)
    part = sampler.draw(users[3::4], (7, 3), 5, np.arange(3, 50, 4))
    assert np.array_equal(part, whole[3::4])
    assert not np.array_equal(sampler.draw(users, (7, 3), 6), whole)
    columns = whole.reshape(50, -1)
    assert all(len(np.unique(columns[:, place])) > 10 for place in range(21))  # no two rows alike
    assert len({row.tobytes() for row in columns}) == 50


def test_a_batch_with_fewer_rows_than_processes_is_left_out_by_all():
    data = numbered([3] * 5)
    options = {"batch_size": 4, "length": 5}
    assert [len(b) for b, _ in Epochs(data, "positions", **options).epoch(0)] == [4, 1]
    for rank in range(2):
        assert [len(b) for b, _ in Epochs(data, "positions", **options, part=(rank, 2)).epoch(0)] == [2]


def test_negatives_are_uniform_over_what_the_user_has_not_trained_with():
    """Held-out items among it: a sampler that spares them tells them (S3-Rec, STOSA, REVEAL)."""
    users = np.arange(worlds.USERS)
    drawn = TrainingNegatives(DATA).draw(users, (2, 4000), 0)
    assert drawn.shape == (worlds.USERS, 2, 4000)
    touched = np.zeros((worlds.USERS, worlds.ITEMS), bool)
    touched[DATA.pairs()] = True
    for user in users:
        counts = np.bincount(drawn[user].ravel(), minlength=worlds.ITEMS)
        assert not counts[touched[user]].any()
        expected = 8000 / (~touched[user]).sum()
        assert (np.abs(counts[~touched[user]] - expected) < 6 * np.sqrt(expected)).all()
    assert (drawn[worlds.UNKNOWN_USER] == worlds.UNTOUCHED_ITEM).any()


def test_held_out_items_can_be_negatives(tmp_path):
    split = worlds.tiny_split(tmp_path / "data")
    data = TrainingData.of(split)
    ids = split.dataset.items["item"].to_list()
    drawn = TrainingNegatives(data).draw(np.arange(12), (400,), 0)
    for user in range(12):
        own = {ids[item] for item in drawn[user]}
        assert {f"later{user}", f"latest{user}"} <= own


def test_negatives_of_a_user_who_left_one_item_or_none():
    rows = [np.arange(1, 40), np.arange(1, 41)]
    data = TrainingData(2, 40, histories(rows))
    drawn = TrainingNegatives(data).draw(np.array([0, 1]), (300,), 0)
    assert (drawn[0] == 39).all()
    assert len(set(drawn[1].tolist())) > 30 and drawn[1].max() < 40


def test_nothing_held_out_reaches_the_training_data(tmp_path):
    split = worlds.tiny_split(tmp_path / "data")
    (split.folder / "valid.parquet").unlink()
    (split.folder / "test.parquet").unlink()
    data = TrainingData.of(split)
    names = np.array(split.dataset.items["item"].to_list())
    marked = np.char.startswith(names, "late")
    counts = np.bincount(data.train.items - 1, minlength=data.n_items)
    assert marked.sum() == 24 and not counts[marked].any() and counts[:10].all()
    assert not marked[data.pairs()[1]].any()
    assert data.train.days.min() == 0 and data.train.days.max() == 11 + 4 * 0.5


def test_one_missing_time_moves_no_other_time(tmp_path):
    """Days are counted from the first time that is known, and only the one interaction has none."""
    whole = make_dataset(tmp_path / "whole")
    first = whole.interactions.with_row_index("row").sort("timestamp", "row").group_by("user").first()
    row = first.sort("timestamp", "row")["row"][5]  # its user's first in time, so that no order changes
    log = whole.interactions.with_row_index("row").with_columns(
        timestamp=pl.when(pl.col("row") == row).then(None).otherwise(pl.col("timestamp"))
    )
    part = write_dataset(
        tmp_path / "part", items=whole.items, interactions=log.drop("row"), users=whole.users, source={}
    )
    splits = [make_split(dataset, SplitOptions(dataset.folder, "loo")) for dataset in (whole, part)]
    before, after = (TrainingData.of(split) for split in splits)
    assert after.first_second == before.first_second
    missing = np.isnan(after.train.days)
    assert missing.sum() == 1
    assert np.array_equal(after.train.days[~missing], before.train.days[~missing])
    known = [data.known_before(split, "test") for data, split in zip((before, after), splits, strict=True)]
    missing = np.isnan(known[1].days)
    assert missing.sum() == 1
    assert np.array_equal(known[1].days[~missing], known[0].days[~missing])
    assert known[1].days[~missing].min() == 0


def test_training_without_any_readable_time_has_no_days(tmp_path):
    """The log has times, but not in training: rankers that need them must refuse it."""
    whole = make_dataset(tmp_path / "whole")
    split = make_split(whole, SplitOptions(whole.folder, "loo"))
    row = pl.int_range(pl.len())
    later = row.is_in(np.concatenate([split.rows("valid"), split.rows("test")]).tolist())
    log = whole.interactions.with_columns(timestamp=pl.when(later).then(pl.col("timestamp")))
    part = write_dataset(tmp_path / "part", items=whole.items, interactions=log, users=whole.users, source={})
    data = TrainingData.of(untimed := make_split(part, SplitOptions(part.folder, "loo")))
    assert data.train.days is None
    assert data.known_before(untimed, "test").days is None


def test_what_is_known_before_a_part_has_no_target_of_it(tmp_path):
    split = worlds.tiny_split(tmp_path / "data")
    data = TrainingData.of(split)
    names = np.array(["", *split.dataset.items["item"].to_list()])
    told = {part: data.known_before(split, part) for part in ("valid", "test")}
    assert np.array_equal(told["valid"].items, data.train.items)
    assert not np.char.startswith(names[told["test"].items], "latest").any()
    last = told["test"].offsets[1:] - 1
    assert names[told["test"].items[last]].tolist() == [f"later{user}" for user in range(12)]
    assert told["test"].days[last].tolist() == [
        user + 2.5 for user in range(12)
    ]  # from the first in training


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 6), st.booleans(), st.data())
@settings(deadline=None, max_examples=80)
def test_history_batch_is_that_of_a_plain_loop(lengths, length, timed, draw):
    known = numbered([*lengths, 1])
    data = replace(known, train=replace(known.train, days=known.train.days if timed else None))
    users = draw.draw(st.lists(st.integers(0, known.n_users + 1), min_size=1, max_size=8))
    batch = history_batch(data, known.train, np.array(users), length, "cpu")
    rows = {
        int(user): known.train.items[a:b].tolist()[-length:]
        for user, a, b in zip(known.train.users, known.train.offsets, known.train.offsets[1:], strict=False)
    }
    expected = [rows.get(user, []) for user in users]
    assert batch.users.tolist() == users and batch.targets is None and batch.negatives is None
    width = max(1, *map(len, expected))
    assert batch.items.tolist() == [row + [0] * (width - len(row)) for row in expected]
    assert (batch.days is not None) == timed
    if timed:
        assert torch.equal(batch.days, batch.items.double() / 8)


@pytest.mark.parametrize("timed", [False, True])
def test_histories_of_nobody_give_rows_of_padding(timed):
    data = DATA if timed else replace(DATA, train=replace(DATA.train, days=None))
    for nobody in (histories([]), histories([[], []])):
        batch = history_batch(data, nobody, np.array([0, 5]), 4, "cpu")
        assert batch.items.tolist() == [[0], [0]] and batch.lengths.tolist() == [0, 0]
        assert (batch.days is not None) == timed


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_groups_of_like_length_have_each_row_once_and_whole(lengths, more):
    data = numbered([*lengths, 1])
    users = data.train.users.astype(np.int64)
    batch = padded(history_batch(data, data.train, users, 50, "cpu"), more)
    batch = replace(batch, targets=batch.items, negatives=batch.items[:, :, None].expand(-1, -1, 2))
    seen = []
    for rows, part in batch.by_length():
        assert part.items.shape[1] == max(1, int(part.lengths.max()))
        assert part.lengths.max() <= max(4, 2 * int(part.lengths.min()), 50 * int(part.lengths.max() > 32))
        width = part.items.shape[1]
        for name in ("items", "days", "targets", "negatives"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[rows][:, :width])
            assert not getattr(batch, name)[rows][:, width:].any()
        assert torch.equal(part.users, batch.users[rows])
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(batch)))


def test_states_at_targets_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    model = SASRec(DATA, SASRecConfig(width=8, length=12, dropout=0)).eval()
    ((batch, _),) = Epochs(DATA, "positions", batch_size=100, length=12, negatives=2).epoch(0)
    whole, grouped = batch.at_targets(model(batch)), states_at_targets(model, batch)
    assert len(grouped[0]) == int((batch.targets > 0).sum())

    def told(states: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor) -> list[list[float]]:
        numbers = torch.cat([targets[:, None], negatives], 1)
        return sorted(torch.cat([numbers, states.detach().double().round(decimals=4)], 1).tolist())

    assert np.allclose(told(*whole), told(*grouped), atol=2e-4)
    places = (batch.targets > 0).nonzero()
    codes = batch.targets[places[:, 0], places[:, 1]] - 1
    assert torch.equal(whole[1], codes)
    assert torch.equal(whole[2], batch.negatives[places[:, 0], places[:, 1]] - 1)


def test_each_target_is_told_what_precedes_it_alone(tmp_path):
    """On a random split: the history before each target is that of the log's times."""
    dataset = make_dataset(tmp_path / "d")
    split = make_split(dataset, SplitOptions(dataset.folder, "random"))
    data, times, codes = TrainingData.of(split), dataset.timestamps, dataset.item_codes
    for part in ("valid", "test"):
        rows, allowed = split.rows(part, targets=True), split.history_rows(part)
        users = dataset.user_codes[rows]
        histories, known = data.known_before_each(split, part, users, codes[rows])
        batch = history_batch(data, histories, users, 99, "cpu", known)
        first = data.known_before(split, part)
        for place, row in enumerate(rows.tolist()):
            mine = [each for each in allowed.tolist() if dataset.user_codes[each] == users[place]]
            mine = sorted((times[each], each) for each in mine if (times[each], each) < (times[row], row))
            expected = [int(codes[each]) + 1 for _, each in mine]
            assert batch.items[place][batch.items[place] > 0].tolist() == expected
            at = first.users.tolist().index(users[place])
            before_all = first.items[first.offsets[at] : first.offsets[at + 1]].tolist()
            assert before_all == expected[: len(before_all)]
    knowing = set(zip(*(each.tolist() for each in data.knowing(first).pairs()), strict=True))
    training = set(zip(*(each.tolist() for each in data.pairs()), strict=True))
    assert training <= knowing
    assert not knowing & set(zip(users.tolist(), codes[rows].tolist(), strict=True))
