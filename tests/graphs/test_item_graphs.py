"""LATTICE, FREEDOM and SMORE against dense matrices, which they themselves never make."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.graphs.knn import BLOCK
from recllm.graphs.propagation import interaction_matrix
from recllm.graphs.refinement import audience_graph
from recllm.rankers import item_graphs, ranker_class
from recllm.rankers.features import Features
from recllm.rankers.models import lattice
from recllm.rankers.models.freedom import prune
from recllm.rankers.models.smore import denoise, fuse
from recllm.rankers.ranker import PairRanker
from tests.graphs.dense import (
    BATCH,
    BPR,
    DATA,
    ITEMS,
    PAIRS,
    USERS,
    adjacency,
    array,
    assert_scores,
    made,
    mean_of_layers,
    nearest,
    projected,
    raw_graph,
    symmetric,
    touched,
    world,
)
from tests.graphs.sizes import LargestTensor
from tests.graphs.test_refinement import dense_audience


def lattice_dense(model: PairRanker, neighbors: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """LATTICE by dense matrices in double precision, differentiable; neighbors are given."""
    alpha = torch.softmax(model.importance.double(), 0)
    total = 0
    for weight, modality in zip(alpha, ("text", "image"), strict=True):
        linear, given = model.get_submodule(modality).projection.linear, DATA.features[modality]
        vectors = torch.from_numpy(given.vectors).double() @ linear.weight.double().T + linear.bias.double()
        unit = F.normalize(vectors * torch.from_numpy(given.present)[:, None])
        learned = torch.where(torch.from_numpy(neighbors[modality]), (unit @ unit.T).relu(), 0.0)
        scale = learned.sum(1).clamp(min=1).rsqrt()  # an item is its own neighbor: a row sums to 1 or more
        learned = scale[:, None] * learned * scale
        total = total + weight * (0.9 * torch.from_numpy(raw_graph(modality)) + 0.1 * learned)
    with_self = adjacency(touched()) + np.eye(USERS + ITEMS)
    walk = torch.from_numpy(with_self / with_self.sum(1, keepdims=True))
    table = torch.cat([model.users.weight, model.items.weight]).double()
    mean = (table + walk @ table + walk @ walk @ table) / 3
    similar = total @ model.items.weight.double()
    return mean[:USERS], mean[USERS:] + F.normalize(similar)


def learned_neighbors(model: PairRanker) -> dict[str, np.ndarray]:
    return {
        each: nearest(projected(model, each), DATA.features[each].present) != 0 for each in ("text", "image")
    }


def test_lattice_equals_dense_graphs_in_scores_and_gradients():
    model = made("lattice", regularization=0.0)
    model.begin_epoch(np.random.default_rng(0))
    users, items = lattice_dense(model, learned_neighbors(model))
    assert_scores(model, array(users), array(items))
    model.train()
    parameters = list(model.parameters())
    differences = [(users[user] * (items[item] - items[other])).sum() for user, item, (other,) in PAIRS]
    expected = torch.autograd.grad(-F.logsigmoid(torch.stack(differences)).mean(), parameters)
    found = torch.autograd.grad(model.loss(BATCH, BPR), parameters)
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, found, expected, strict=True):
        assert b.abs().max() > 1e-6, name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7, msg=name)


def test_lattice_looks_up_neighbors_each_epoch_and_for_rankings():
    model = made("lattice")
    model.begin_epoch(np.random.default_rng(0))
    first = learned_neighbors(model)
    with torch.no_grad():
        for modality in ("text", "image"):
            model.get_submodule(modality).projection.linear.weight.normal_(std=3)
    second = learned_neighbors(model)
    assert any((first[each] != second[each]).any() for each in first)
    old, new = lattice_dense(model, first), lattice_dense(model, second)
    in_training = model.train().vectors()[1].double()
    torch.testing.assert_close(in_training, old[1], rtol=1e-4, atol=1e-5)
    assert (old[1] - new[1]).abs().max() > 1e-3
    torch.testing.assert_close(model.eval().vectors()[1].double(), new[1], rtol=1e-4, atol=1e-5)
    model.train().begin_epoch(np.random.default_rng(0))
    torch.testing.assert_close(model.vectors()[1].double(), new[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "graph"), [("lattice", "image.frozen"), ("smore", "graph_of_image")])
def test_opposites_are_no_neighbors(name, graph):
    """With edges of -1 the weights of a row would sum to nothing that has a root."""
    opposed = np.ones((ITEMS, 4), np.float32)
    opposed[0] *= -1
    image = Features(opposed, np.ones(ITEMS, bool), "drawn by a test")
    model = made(name, replace(DATA, features={**DATA.features, "image": image}))
    dense = model.get_submodule(graph)(torch.eye(ITEMS))
    assert dense[0].tolist() == [1.0] + [0.0] * (ITEMS - 1)
    assert (dense >= 0).all()
    users, items = model.eval().vectors()
    assert users.isfinite().all() and items.isfinite().all()


@pytest.mark.parametrize("name", ["lattice", "freedom", "smore"])
def test_item_graphs_are_never_items_by_items(name):
    """The releases hold dense matrices of similarities."""
    items = 8300
    data = world(users=50, items=items)
    tracemalloc.start()
    with LargestTensor() as largest:
        model = made(name, data)
        model.begin_epoch(np.random.default_rng(0))
        model.train().loss(BATCH, BPR).backward()
        model.eval().vectors()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.numbers <= 2 * BLOCK < items**2 / 2
    assert peak < 2 * items**2  # bytes: half of such a matrix


def test_freedom_equals_dense_graphs_and_ranks_over_all_interactions():
    model = made("freedom", image_weight=0.3)
    model.begin_epoch(np.random.default_rng(0))
    table = mean_of_layers(symmetric(adjacency(touched())), model, 2)
    item_graph = 0.3 * raw_graph("image", binary=True) + 0.7 * raw_graph("text", binary=True)
    similar = item_graph @ array(model.items.weight)
    assert_scores(model, table[:USERS], table[USERS:] + similar)
    kept = prune(interaction_matrix(*DATA.pairs(), USERS, ITEMS), 0.8, np.random.default_rng(0)).toarray()
    table = mean_of_layers(symmetric(adjacency(kept)), model, 2)
    users, items = model.train().vectors()
    np.testing.assert_allclose(array(users), table[:USERS], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(items), table[USERS:] + similar, rtol=1e-4, atol=1e-5)


def test_freedom_compares_users_with_projected_features_too():
    model = made("freedom", content_loss=0.5)
    model.begin_epoch(np.random.default_rng(0))
    users, items = (array(each) for each in model.train().vectors())
    expected = 0.0
    for share, vectors in (
        (1, items),
        (0.5, projected(model, "text")),
        (0.5, projected(model, "image")),
    ):
        for user, item, (other,) in PAIRS:
            difference = users[user] @ (vectors[item] - vectors[other])
            expected += share * np.log1p(np.exp(-difference)) / len(PAIRS)
    np.testing.assert_allclose(model.loss(BATCH, BPR).item(), expected, rtol=1e-5)


def test_freedom_keeps_pairs_in_proportion_to_their_degrees():
    """Against the exact chances of a draw of two without replacement."""
    interactions = interaction_matrix(np.array([0, 0, 0, 1, 2, 2]), np.array([0, 1, 2, 0, 0, 1]), 3, 3)
    dense = interactions.toarray()
    users, items = np.nonzero(dense)
    chance = 1 / np.sqrt(dense.sum(1)[users] * dense.sum(0)[items])
    chance = chance / chance.sum()
    second = np.array(
        [sum(chance[j] * p / (1 - chance[j]) for j in range(6) if j != i) for i, p in enumerate(chance)]
    )
    random = np.random.default_rng(0)
    draws = 4000
    drawn = sum(prune(interactions, 1 - 2 / 6 - 1e-9, random).toarray() for _ in range(draws))
    assert drawn.sum() == 2 * draws and not drawn[dense == 0].any()
    expected = chance + second
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(drawn[users, items] / draws - expected) < 4 * error).all()
    assert np.ptp(expected) > 0.1


def test_freedom_draws_another_graph_each_epoch():
    interactions = interaction_matrix(*DATA.pairs(), USERS, ITEMS)
    one, same, other = (prune(interactions, 0.5, np.random.default_rng(seed)).toarray() for seed in (0, 0, 1))
    assert one.sum() == int(interactions.sum() * 0.5)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def circular_convolution(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = len(a)
    return np.array([sum(a[k] * b[(n - k) % size] for k in range(size)) for n in range(size)])


@pytest.mark.parametrize("width", [4, 7, 64])
def test_smore_fusion_equals_explicit_circular_convolution(width):
    torch.manual_seed(0)
    text, image = torch.randn(3, width), torch.randn(3, width)
    weights = torch.randn(width // 2 + 1, 2)
    response = np.fft.irfft(torch.view_as_complex(weights).numpy(), n=width)
    for row in range(3):
        alone = circular_convolution(array(text[row]), response)
        np.testing.assert_allclose(denoise(text, weights)[row], alone, rtol=1e-4, atol=1e-4)
        both = circular_convolution(circular_convolution(array(text[row]), array(image[row])), response)
        fused = fuse(text, image, weights)[row]
        np.testing.assert_allclose(fused, both / np.sqrt(width), rtol=1e-4, atol=1e-4)


def smore_dense(model: PairRanker, *, image: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SMORE's e, s of all users and items by dense matrices, with or without the image."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
        return x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))

    interactions = touched()
    e = mean_of_layers(symmetric(adjacency(interactions)), model, model.config.layers)
    to_users = symmetric(adjacency(interactions))[:USERS, USERS:]
    text_graph, image_graph = raw_graph("text"), raw_graph("image") * image
    text, images = projected(model, "text"), projected(model, "image") * image
    numbers = {
        each: torch.view_as_complex(getattr(model, each).filter).detach().numpy()
        for each in ("text", "image", "fusion")
    }
    spectra = [np.fft.rfft(x, norm="ortho") for x in (text, images)]
    content = {
        "text": spectra[0] * numbers["text"],
        "image": spectra[1] * numbers["image"],
        "fusion": spectra[0] * spectra[1] * numbers["fusion"],
    }
    graphs = {"text": text_graph, "image": image_graph, "fusion": np.maximum(text_graph, image_graph)}
    views = {}
    for each, spectrum in content.items():
        part = getattr(model, each)
        gate = sigmoid(linear(part.gate, np.fft.irfft(spectrum, n=4, norm="ortho")))
        items = graphs[each] @ (array(model.items.weight) * gate)
        views[each] = np.concatenate([to_users @ items, items])
    s = sigmoid(linear(model.fusion.preference[0], e)) * views["fusion"]
    for each in ("text", "image"):
        part = getattr(model, each)
        looks = np.exp(linear(part.attention[2], np.tanh(linear(part.attention[0], views["fusion"]))))
        attention = looks / looks.sum(1, keepdims=True)
        s = s + sigmoid(linear(part.preference[0], e)) * attention * views[each]
    return e, s / 3


@pytest.mark.parametrize("image", [True, False])
def test_smore_equals_dense_views(image):
    """The edges of the fused view are the union of both graphs', with the larger weight."""
    model = made("smore").eval()
    e, s = smore_dense(model, image=image)
    users, items = model.vectors(without=() if image else ("image",))
    np.testing.assert_allclose(array(users), (e + s)[:USERS], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(items), (e + s)[USERS:], rtol=1e-4, atol=1e-5)
    union = np.maximum(raw_graph("text"), raw_graph("image"))
    assert (union > raw_graph("text")).any() and (union > raw_graph("image")).any()


