"""What every ranker must do: learn, look at what it may look at alone, and be the same when it is loaded."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from recllm.rankers.batches import Epochs, history_batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.ranker import SequenceRanker
from recllm.rankers.ranking import UserStates
from tests.rankers import worlds
from tests.rankers.second_device import second_device
from tests.rankers.small_rankers import (
    DATA,
    VARIANTS,
    every,
    every_causal,
    every_sequential,
    known,
    loss_of,
    made,
    ndcg_at_10,
    near,
    scores,
    small,
    training_batches,
)


# A profile is nearest to its own items, whatever is learned; see test_profile_fusion.py.
@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("profile")])
def test_learns_twenty_users_by_heart(name):
    model = small(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    assert ndcg_at_10(model.eval()) < 0.8
    random = np.random.default_rng(4)
    for block in range(30):
        model.train()
        model.begin_epoch(random)
        for step in range(10):
            for batch in training_batches(model, 256, 10 * block + step, drawn=8):
                optimizer.zero_grad()
                model.loss(batch, Criterion(model.losses[0])).backward()
                optimizer.step()
        if ndcg_at_10(model.eval()) > 0.95:
            return
    pytest.fail(f"NDCG@10 of what it was trained with is {ndcg_at_10(model):.3f}")


@every_causal
def test_a_state_does_not_depend_on_later_items_or_times(name):
    model = made(name)
    batch = known(model, np.arange(6))
    with torch.no_grad():
        states = model(batch)
        for place in range(1, 4):
            items, days = batch.items.clone(), batch.days.clone()
            items[:, place] = items[:, place] % worlds.ITEMS + 1
            days[:, place:] += 2.5
            changed = model(replace(batch, items=items, days=days))
            assert near(changed[:, :place], states[:, :place])
            assert not near(changed[:, place], states[:, place])
            cut = model(replace(batch, items=batch.items[:, :place], days=batch.days[:, :place]))
            assert near(cut, states[:, :place])


@every_sequential
def test_scores_depend_on_the_row_alone(name):
    """Not on padding, on what else is in the batch, on its order, or on whose row it is."""
    model = made(name)
    users = DATA.train.users
    batch = known(model, users)
    together = scores(model, batch)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert near(scores(model, worlds.padded(batch, 16 - batch.items.shape[1])), together)
    order = np.random.default_rng(0).permutation(len(users))
    assert near(scores(model, known(model, users[order])), together[order])
    alone = torch.cat([scores(model, known(model, users[[row]])) for row in range(len(users))])
    assert near(alone, together)
    assert near(scores(model, replace(batch, users=batch.users.flip(0))), together)


@every
def test_items_have_no_meaning_but_by_their_place_in_the_tables(name):
    new = np.random.default_rng(0).permutation(worlds.ITEMS)
    model, other = made(name), small(name, worlds.relabeled(DATA, new))
    rows = {
        worlds.ITEMS: new,
        worlds.ITEMS + 1: np.append(0, new + 1),
        worlds.ITEMS + 2: np.concatenate([[0], new + 1, [worlds.ITEMS + 1]]),
    }
    state = model.state_dict()
    for key, value in state.items():
        order = rows.get(len(value)) if value.ndim else None
        state[key] = (
            value if order is None else torch.empty_like(value).index_copy(0, torch.tensor(order), value)
        )
    other.load_state_dict(state)
    batch = None
    if isinstance(model, SequenceRanker):
        batch = known(model)
        batch = replace(batch, items=torch.from_numpy(np.append(0, new + 1))[batch.items])
    assert near(scores(other.eval(), batch)[:, new], scores(model))


@every
def test_a_saved_state_gives_equal_scores(name):
    model = made(name)
    saved = safetensors.torch.save(model.state_dict())
    loaded = small(name, seed=99)
    assert not near(scores(loaded.eval()), scores(model))
    loaded.load_state_dict(safetensors.torch.load(saved))
    assert torch.equal(scores(loaded), scores(model))


@every
def test_an_epoch_begins_alike_on_every_process(name):
    models = []
    for seed in (1, 2):
        model = copy.deepcopy(made(name))
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what a ranker must not use
        model.begin_epoch(np.random.default_rng(11))
        models.append(model)
    first, second = (dict(model.named_buffers()) for model in models)
    assert first.keys() == second.keys()
    for buffer, value in first.items():
        assert torch.equal(value.to_dense(), second[buffer].to_dense()), buffer


@every
def test_short_histories_and_unknown_users_are_finite(name):
    model = made(name)
    assert scores(model).isfinite().all()
    if isinstance(model, SequenceRanker):
        nobody = known(model, np.array([worlds.UNKNOWN_USER]))
        assert nobody.items.shape == (1, 1) and scores(model, nobody).isfinite().all()
        one = worlds.histories([[1 + code] for code in range(worlds.ITEMS)], [np.ones(1)] * worlds.ITEMS)
        batch = history_batch(DATA, one, one.users, model.config.length, "cpu")
        found = scores(model, batch)
        assert found.isfinite().all()
        assert (found[0] - found[1]).abs().max() > 1e-3


@every
def test_users_of_whom_nothing_is_known_get_a_tie(name):
    model = made(name)
    users = np.arange(worlds.USERS)
    ranked = UserStates(model, DATA, DATA.train, users)
    pairs = np.divmod(np.arange(worlds.USERS * worlds.ITEMS), worlds.ITEMS)
    found = torch.from_numpy(ranked.of_pairs(*pairs)).view(worlds.USERS, worlds.ITEMS)
    others = users != worlds.UNKNOWN_USER
    assert found[worlds.UNKNOWN_USER].unique().numel() == 1
    assert near(found[others], scores(model)[others])


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "bert4rec"])  # it draws what it hides
def test_loss_does_not_depend_on_padding_or_order_of_rows(name):
    model = made(name)
    batch = next(training_batches(model, 20))
    loss = loss_of(model, batch)
    assert near(loss_of(model, batch.rows(torch.arange(len(batch)).flip(0))), loss)
    if isinstance(model, SequenceRanker):
        assert near(loss_of(model, worlds.padded(batch, 16 - batch.items.shape[1])), loss)


@every
def test_trains_on_one_row(name):
    model = copy.deepcopy(made(name)).train()
    for batch in training_batches(model, 1):
        loss = loss_of(model, batch)
        assert loss.shape == () and loss.isfinite()
        loss.backward()
        break
    for (
        parameter,
        value,
    ) in model.named_parameters():  # processes would wait for one that has none
        assert parameter in model.frozen or value.grad.isfinite().all(), parameter


@every
def test_every_declared_loss_can_be_trained_with(name):
    model = copy.deepcopy(made(name)).train()
    for loss in model.losses:
        drawn = 0 if loss == "ce" else 3
        epochs = Epochs(DATA, model.examples, batch_size=32, length=16, negatives=drawn)
        batch, _ = next(epochs.epoch(0))
        model.zero_grad()
        value = model.loss(batch, Criterion(loss))
        value.backward()
        grads = [each.grad for each in model.parameters() if each.grad is not None]
        assert value.shape == () and value.isfinite()
        assert all(grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


@every
def test_no_computation_mixes_devices(name):
    model = copy.deepcopy(made(name))
    batch = next(training_batches(model))
    histories = known(model) if isinstance(model, SequenceRanker) else None
    with second_device():
        scores(model, histories)
        model.begin_epoch(np.random.default_rng(0))
        loss = model.train().loss(batch, Criterion(model.losses[0]))
        loss.backward()  # `second_device` raises where two devices meet; the next test shows that it does
    assert loss.shape == () and any(each.grad is not None for each in model.parameters())


@pytest.mark.parametrize(
    ("compute", "mixes"),
    [
        (lambda x: x + torch.arange(4), True),
        (lambda x: torch.zeros(3, 4) @ x.T, True),
        (lambda x: x[:, :2] * torch.ones(8).view(4, 2)[:3].exp(), True),
        (lambda x: torch.arange(9)[x.argmax(1)], True),
        (lambda x: x.clone().index_put_((torch.arange(3), x.argmax(1)), torch.ones(3)), True),
        (lambda x: x.cpu() - x, True),
        (lambda x: x + torch.arange(4, device=x.device), False),
        (lambda x: x + torch.arange(4).to(x.device), False),
        (lambda x: x[torch.arange(2)] * torch.tensor(2.0) + x.new_ones(4), False),
        (lambda x: x.clone().index_put_((torch.arange(3), x.argmax(1)), x.new_ones(3)), False),
        (lambda x: x.cpu() + torch.ones(4), False),
    ],
)
def test_the_second_device_tells_what_mixes(compute, mixes):
    x = torch.randn(3, 4, requires_grad=True)
    with second_device():
        if mixes:
            with pytest.raises(RuntimeError, match="two devices"):
                compute(x)
        else:
            compute(x).sum().backward()


@every
def test_scores_are_those_of_the_call_before(name):
    model = made(name)
    torch.manual_seed(1)
    first = scores(model)
    torch.manual_seed(2)
    assert torch.equal(scores(model), first)
    assert first.dtype == torch.float32 and first.shape == (worlds.USERS, worlds.ITEMS)
