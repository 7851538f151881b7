"""HM4SR, MMSR and MMSBR against plain NumPy, and against the defects of their releases."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from recllm.rankers.batches import Batch, Epochs, history_batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.models import mmsbr
from recllm.rankers.models.hm4sr import HM4SR, HM4SRConfig, contrast
from recllm.rankers.models.mmsbr import MMSBR, MMSBRConfig, hard_contrast, positive
from recllm.rankers.models.mmsr import MMSR, MMSRConfig, cluster_centers, graph_of
from recllm.rankers.training_data import TrainingData
from tests.rankers import worlds

DATA = worlds.tiny_data()
SECONDS = 86_400


def hm4sr(data=DATA, **options) -> HM4SR:
    torch.manual_seed(0)
    return HM4SR(data, HM4SRConfig(width=8, inner=16, length=16, dropout=0.0, experts=3, **options))


def mmsr(data=DATA, **options) -> MMSR:
    torch.manual_seed(0)
    return MMSR(data, MMSRConfig(**{"width": 6, "length": 16, "clusters": 4, **options})).eval()


def mmsbr_model(data=DATA, **options) -> MMSBR:
    torch.manual_seed(0)
    return MMSBR(data, MMSBRConfig(width=8, heads=2, length=16, **options)).eval()


def history(users=None) -> Batch:
    users = DATA.train.users if users is None else np.asarray(users)
    return history_batch(DATA, DATA.train, users, 16, "cpu")


def training_batch(examples: str, size: int = 16) -> Batch:
    return next(Epochs(DATA, examples, batch_size=size, length=16).epoch(0))[0]


def values(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class TestHM4SR:
    def test_temporal_experts_are_saved_and_trained(self):
        model = hm4sr()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert before["temporal"].shape == (3, 24)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model.loss(training_batch("positions"), Criterion("ce")).backward()
        optimizer.step()
        assert ((model.temporal - before["temporal"]).abs() > 0).all()

    def test_tokens_are_those_of_the_two_mixtures_in_numpy(self):
        model = hm4sr()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        batch = history([0])
        tokens, time = (part[0].detach().double().numpy() for part in model.tokens(batch, ()))
        w, numbers = values(model), batch.items[0].numpy()
        streams = [w["items.weight"][numbers]]
        for name in ("text", "image"):
            features = DATA.features[name]
            linear = f"{name}.projection.linear"
            projected = features.vectors[numbers - 1] @ w[f"{linear}.weight"].T + w[f"{linear}.bias"]
            streams.append(projected * features.present[numbers - 1, None])
        x = np.stack(streams) + w["positions.weight"][: len(numbers)]
        for t in range(len(numbers)):
            c = x[:, t].reshape(-1)
            experts = (w["interactive.weight"] @ c + w["interactive.bias"]).reshape(3, 3, 8)
            mixed = x[:, t].copy()
            for m, name in enumerate(("id", "text", "image")):
                gate = softmax(w[f"{name}.gate.weight"] @ x[m, t] + w[f"{name}.gate.bias"])
                mixed[m] += w[f"{name}.share"] * sum(gate[k] * experts[k, m] for k in range(3))
            route = softmax(w["route.weight"] @ time[t] + w["route.bias"])
            expected = sum(route[k] * mixed.reshape(-1) * w["temporal"][k] for k in range(3))
            np.testing.assert_allclose(tokens[t].reshape(-1), expected, rtol=1e-4, atol=1e-5)

    def test_intervals_are_never_negative_and_never_beyond_the_table(self):
        """The release takes the logarithm of a negative number where padding begins."""
        times = hm4sr().times
        days = torch.tensor(
            [[3.0, 3.0, 3.5, 10.0, 0.0, 0.0], [0.0, 1e-5, 9e9, 9e9, 9e9, 9e9]], dtype=torch.float64
        )
        buckets = times.buckets(days)
        half_day, more = np.floor(100 * np.log2(np.array([0.5, 6.5]) * SECONDS + 1)).astype(int)
        assert buckets[0].tolist() == [0, 0, half_day, more, 0, 0]
        last = times.intervals.num_embeddings - 1
        assert buckets[1].tolist() == [0, 100, last, 0, 0, 0]  # 1e-5 days are a second, but for rounding
        gaps = np.concatenate([np.diff(row) for row in np.split(DATA.train.days, DATA.train.offsets[1:-1])])
        assert last == np.floor(100 * np.log2(gaps.max() * SECONDS + 1))

    def test_a_missing_time_changes_nothing_for_other_users(self):
        """The smallest int64 that stands for it must not enter what times are counted from or divided by."""
        place = DATA.train.offsets[4]
        without = DATA.train.days.copy()
        without[place] = np.nan
        data = replace(DATA, train=replace(DATA.train, days=without))
        whole, model = hm4sr().eval(), hm4sr(data).eval()
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
        assert model.times.span == whole.times.span

        before, batch = history(), history_batch(data, data.train, DATA.train.users, 16, "cpu")
        others = torch.arange(len(batch)) != 4
        with torch.no_grad():
            states, expected = model.states(batch), whole.states(before)
            time = model.times(batch.days)
        assert torch.equal(states[others], expected[others])
        assert states.isfinite().all()
        assert not torch.equal(states[4], expected[4])
        assert batch.days[4].isnan().tolist()[:2] == [True, False]
        assert (time[4, 0, 8:] == 0).all()  # no absolute time
        assert model.times.buckets(batch.days)[4, :2].tolist() == [0, 0]
        assert model.times.buckets(batch.days)[4, 2] == whole.times.buckets(before.days)[4, 2] > 0

        training = next(Epochs(data, "positions", batch_size=32, length=16).epoch(0))[0]
        assert training.days.isnan().sum() == 1
        model.train().loss(training, Criterion("ce")).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_padding_with_day_zero_changes_no_score(self):
        model = hm4sr().eval()
        row = history([4])
        late = replace(row, days=row.days + 4000)
        with torch.no_grad():
            padded = model(worlds.padded(late, 3))
            assert padded.isfinite().all()
            torch.testing.assert_close(padded[:, : row.items.shape[1]], model(late))

    def test_time_is_scaled_so_that_a_small_step_moves_it_little(self):
        """With seconds since 1970 a thousandth more of a weight turns the cosine by a million radians."""
        years = 15
        days = np.linspace(0, years * 365, len(DATA.train.days))
        model = hm4sr(replace(DATA, train=replace(DATA.train, days=days)))
        asked = torch.linspace(0, years * 365, 40, dtype=torch.float64)[None]
        with torch.no_grad():
            before = model.times(asked)
            model.times.absolute.weight += 1e-3
            assert 0 < (model.times(asked) - before).abs().max() < 2e-3
            model.times.absolute.weight -= 1e-3
            day, month, year = (
                (model.times(asked + shift) - before)[..., 8:].abs().max() for shift in (1, 30, 365)
            )
        assert 0 < day < month < year
        assert day < 0.02

    def test_category_loss_is_that_of_all_categories_of_all_items(self):
        """The release picks single numbers, of the first rows and of no more categories than places."""
        for data in (DATA, replace(DATA, categories=DATA.categories[:, :2])):
            model = hm4sr(data)
            batch = history([0, 1, 2, 9])
            assert batch.items.shape[1] > data.categories.shape[1]
            items = model.item_vectors()
            found = model.category_loss(items, batch).item()
            weight, bias = (part.detach().double().numpy() for part in model.category.parameters())
            losses = []
            for row in batch.items.tolist():
                for number in filter(None, row):
                    share = sigmoid(weight @ items[number - 1].detach().double().numpy() + bias)
                    is_of = data.categories[number - 1]
                    losses.extend(-np.log(np.where(is_of, share, 1 - share)))
            assert found == pytest.approx(np.mean(losses), rel=1e-5)

    def test_without_categories_the_loss_is_without_them(self):
        batch = training_batch("positions")
        with_categories, without = hm4sr(), hm4sr(replace(DATA, categories=None))
        own = with_categories.state_dict()
        without.load_state_dict({name: own[name] for name in without.state_dict()})
        assert set(own) - set(without.state_dict()) == {"category.weight", "category.bias"}
        term = with_categories.category_loss(with_categories.item_vectors(), batch)
        both = [model.loss(batch, Criterion("ce")) for model in (with_categories, without)]
        torch.testing.assert_close(both[0] - term, both[1])

    def test_rows_of_the_same_target_do_not_repel_each_other(self):
        random = np.random.default_rng(0)
        states, others = random.standard_normal((2, 5, 4))
        targets = np.array([3, 1, 3, 2, 3])
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (states, others))
        logits = a @ b.T / 0.2
        logits[(targets[:, None] == targets) & ~np.eye(5, dtype=bool)] = 0
        expected = -np.log(np.diag(softmax(logits))).mean()
        as_tensors = [torch.tensor(x, requires_grad=True) for x in (states, others)]
        loss = contrast(*as_tensors, torch.tensor(targets), 0.2)
        assert loss.item() == pytest.approx(expected)
        (slope,) = torch.autograd.grad(contrast(*as_tensors, torch.tensor([7] * 5), 0.2), as_tensors[:1])
        cosine = nn.functional.cosine_similarity(*as_tensors)
        (towards,) = torch.autograd.grad(cosine.sum(), as_tensors[:1])
        along = nn.functional.cosine_similarity(slope, towards)
        torch.testing.assert_close(along, -torch.ones_like(along))

    def test_placeholders_take_their_share_of_a_prefix(self):
        model = hm4sr()
        batch = training_batch("positions")
        places = []
        for epoch in range(40):
            model.begin_epoch(np.random.default_rng(epoch))
            place, hidden = model.drawn(batch)
            assert (place < batch.lengths).all()
            assert hidden.sum(1).tolist() == [int(0.3 * (1 + at)) for at in place.tolist()]
            assert not (hidden & (torch.arange(hidden.shape[1]) > place[:, None])).any()
            alone_place, alone = model.drawn(batch.rows(torch.tensor([5])))
            assert alone_place[0] == place[5] and torch.equal(alone[0], hidden[5, : alone.shape[1]])
            places.append(place)
        places = torch.stack(places).double()
        expected = (batch.lengths.double() - 1) / 2
        error = (places.mean(0) - expected) / (batch.lengths / np.sqrt(12 * len(places)))
        assert error.abs().max() < 4
        assert hidden.any()


def random_codes(random: np.random.Generator, length: int = 7) -> Tensor:
    """All prefixes of a sequence whose items return, with clusters that many share or lack; padded."""
    items = random.integers(1, 6, length)
    codes = np.stack([items, random.integers(0, 3, 6)[items], random.integers(0, 4, 6)[items]])
    return torch.from_numpy(codes * np.tri(length, dtype=np.int64)[:, None])


def nodes_of(codes: np.ndarray) -> list[tuple[int, int]]:
    """The nodes of one graph: kind and number."""
    return sorted({(kind, number) for kind in range(3) for number in codes[kind].tolist() if number})


def relation_of(codes: np.ndarray, kind: int, one: int, other: int) -> int:
    """0 self, 1 the other came next, 2 before, 3 both; -1 none."""
    if one == other:
        return 0
    steps = list(zip(codes[kind].tolist(), codes[kind, 1:].tolist(), strict=False))
    return ((one, other) in steps) + 2 * ((other, one) in steps) or -1


def slot(codes: np.ndarray, kind: int, number: int) -> int:
    return int(np.flatnonzero(codes[kind] == number)[0])


class TestMMSR:
    def test_graph_has_the_relations_of_the_sequence(self):
        seen = set()
        for seed in range(20):
            codes = random_codes(np.random.default_rng(seed))
            graph = graph_of(codes)
            for row, each in enumerate(codes.numpy()):
                for kind, place in itertools.product(range(3), range(row + 1)):
                    assert graph.linked[row, kind, place] == (each[kind, place] > 0)
                    if each[kind, place]:
                        assert graph.slots[row, kind, place] == slot(each, kind, each[kind, place])
                for kind in np.flatnonzero(each[:, row]):
                    expected = np.full(7, -1)
                    for other in set(each[kind].tolist()) - {0}:
                        relation = relation_of(each, kind, each[kind, row], other)
                        expected[slot(each, kind, other)] = relation
                    assert np.array_equal(graph.relation[row, kind], expected)
                    seen |= set(expected.tolist())
        assert seen == {-1, 0, 1, 2, 3}

    @pytest.mark.parametrize("seed", range(5))
    def test_both_orders_of_attention_are_those_of_numpy(self, seed: int):
        random = np.random.default_rng(seed)
        model = mmsr()
        codes = random_codes(random)
        nodes = torch.from_numpy(random.standard_normal((7, 3, 7, 6)).astype(np.float32))
        found = model.propagate(nodes, graph_of(codes)).detach().double().numpy()
        w = values(model)

        def mixed(scores: list[float], taken: list[np.ndarray]) -> np.ndarray:
            scores = np.array(scores)
            return softmax(np.where(scores > 0, scores, 0.1 * scores)) @ np.array(taken)

        for row, each in enumerate(codes.numpy()):
            at = {node: nodes[row, node[0], slot(each, *node)].double().numpy() for node in nodes_of(each)}
            value = {node: h @ w["values"][node[0]] for node, h in at.items()}

            def homogeneous(node, x, taken, each=each, at=at):
                kind = [other for other in at if other[0] == node[0]]
                pairs = [(other, relation_of(each, *node, other[1])) for other in kind]
                near = [(other, relation) for other, relation in pairs if relation >= 0]
                scores = [w["relations"][relation] @ (x[node] * x[other]) for other, relation in near]
                return mixed(scores, [taken[other] for other, _ in near])

            def heterogeneous(node, x, taken, each=each):
                places = each[0] == node[1]
                near = [node] + [(k, n) for k in (1, 2) for n in sorted(set(each[k, places].tolist())) if n]
                query = w["query.weight"] @ x[node]
                scores = [query @ (x[other] @ w["keys"][other[0]]) / np.sqrt(6) for other in near]
                return mixed(scores, [taken[other] for other in near])

            among = {node: homogeneous(node, value, at) for node in at}
            across = {node: heterogeneous(node, at, value) for node in at if node[0] == 0}
            latest = (0, each[0, row])
            first, second = heterogeneous(latest, among, value), homogeneous(latest, across, value)
            np.testing.assert_allclose(found[0, row], first, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found[1, row], second, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["query.weight", "keys", "values"])
    def test_queries_keys_and_values_are_three(self, name):
        """In the release the first overwrite the others."""
        model = mmsr()
        before = model.states(history()).detach()
        with torch.no_grad():
            model.get_parameter(name).mul_(-3)
        assert (model.states(history()) - before).abs().max() > 1e-3

    def test_homogeneous_attention_moves_both_orders(self):
        """In the release it has no say in the order that begins with it."""
        model = mmsr()
        graph = graph_of(random_codes(np.random.default_rng(2)))
        nodes = torch.randn(7, 3, 7, 6)
        before = model.propagate(nodes, graph).detach()
        with torch.no_grad():
            model.relations.mul_(-20)
        moved = (model.propagate(nodes, graph) - before).abs().amax((1, 2))
        assert (moved > 1e-3).all()

    def test_the_state_is_read_at_the_latest_item(self):
        model, read = mmsr(), {}
        rows = worlds.histories([[1, 2, 3, 2], [3, 2, 1, 2], [2, 3, 2, 1]])
        batch = history_batch(DATA, rows, rows.users, 16, "cpu")
        mix = model.propagate
        model.propagate = lambda nodes, graph: read.setdefault("both", mix(nodes, graph))
        states = model.states(batch).detach().numpy()
        both = read["both"].detach().numpy()
        weights = [part.detach().numpy() for part in model.order.parameters()]
        for row in range(3):
            given = both[:, row]
            share = softmax(np.maximum(given @ weights[0].T + weights[1], 0) @ weights[2][0])
            np.testing.assert_allclose(states[row], share @ given, rtol=1e-4, atol=1e-5)
        assert len({tuple(np.round(state, 5)) for state in states}) == 3

    def test_clusters_do_not_depend_on_the_order_of_items(self):
        random = np.random.default_rng(0)
        places = 10 * random.standard_normal((4, 5))
        vectors = (np.repeat(places, 30, 0) + random.standard_normal((120, 5))).astype(np.float32)
        centers = cluster_centers(vectors, 4)
        assert torch.equal(cluster_centers(vectors[random.permutation(120)], 4), centers)
        clusters = np.linalg.norm(vectors[:, None] - centers.numpy(), axis=2).argmin(1).reshape(4, 30)
        means = vectors.reshape(4, 30, 5).mean(1)
        assert all(len(set(row)) == 1 for row in clusters.tolist())
        np.testing.assert_allclose(centers.numpy()[clusters[:, 0]], means, rtol=1e-4, atol=1e-4)

    def test_few_distinct_vectors_give_few_clusters(self):
        vectors = np.repeat(np.eye(3, dtype=np.float32), [5, 1, 4], 0)
        centers = cluster_centers(vectors, 20)
        assert sorted(map(tuple, centers.tolist())) == sorted(map(tuple, np.eye(3).tolist()))
        assert cluster_centers(vectors[:0], 20).shape == (1, 3)


class Blend(nn.Module):
    """Stands for a Transformer layer: twice the mean of all tokens."""

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        assert known.all()
        return 2 * x.mean(1, keepdim=True).expand_as(x)


def gaussian(model: MMSBR, code: int) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = model.prices.gaussians()
    return mean[code].detach().double().numpy(), covariance[code].detach().double().numpy()


def squared_distance(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """Closed form of the squared 2-Wasserstein distance of two Gaussians, with full matrices."""
    first, second = np.diag(one[1]), np.diag(other[1])
    root = sqrtm(first)
    cross = sqrtm(root @ second @ root)
    return float(((one[0] - other[0]) ** 2).sum() + np.trace(first + second - 2 * np.real(cross)))


class TestMMSBR:
    def test_prices_add_a_wasserstein_distance(self):
        model = mmsbr_model(price_levels=6)
        states = model.prices(history())
        states, items = states.detach().double().numpy(), model.prices.items().detach().double().numpy()
        priced = np.flatnonzero(np.isfinite(DATA.prices))
        for state in states[:3]:
            session = state[:8] / 2, (state[8:16] / 2) ** 2
            distances = np.array([squared_distance(session, gaussian(model, code)) for code in priced])
            scores = items @ state
            np.testing.assert_allclose(np.diff(scores[priced]), -np.diff(distances), atol=1e-4)
            np.testing.assert_allclose(scores[np.isnan(DATA.prices)], scores[priced].mean(), rtol=1e-4)

    def test_the_price_of_a_sequence_is_what_attention_makes_of_it(self):
        model = mmsbr_model()
        rows = worlds.histories([[1, 3, 6, 8]])
        codes = np.array([0, 2, 5, 7])
        assert np.isfinite(DATA.prices[codes]).all()
        means, spreads = zip(*(gaussian(model, code) for code in codes), strict=True)
        both = (torch.tensor(np.array(each), dtype=torch.float32)[None] for each in (means, spreads))
        mean, spread = (part[0, -1].detach().numpy() for part in model.prices.attention(*both))
        root = np.sqrt(np.where(spread > 0, spread, np.expm1(spread)) + 1)
        assert (spread < 0).any()
        found = model.prices(history_batch(DATA, rows, rows.users, 16, "cpu"))[0].detach()
        np.testing.assert_allclose(found, [*2 * mean, *2 * root, -1], rtol=1e-4, atol=1e-5)

    def test_tiny_covariances_have_finite_gradients(self):
        spread = torch.tensor([-200.0, -20.0, 0.0, 3.0], requires_grad=True)
        positive(spread).sqrt().sum().backward()
        assert spread.grad.isfinite().all() and (positive(spread) > 0).all()

    def test_items_without_a_price_are_not_read(self):
        model = mmsbr_model()
        unpriced = (np.flatnonzero(np.isnan(DATA.prices)) + 1).tolist()
        a, b, c = (np.flatnonzero(np.isfinite(DATA.prices))[:3] + 1).tolist()
        first, second, _ = unpriced
        rows = worlds.histories([[a, b, c], [first, a, b, second, c, first], [a, c, b], [first, second]])
        found = model.prices(history_batch(DATA, rows, rows.users, 16, "cpu"))
        torch.testing.assert_close(found[1], found[0])
        assert not torch.allclose(found[2], found[0])
        assert not found[3].any()

    def test_prices_are_quantiles_with_the_mean_of_categories(self):
        model = mmsbr_model(price_levels=5)
        priced = np.isfinite(DATA.prices)
        levels = model.prices.levels.numpy()
        assert np.bincount(levels[priced]).tolist() == [5, 5, 5, 5, 6]
        order = np.argsort(DATA.prices[priced])
        assert (np.diff(levels[priced][order]) >= 0).all()
        w = values(model.prices)
        for code in (0, 4, 11):
            category = w["categories.weight"][DATA.categories[code]].mean(0)
            spread = w["spreads.weight"][levels[code]] + category
            mean, covariance = gaussian(model, code)
            np.testing.assert_allclose(mean, w["means.weight"][levels[code]] + category, atol=1e-6)
            np.testing.assert_allclose(
                covariance, np.where(spread > 0, spread, np.expm1(spread)) + 1, atol=1e-6
            )

    def test_without_prices_scores_are_interest_alone(self):
        model = mmsbr_model(replace(DATA, prices=None))
        whole = mmsbr_model()
        whole.load_state_dict(model.state_dict(), strict=False)
        assert model.item_vectors().shape == (worlds.ITEMS, 8)
        torch.testing.assert_close(model.item_vectors(), whole.item_vectors()[:, :8])
        torch.testing.assert_close(model.states(history()), whole.states(history())[:, :8])
        torch.manual_seed(0)
        unknown = mmsbr_model(replace(DATA, prices=np.full(worlds.ITEMS, np.nan, np.float32)))
        assert unknown.prices is None

    def test_pivots_read_text_then_image(self):
        model = mmsbr_model(rounds=2, pivots=2, aspects=3)
        model.text_blocks = nn.ModuleList([Blend(), Blend()])
        model.image_blocks = nn.ModuleList([Blend(), Blend()])
        model.item, model.pivots_item = nn.Identity(), nn.Linear(16, 16, bias=False)
        codes = torch.tensor([0, 7, worlds.WITHOUT_IMAGE])
        found = model.fused(codes, ()).detach().double().numpy()
        for row, code in enumerate(codes.tolist()):
            number = torch.tensor([code + 1])
            own = model.pivots.weight[code].detach().double().numpy()
            pivots = own.reshape(2, 8)
            text, image = (part(number)[0].detach().double().numpy() for part in (model.text, model.image))
            assert image.any() == (code != worlds.WITHOUT_IMAGE)
            for _ in range(2):
                read = 2 * np.concatenate([pivots, text]).mean(0)
                pivots, text = (pivots + read) / 2, text + read
                read = 2 * np.concatenate([pivots, image]).mean(0)
                pivots, image = (pivots + read) / 2, image + read
            expected = pivots.ravel() + values(model)["pivots_item.weight"] @ own
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)

    def test_training_leaves_the_loss_of_equal_scores(self):
        """Where pivots that have read were all that items had, it never did."""
        random, count = np.random.default_rng(0), 50
        follows, rows = random.permutation(count), random.integers(count, size=(300, 12))
        for place in range(1, 12):
            follow = random.random(300) < 0.8
            rows[follow, place] = follows[rows[follow, place - 1]]
        features = {
            name: Features(
                random.standard_normal((count, width)).astype(np.float32) / 8, np.ones(count, bool), "drawn"
            )
            for name, width in (("text", 64), ("image", 32))
        }
        data = TrainingData(300, count, worlds.histories(list(rows + 1)), features, None, None, None)
        torch.manual_seed(0)
        model = MMSBR(data, MMSBRConfig(width=32, rounds=2)).train()
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
        epochs = (Epochs(data, "next", batch_size=128, length=16).epoch(epoch) for epoch in itertools.count())
        for batch, _ in itertools.islice(itertools.chain.from_iterable(epochs), 100):
            loss = model.loss(batch, Criterion("ce"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert np.mean(losses[-20:]) < 0.85 * np.log(count)

    def test_interest_weighs_items_by_themselves_and_their_mean(self):
        model = mmsbr_model(replace(DATA, prices=None))
        batch = history([0, 3])
        found = model.states(batch).detach().double().numpy()
        items, w = model.item_vectors().detach().double().numpy(), values(model)
        for row, numbers in enumerate(batch.items.tolist()):
            x = items[[number - 1 for number in numbers if number]]
            inner = sigmoid(x @ w["own.weight"].T + w["own.bias"] + x.mean(0) @ w["mean.weight"].T)
            weights = inner @ w["weight.weight"].T + w["weight.bias"]
            np.testing.assert_allclose(found[row], (weights * x).sum(0), rtol=1e-4, atol=1e-6)

    def test_contrast_counts_the_hardest_negatives(self):
        random = np.random.default_rng(0)
        vectors, others = random.standard_normal((2, 6, 4))
        others = vectors + others / 2
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, others))
        cosines = a @ b.T / 0.2
        assert (np.diag(cosines) > np.sort(cosines)[:, -2]).any()
        expected = []
        for row in range(6):
            hardest = np.sort(np.delete(cosines[row], row))[-2:]
            expected.append(np.log(np.exp([cosines[row, row], *hardest]).sum()) - cosines[row, row])
        vectors, others = torch.from_numpy(vectors), torch.from_numpy(others)
        assert hard_contrast(vectors, others, 0.2, 2).item() == pytest.approx(np.mean(expected))
        assert hard_contrast(vectors, others, 0.2, 100) > hard_contrast(vectors, others, 0.2, 2)
        assert hard_contrast(vectors[:1], others[:1], 0.2, 100).item() == 0

    def test_contrast_leaves_out_items_that_lack_a_modality(self):
        model = mmsbr_model()
        whole = torch.tensor([0, 1, 2])
        lacking = torch.tensor([worlds.WITHOUT_IMAGE, worlds.WITHOUT_TEXT])
        torch.testing.assert_close(model.alignment(torch.cat([whole, lacking])), model.alignment(whole))
        assert model.alignment(lacking).item() == 0 < model.alignment(whole).item()

    def test_blocks_of_items_change_nothing(self, monkeypatch):
        model, batch = mmsbr_model(), training_batch("next")
        found = []
        for block in (1024, 5):
            monkeypatch.setattr(mmsbr, "BLOCK", block)
            model.zero_grad()
            loss = model.loss(batch, Criterion("ce"))
            loss.backward()
            found.append((loss.detach(), {name: value.grad for name, value in model.named_parameters()}))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