def test_smore_contrasts_content_with_behavior():
    with_it, without = (made("smore", contrast=value) for value in (1.0, 0.0))
    e, s = smore_dense(with_it)
    expected = 0.0
    for rows in ([user for user, _, _ in PAIRS], [USERS + item for _, item, _ in PAIRS]):
        lengths = [np.maximum(np.linalg.norm(x[rows], axis=1, keepdims=True), 1e-12) for x in (s, e)]
        a, b = s[rows] / lengths[0], e[rows] / lengths[1]
        logits = a @ b.T / with_it.config.temperature
        expected += np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    found = with_it.loss(BATCH, BPR) - without.loss(BATCH, BPR)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-4)


def test_smore_says_which_modality_it_misses():
    for given, missing in (("text", "--image"), ("image", "--text")):
        with pytest.raises(DataError, match=missing):
            made("smore", replace(DATA, features={given: DATA.features[given]}))


def test_lattice_looks_up_neighbors_once_an_epoch(monkeypatch: pytest.MonkeyPatch):
    """Validation follows an epoch, and the next epoch begins with the weights that were validated."""
    model, counted = made("lattice"), []
    find = lattice.nearest_neighbors

    def noted(*arguments: object, **options: object):
        counted.append(1)
        return find(*arguments, **options)

    monkeypatch.setattr(lattice, "nearest_neighbors", noted)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    lookups = []
    for _ in range(3):
        model.train().begin_epoch(np.random.default_rng(0))
        for _ in range(2):
            optimizer.zero_grad()
            model.loss(BATCH, BPR).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model.vectors()
            model.vectors()
        lookups.append(len(counted))
    assert lookups == [4, 6, 8]  # two modalities; the first epoch has nothing to go on from
    with torch.no_grad():
        model.text.projection.linear.weight.data.normal_()  # past the version counter
        model.vectors()
    assert len(counted) == 9


