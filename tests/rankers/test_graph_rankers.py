"""General and graph rankers against the papers' equations, and without the defects of earlier code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.nn import functional as F

from recllm.rankers import ranker_class
from recllm.rankers.training_data import TrainingData
from tests.graphs.dense import (
    BATCH,
    BPR,
    DATA,
    ITEMS,
    NAMES,
    PAIRS,
    USERS,
    adjacency,
    array,
    assert_scores,
    batch_of,
    made,
    mean_of_layers,
    projected,
    symmetric,
    touched,
)
from tests.rankers.worlds import histories


def test_bpr_loss_is_the_papers():
    model = made("bpr", regularization=0.3)
    users, items = array(model.users.weight), array(model.items.weight)
    many = [(0, 1, [5, 6]), (3, 2, [1, 0])]
    expected = 0.0
    for user, item, negatives in many:
        for other in negatives:
            difference = users[user] @ (items[item] - items[other])
            expected += np.log1p(np.exp(-difference)) / 4
        rows = [users[user], items[item], *items[negatives]]
        expected += 0.3 * sum((row**2).sum() for row in rows) / 2 / 2
    loss = model.loss(batch_of(many), BPR)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    loss.backward()
    assert set(model.users.weight.grad.any(1).nonzero()[:, 0].tolist()) == {0, 3}
    assert set(model.items.weight.grad.any(1).nonzero()[:, 0].tolist()) == {0, 1, 2, 5, 6}


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_lightgcn_equals_dense_propagation(layers):
    model = made("lightgcn", layers=layers)
    table = mean_of_layers(symmetric(adjacency(touched())), model, layers)
    assert_scores(model, table[:USERS], table[USERS:])


def test_what_is_known_later_replaces_what_training_knew_of_users_it_knew():
    data = TrainingData(6, 9, histories([[1, 2], [3], [4, 5]], users=np.array([0, 2, 5])))
    later = histories([[3, 8], [1, 2, 9], [7]], users=np.array([2, 0, 1]))
    users, items = data.knowing(later).pairs()
    assert list(zip(users, items + 1, strict=True)) == [
        (0, 1), (0, 2), (0, 9), (2, 3), (2, 8), (5, 4), (5, 5)
    ]  # fmt: skip
    assert (data.knowing(later).n_users, data.knowing(later).n_items) == (6, 9)
    assert [each.tolist() for each in data.knowing(histories([])).pairs()] == [
        each.tolist() for each in data.pairs()
    ]


@pytest.mark.parametrize("name", ["lightgcn", "lattice", "freedom", "mmgcn", "smore"])
def test_weights_fit_a_ranker_made_of_what_is_known_later(name):
    model = made(name)
    user, item = next(pair for pair in np.argwhere(~touched().astype(bool)) if pair[0] in DATA.train.users)
    row = DATA.train.offsets[list(DATA.train.users).index(user) :][:2]
    later = histories([[*DATA.train.items[slice(*row)], item + 1]], users=np.array([user]))
    knowing = ranker_class(name)(DATA.knowing(later), model.config)
    knowing.load_state_dict(model.state_dict())
    before, after = (each.eval().vectors()[0] for each in (model, knowing))
    changed = (before - after).abs().amax(1)
    assert changed[user] > 1e-6 and changed[user] == changed.max()


def test_lightgcn_penalizes_rows_before_propagation():
    with_it, without = made("lightgcn", regularization=1.0), made("lightgcn", regularization=0.0)
    users, items = array(with_it.users.weight), array(with_it.items.weight)
    rows = [users[user] for user, _, _ in PAIRS]
    rows += [items[code] for _, item, (other,) in PAIRS for code in (item, other)]
    expected = sum((row**2).sum() for row in rows) / 2 / len(PAIRS)
    found = with_it.loss(BATCH, BPR) - without.loss(BATCH, BPR)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-4)


def test_vbpr_equals_equation_4():
    model = made("vbpr")
    content = {each: projected(model, each) for each in ("text", "image")}
    tables = [array(each.weight) for each in (model.users, model.items, model.biases)]
    expected = np.zeros((USERS, ITEMS))
    for user in range(USERS):
        for item in range(ITEMS):
            gamma, theta = tables[0][user, :4], tables[0][user, 4:]
            said = content["text"][item] + content["image"][item]
            expected[user, item] = tables[2][item, 0] + gamma @ tables[1][item] + theta @ said[:4] + said[4]
    np.testing.assert_allclose(array(model.score(*model.vectors())), expected, rtol=1e-4, atol=1e-5)


def test_mmgcn_equals_message_passing_node_by_node():
    model = made("mmgcn")
    interactions = adjacency(touched())
    numbers = np.concatenate([array(model.users.weight), array(model.items.weight)])
    total = 0

    def leaky(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, x, 0.01 * x)

    for modality in ("text", "image"):
        part = model.get_submodule(modality)
        x = np.concatenate([array(part.preferences.weight), projected(model, modality)])
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for of_neighbors, of_own, together in zip(part.of_neighbors, part.of_own, part.together, strict=True):
            after = []
            for node in range(USERS + ITEMS):
                neighbors = np.flatnonzero(interactions[node])
                messages = [array(of_neighbors.weight) @ x[other] for other in neighbors]
                h = (
                    leaky(np.mean(messages, 0))
                    if messages
                    else np.zeros(4 if len(after[:1]) < 0 else len(x[0]))
                )
                own = leaky(array(of_own.weight) @ x[node] + array(of_own.bias)) + numbers[node]
                joined = np.concatenate([h, own])
                after.append(leaky(array(together.weight) @ joined + array(together.bias)))
            x = np.array(after)
        total = total + x / 2
    assert_scores(model, total[:USERS], total[USERS:])


def test_mmgcn_trains_its_tables_of_numbers_and_preferences():
    """MMRec's are plain tensors: no parameter, and as they were after any training."""
    model = made("mmgcn")
    tables = ["users.weight", "items.weight", "text.preferences.weight", "image.preferences.weight"]
    before = {name: model.get_parameter(name).detach().clone() for name in tables}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.loss(BATCH, BPR).backward()
    optimizer.step()
    for name, values in before.items():
        changed = (model.get_parameter(name) != values).any(1)
        assert changed[[1, 2] if name == "items.weight" else [0, 3]].all(), name


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_compares_the_vectors_that_rank(name):
    """Some rankers compute the rows of the batch alone."""
    plain = {"regularization": 0.0, "contrast": 0.0, "content_loss": 0.0}
    fields = ranker_class(name).Config.__dataclass_fields__
    model = made(name, **{field: value for field, value in plain.items() if field in fields}).eval()
    for without in ((), ("image",)):
        users, items = model.vectors(without=without)
        differences = [users[user] @ (items[item] - items[other]) for user, item, (other,) in PAIRS]
        expected = -F.logsigmoid(torch.stack(differences)).mean()
        torch.testing.assert_close(model.loss(BATCH, BPR, without=without), expected)


