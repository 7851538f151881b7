"""Losses against formulas written out, and how many scores are held at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recllm.rankers.criteria import Criterion, blocked_cross_entropy

SAMPLED = ("sampled-ce", "bce", "bpr", "gbce")


def problem(
    rows: int,
    items: int,
    width: int = 5,
    seed: int = 0,
    size: float = 2.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = size * torch.randn(rows, width, generator=generator, dtype=dtype)
    vectors = size * torch.randn(items, width, generator=generator, dtype=dtype)
    return states, vectors, torch.randint(items, (rows,), generator=generator)


def with_gradients(loss, states: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states, vectors = states.clone().requires_grad_(), vectors.clone().requires_grad_()
    value = loss(states, vectors)
    return value.detach(), *torch.autograd.grad(3 * value, [states, vectors])


def inner_product(states: Tensor, vectors: Tensor) -> Tensor:
    return states @ vectors.T


@given(
    st.integers(1, 150),
    st.integers(1, 90),
    st.integers(1, 3000),
    st.integers(0, 99),
    st.floats(0.1, 40),
    st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_cross_entropy_is_torchs_at_every_block(rows, items, block, seed, size, another):
    states, vectors, targets = problem(rows, items, seed=seed, size=size)
    score = inner_product if another else None
    found = with_gradients(lambda s, v: Criterion("ce", block)(s, v, targets, score=score), states, vectors)
    expected = with_gradients(lambda s, v: F.cross_entropy(s @ v.T, targets), states, vectors)
    for value, reference in zip(found, expected, strict=True):
        assert torch.allclose(value, reference, rtol=1e-10, atol=1e-10 * size)


@pytest.mark.parametrize("block", [7, 70, 10_000])
def test_cross_entropy_takes_another_score(block):
    states, vectors, targets = problem(23, 31)

    def distance(states: Tensor, vectors: Tensor) -> Tensor:
        return -torch.cdist(states, vectors)

    criterion = Criterion("ce", block)
    found = with_gradients(lambda s, v: criterion(s, v, targets, score=distance), states, vectors)
    expected = with_gradients(lambda s, v: F.cross_entropy(distance(s, v), targets), states, vectors)
    for value, reference in zip(found, expected, strict=True):
        assert torch.allclose(value, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [64, 20_000])
def test_large_scores_neither_overflow_nor_vanish(block):
    states, vectors, targets = problem(70, 40, size=60.0, dtype=torch.float32)
    found = with_gradients(lambda s, v: blocked_cross_entropy(s, v, targets, block), states, vectors)
    expected = with_gradients(
        lambda s, v: F.cross_entropy(s.double() @ v.double().T, targets), states, vectors
    )
    for value, reference in zip(found, expected, strict=True):
        assert value.isfinite().all()
        assert torch.allclose(value.double(), reference.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("score", [None, inner_product])
def test_no_target_is_no_loss(score):
    states, vectors, targets = problem(0, 9)
    value, to_states, to_vectors = with_gradients(
        lambda s, v: Criterion("ce")(s, v, targets, score=score) + 0 * v.sum() + 0 * s.sum(), states, vectors
    )
    assert value == 0 and to_states.shape == (0, 5) and not to_vectors.any()


def test_gradients_are_made_only_for_what_needs_them():
    states, vectors, targets = problem(6, 9)
    reference = F.cross_entropy(states @ vectors.T, targets)
    assert torch.allclose(blocked_cross_entropy(states, vectors, targets), reference)
    states.requires_grad_()
    blocked_cross_entropy(states, vectors, targets).backward()
    assert states.grad.any() and vectors.grad is None


@pytest.mark.parametrize("block", [64, 20_000])
def test_cross_entropy_goes_backward_twice_where_the_graph_is_retained(block):
    states, vectors, targets = problem(9, 37)
    states.requires_grad_(), vectors.requires_grad_()
    inputs = (states, vectors)
    expected = torch.autograd.grad(F.cross_entropy(states @ vectors.T, targets), inputs)
    loss = blocked_cross_entropy(states, vectors, targets, block)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    for one, two, three, reference in zip(first, second, third, expected, strict=True):
        torch.testing.assert_close(one, reference)
        torch.testing.assert_close(two, 3 * reference)
        torch.testing.assert_close(three, reference)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


@pytest.mark.parametrize("block", [64, 20_000])
def test_no_gradient_is_computed_where_none_can_be_asked_for(block):
    """Losses on held-out data are computed under no_grad, of parameters that require gradients."""
    states, vectors, targets = problem(9, 37)
    expected = F.cross_entropy(states @ vectors.T, targets)
    states.requires_grad_(), vectors.requires_grad_()
    with torch.no_grad(), Largest() as seen:
        value = blocked_cross_entropy(states, vectors, targets, block)
    assert torch.allclose(value, expected) and not value.requires_grad
    assert not seen.names & {"addmm_", "addmm", "index_add_", "zeros_like"}


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("score", [None, inner_product])
def test_scores_held_at_a_time_are_bounded_by_the_block(score):
    """However many items and targets there are: nothing is larger than the block or the inputs."""
    for rows, items, block in (
        (300, 40, 4_000),
        (300, 9_000, 4_000),
        (500, 9_000, 60_000),
        (40, 9_000, 4_000),
    ):
        states, vectors, targets = problem(rows, items, width=4)
        states.requires_grad_()
        vectors.requires_grad_()
        with Largest() as largest:
            Criterion("ce", block)(states, vectors, targets, score=score).backward()
        assert largest.elements <= max(block, states.numel(), vectors.numel()) < rows * items


def sampled_by_hand(
    loss: str, states: np.ndarray, vectors: np.ndarray, targets, negatives, calibration
) -> float:
    """The formulas, target by target."""

    def sigma(x: float) -> float:
        return 1 / (1 + np.exp(-x))

    losses = []
    for state, target, drawn in zip(states, targets, negatives, strict=True):
        positive, others = state @ vectors[target], [state @ vectors[item] for item in drawn]
        if loss == "sampled-ce":
            losses.append(
                -np.log(np.exp(positive) / (np.exp(positive) + sum(np.exp(each) for each in others)))
            )
        elif loss == "bce":
            losses.append(-np.log(sigma(positive)) - np.mean([np.log(1 - sigma(each)) for each in others]))
        elif loss == "bpr":
            losses.append(-np.mean([np.log(sigma(positive - each)) for each in others]))
        else:
            share = len(drawn) / (len(vectors) - 1)
            beta = share * (calibration * (1 - 1 / share) + 1 / share)
            summed = np.log(sigma(positive) ** beta) + sum(np.log(1 - sigma(each)) for each in others)
            losses.append(-summed / (len(drawn) + 1))
    return float(np.mean(losses))


@given(
    st.sampled_from(SAMPLED),
    st.integers(1, 20),
    st.integers(2, 30),
    st.integers(1, 8),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_sampled_losses_are_their_formulas(loss, rows, items, count, calibration, seed):
    states, vectors, targets = problem(rows, items, seed=seed, size=1.0)
    negatives = torch.randint(items, (rows, count), generator=torch.Generator().manual_seed(seed + 1))
    found = Criterion(loss, calibration=calibration)(states, vectors, targets, negatives)
    arrays = (each.numpy() for each in (states, vectors, targets, negatives))
    assert found.item() == pytest.approx(sampled_by_hand(loss, *arrays, calibration), rel=1e-9)


def test_calibration_of_gbce_goes_from_bce_to_probabilities():
    """t = 0 is binary cross-entropy, summed over the negatives; t = 1 has beta = negatives / (items - 1)."""
    states, vectors, targets = problem(12, 21)
    negatives = torch.randint(21, (12, 4), generator=torch.Generator().manual_seed(0))
    positive = (states * vectors[targets]).sum(1)
    negative = torch.einsum("nd,nkd->nk", states, vectors[negatives])
    rest = F.softplus(negative).sum(1)
    for calibration, beta in ((0.0, 1.0), (1.0, 4 / 20)):
        expected = (beta * F.softplus(-positive) + rest).mean() / 5
        found = Criterion("gbce", calibration=calibration)(states, vectors, targets, negatives)
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("loss", SAMPLED)
def test_sampled_losses_stay_finite_at_large_scores(loss):
    states, vectors, targets = problem(30, 20, size=80.0, dtype=torch.float32)
    negatives = torch.randint(20, (30, 3))
    for found in with_gradients(lambda s, v: Criterion(loss)(s, v, targets, negatives), states, vectors):
        assert found.isfinite().all()


@pytest.mark.parametrize("loss", SAMPLED)
def test_sampled_losses_ask_for_negatives_and_the_inner_product(loss):
    states, vectors, targets = problem(3, 5)
    with pytest.raises(ValueError, match="needs negatives"):
        Criterion(loss)(states, vectors, targets)
    with pytest.raises(ValueError, match="needs negatives"):
        Criterion(loss)(states, vectors, targets, torch.zeros(3, 1, dtype=torch.int64), inner_product)