@pytest.mark.parametrize("name", ["lattice", "freedom", "smore"])
def test_neighbors_by_raw_features_are_found_once_and_kept(name: str, tmp_path, monkeypatch):
    features = {key: replace(each, cache=tmp_path / "kept") for key, each in DATA.features.items()}
    data = replace(DATA, features=features)
    plain, first = made(name), made(name, data)
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 2

    def never(*arguments: object, **options: object):
        raise AssertionError("the neighbors were looked for again")

    monkeypatch.setattr(item_graphs, "nearest_neighbors", never)
    again = made(name, data)
    for one, two, three in zip(plain.buffers(), first.buffers(), again.buffers(), strict=True):
        assert torch.equal(one, two) and torch.equal(two, three)
    text = features["text"]
    other = replace(text, vectors=text.vectors + 1)
    for changed in ({"text": other}, {}):
        with pytest.raises(AssertionError, match="looked for again"):
            chosen = {} if changed else {"neighbors": 2, "text_neighbors": 2}
            fields = ranker_class(name).Config.__dataclass_fields__
            chosen = {key: value for key, value in chosen.items() if key in fields}
            made(name, replace(data, features={**features, **changed}), **chosen)


REFINED = {"refine": True, "threshold": 0.3, "audience_neighbors": 2}