@pytest.mark.parametrize("name", ["vbpr", "mmgcn", "lattice", "freedom"])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_one_modality_is_enough(name, modality):
    model = made(name, replace(DATA, features={modality: DATA.features[modality]}))
    assert model.modalities == (modality,) and set(model.modality_parts) == {modality}
    assert model.parameters_of(modality)
    model.begin_epoch(np.random.default_rng(0))
    plain, without = (model.eval().vectors(without=each)[1] for each in ((), (modality,)))
    assert plain.isfinite().all() and (plain != without).any()
    model.train().loss(BATCH, BPR).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_users_and_items_without_interactions_are_finite(name):
    model = made(name)
    model.begin_epoch(np.random.default_rng(0))
    assert not touched()[-1].any() and not touched()[:, -1].any()
    users, items = model.train().vectors()
    assert users.isfinite().all() and items.isfinite().all()
    model.loss(BATCH, BPR).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


FOLDING = [name for name in NAMES if ranker_class(name).folds_in]
NEW_USERS = ([1, 2, 4], [3], [ITEMS], [2, ITEMS])
"""Known items, by number, of users outside the graph; nobody has the first and the last in training."""


def outside(rows=NEW_USERS) -> sparse.csr_array:
    marks = np.zeros((len(rows), ITEMS), np.float32)
    for place, row in enumerate(rows):
        marks[place, np.array(row) - 1] = 1
    return sparse.csr_array(marks)


def test_rankers_that_have_more_than_a_table_fold_users_in():
    assert FOLDING == ["lightgcn", "mmgcn", "lattice", "freedom", "smore"]