def refined_dense(modality: str) -> np.ndarray:
    """MLLMRec eq. 6 to 11 over the items with the modality."""
    given = DATA.features[modality]
    semantic = nearest(given.vectors.astype(float), given.present) >= 0.3
    audience = dense_audience(touched() > 0, 2) * given.present * given.present[:, None]
    return symmetric(semantic + audience)


@pytest.mark.parametrize("name", ["lattice", "freedom", "smore"])
def test_a_refined_graph_is_mllmrecs_in_every_ranker(name: str):
    model = made(name, **REFINED)
    graphs = {
        "lattice": ("text.frozen", "image.frozen"),
        "freedom": ("item_graphs.text", "item_graphs.image"),
        "smore": ("graph_of_text", "graph_of_image"),
    }[name]
    for modality, graph in zip(("text", "image"), graphs, strict=True):
        found = array(model.get_submodule(graph)(torch.eye(ITEMS)))
        np.testing.assert_allclose(found, refined_dense(modality), rtol=1e-5, atol=1e-6)
        plain = array(made(name).get_submodule(graph)(torch.eye(ITEMS)))
        assert np.abs(found - plain).max() > 0.1


def test_neighbors_by_audience_are_found_once_and_depend_on_the_interactions(tmp_path, monkeypatch):
    features = {key: replace(each, cache=tmp_path / "kept") for key, each in DATA.features.items()}
    data = replace(DATA, features=features)
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return audience_graph(*arguments)

    monkeypatch.setattr(item_graphs, "audience_graph", counted)
    first = made("freedom", data, **REFINED)
    assert len(calls) == 1  # two modalities, of the same interactions
    again = made("lattice", data, **REFINED)
    assert len(calls) == 1
    assert torch.equal(first.item_graphs["text"].numbers, again.text.frozen.numbers)
    made("freedom", data, **{**REFINED, "audience_neighbors": 3})
    assert len(calls) == 2
    later = replace(data, train=replace(data.train, items=data.train.items[::-1].copy()))
    made("freedom", later, **REFINED)
    assert len(calls) == 3
    for file in (tmp_path / "kept").glob("audience*"):
        file.write_bytes(b"damaged")
    made("freedom", data, **REFINED)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_damaged_neighbors_are_found_again(damage: bytes | None, tmp_path):
    """And a folder that cannot be made costs time only."""
    features = replace(DATA.features["text"], cache=tmp_path / "kept")
    expected = item_graphs.neighbors_of(features, 3)
    (file,) = (tmp_path / "kept").iterdir()
    if damage is None:
        file.unlink()
        (tmp_path / "kept").rmdir()
        (tmp_path / "kept").write_text("a file where the folder should be")
    else:
        file.write_bytes(damage)
    found = item_graphs.neighbors_of(features, 3)
    for name in ("items", "neighbors", "cosines"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    if damage is not None:
        assert file.stat().st_size > 100