@pytest.mark.parametrize("name", FOLDING)
def test_a_user_outside_reads_the_graph_and_changes_nobody(name):
    """As a user of the graph would be, whose own row is 0, if its items did not hear of it."""
    model = made(name).eval()
    before = [each.clone() for each in model.vectors()]
    with torch.no_grad():
        found = model.fold_in(outside())
    assert found.shape == (len(NEW_USERS), before[0].shape[1]) and found.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.vectors(), strict=True))
    assert found[0].abs().max() > 0 and not torch.allclose(found[0], found[1])
    assert not found[2].any()  # an item that nobody trained with says nothing
    with torch.no_grad():
        alone = model.fold_in(outside(([2],)))
    torch.testing.assert_close(found[3], alone[0], rtol=1e-5, atol=1e-7)
    for without in model.modalities:
        with torch.no_grad():
            assert model.fold_in(outside(), without=(without,)).isfinite().all()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["lightgcn", "freedom", "lattice"])
def test_folding_in_equals_dense_propagation_with_directed_edges(name, layers):
    model = made(name, layers=layers).eval()
    pairs, rows = touched(), outside().todense() * (touched().sum(0) > 0)
    degrees = np.maximum(pairs.sum(0), 1)
    weights = rows / np.sqrt(np.maximum(rows.sum(1, keepdims=True), 1) * degrees)
    inner, own = symmetric(adjacency(pairs)), np.zeros(len(rows))
    if name == "lattice":
        with_self = adjacency(pairs) + np.eye(USERS + ITEMS)
        inner, own = with_self / with_self.sum(1, keepdims=True), 1 / (rows.sum(1) + 1)
        weights = rows * own[:, None]
    nodes = USERS + ITEMS
    whole = np.zeros((nodes + len(rows),) * 2)  # new users read, and nothing reads them
    whole[:nodes, :nodes] = inner
    whole[nodes:, USERS:nodes] = weights
    whole[nodes:, nodes:] = np.diag(own)
    layer = np.concatenate([array(model.users.weight), array(model.items.weight), np.zeros((len(rows), 4))])
    total = layer.copy()
    for _ in range(layers):
        layer = whole @ layer
        total += layer
    with torch.no_grad():
        found = model.fold_in(outside())
    np.testing.assert_allclose(found.numpy(), total[nodes:] / (layers + 1), rtol=1e-4, atol=1e-6)


def test_mmgcn_folds_in_by_message_passing():
    model = made("mmgcn").eval()
    with torch.no_grad():
        users, items = (each.weight.clone() for each in (model.users, model.items))
        expected = 0
        for name in model.modalities:
            part = model.get_submodule(name)
            x = torch.nn.functional.normalize(torch.cat([part.preferences.weight, part.projection()]))
            mean = torch.from_numpy(adjacency(touched())).float()
            mean = mean / mean.sum(1, keepdim=True).clamp(min=1)
            new = torch.zeros(x.shape[1])
            for layer in range(len(part.together)):
                act = torch.nn.functional.leaky_relu
                heard = act(part.of_neighbors[layer](x[USERS:][[1, 3]].mean(0)))
                around = act(part.of_neighbors[layer](mean @ x))
                own = act(part.of_own[layer](x)) + torch.cat([users, items])
                of_new = act(part.of_own[layer](new))
                x = act(part.together[layer](torch.cat([around, own], 1)))
                new = act(part.together[layer](torch.cat([heard, of_new])))
            expected = expected + new / len(model.modalities)
        torch.testing.assert_close(model.fold_in(outside())[0], expected, rtol=1e-4, atol=1e-6)


def test_smore_folds_in_by_the_same_equations():
    """A user of the graph whose own row is 0 and whose items hear nothing of it."""
    model = made("smore").eval()
    user = 2
    with torch.no_grad():
        row = touched()[user]
        known = outside(([*(np.flatnonzero(row) + 1)],))
        views = model._behavior_and_views(())[1:]
        found = model.fold_in(known)
        behavior = fold_in_by_hand(model, row)
        side = model._side(behavior[None], *(view[user][None] for view in views))
        torch.testing.assert_close(found, behavior + side, rtol=1e-4, atol=1e-6)


def fold_in_by_hand(model, row: np.ndarray) -> torch.Tensor:
    layer = np.concatenate([array(model.users.weight), array(model.items.weight)])
    weights = row / np.sqrt(row.sum() * np.maximum(touched().sum(0), 1))
    total = 0
    for _ in range(model.config.layers):
        total = total + weights @ layer[USERS:]
        layer = symmetric(adjacency(touched())) @ layer
    return torch.from_numpy(total / (model.config.layers + 1)).float()
