"""Losses that compare a state with items: cross-entropy over the whole catalog, and over drawn negatives.

With s_i the score of item i and + the target:

    ce           -log( exp s+ / sum over the catalog of exp s_i )
    sampled-ce   -log( exp s+ / (exp s+ + sum over the negatives of exp s_n) )
    bce          -log sigma(s+) - mean over the negatives of log(1 - sigma(s_n))   (SASRec, one negative)
    bpr          -mean over the negatives of log sigma(s+ - s_n)                   (Rendle et al. 2009)
    gbce         (-beta log sigma(s+) - sum over the negatives of log(1 - sigma(s_n))) / (negatives + 1)
                 with beta = a (t (1 - 1/a) + 1/a), a = negatives / (items - 1) (Petrov and Macdonald 2023)

All are means over the targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Loss = Literal["ce", "sampled-ce", "bce", "bpr", "gbce"]
Score = Callable[[Tensor, Tensor], Tensor]
BLOCK = 2**20
_ROWS = 512  # of a tile, where the catalog does not fit into one


@dataclass(frozen=True)
class Criterion:
    """Compares states with items.

    Attributes:
        loss: Which of the losses.
        block: Scores that are held at a time by `ce`; memory grows with it, not with the catalog.
        calibration: t of `gbce`.
    """

    loss: Loss = "ce"
    block: int = BLOCK
    calibration: float = 0.75

    def __call__(
        self,
        states: Tensor,
        items: Tensor,
        targets: Tensor,
        negatives: Tensor | None = None,
        score: Score | None = None,
    ) -> Tensor:
        """Returns the mean loss of N targets.

        Args:
            states: Shape [N, D].
            items: The vectors of the whole catalog; shape [I, D].
            targets: Item codes; int64, shape [N].
            negatives: Item codes; int64, shape [N, K]. Not used by `ce`.
            score: Maps states [n, D] and items [I, D] to scores [n, I]; the inner product where None. Only
                `ce` takes another one.

        Raises:
            ValueError: The loss needs negatives and has none.
        """
        if self.loss == "ce":
            if score is None:
                return blocked_cross_entropy(states, items, targets, self.block)
            return _checkpointed_cross_entropy(states, items, targets, score, self.block)
        if negatives is None or score is not None:
            raise ValueError(f"{self.loss} needs negatives, and the inner product as score")
        # One lookup: the gradient of each is as large as the catalog.
        compared = F.embedding(torch.cat([targets[:, None], negatives], 1), items)
        scores = torch.einsum("nd,nkd->nk", states, compared)
        positive, negative = scores[:, 0], scores[:, 1:]
        if self.loss == "bpr":
            return -F.logsigmoid(positive[:, None] - negative).mean()
        if self.loss == "sampled-ce":
            return (torch.logsumexp(torch.cat([positive[:, None], negative], 1), 1) - positive).mean()
        if self.loss == "bce":
            return -(F.logsigmoid(positive) + F.logsigmoid(-negative).mean(1)).mean()
        rate = negatives.shape[1] / (len(items) - 1)
        beta = rate * (self.calibration * (1 - 1 / rate) + 1 / rate)
        summed = beta * F.logsigmoid(positive) + F.logsigmoid(-negative).sum(1)
        return -summed.mean() / (1 + negatives.shape[1])


def blocked_cross_entropy(states: Tensor, items: Tensor, targets: Tensor, block: int = BLOCK) -> Tensor:
    """Mean cross-entropy of inner products over all items, at most about `block` of them at a time.

    Loss and gradients are computed tile by tile in the forward pass: neither the [N, I] scores nor their
    softmax is ever whole, and nothing of them is kept for the backward pass. Where no gradient can be asked
    for (`torch.no_grad`, inputs without gradients), none is computed.

    Args:
        states: Shape [N, D].
        items: Shape [I, D].
        targets: Item codes; int64, shape [N].
        block: Scores held at a time.
    """
    wanted = torch.is_grad_enabled() and (states.requires_grad or items.requires_grad)
    return _BlockedCrossEntropy.apply(states, items, targets, block, wanted)


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, targets: Tensor, block: int, wanted: bool) -> Tensor:
        if wanted:
            grad_states, grad_items = torch.zeros_like(states), torch.zeros_like(items)
        loss = states.new_zeros(())
        rows = max(block // len(items), 1)
        one_tile_wide = rows >= min(64, len(states))
        rows = min(rows if one_tile_wide else _ROWS, max(len(states), 1))
        columns = len(items) if one_tile_wide else max(block // rows, 1)
        tile = states.new_empty(rows, columns) if one_tile_wide else None
        for at in range(0, len(states), rows):
            part = slice(at, at + rows)
            state, target = states[part], targets[part]
            loss -= (state * items[target]).sum()
            if one_tile_wide:
                share = torch.mm(state, items.T, out=tile[: len(state)])
                largest = share.amax(1, keepdim=True)
                total = share.sub_(largest).exp_().sum(1, keepdim=True)
                loss += (largest + total.log()).sum()
                if wanted:
                    state_over = state / total  # so that the tile itself need not be divided
                    grad_states[part] = (share @ items).div_(total)
                    grad_items.addmm_(share.T, state_over)
            else:
                normalizer = _normalizer(state, items, columns)
                loss += normalizer.sum()
                for first in range(0, len(items) if wanted else 0, columns):
                    item = items[first : first + columns]
                    share = (state @ item.T).sub_(normalizer).exp_()
                    grad_states[part].addmm_(share, item)
                    grad_items[first : first + columns].addmm_(share.T, state)
        if wanted:
            grad_states -= items[targets]
            grad_items.index_add_(0, targets, states, alpha=-1)
            ctx.gradients = grad_states, grad_items
        ctx.count = max(len(states), 1)
        return loss / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this cross-entropy were freed by the first backward pass; give "
                "retain_graph=True to all but the last one, as for any other loss in PyTorch"
            )
        grad_states, grad_items = ctx.gradients
        scale = upstream / ctx.count
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return grad_states * scale, grad_items * scale, None, None, None
        ctx.gradients = None  # scaled where they are: another gradient of the catalog would be a whole table
        return grad_states.mul_(scale), grad_items.mul_(scale), None, None, None


def _normalizer(state: Tensor, items: Tensor, columns: int) -> Tensor:
    """log of the sum of exp of the scores of all items, [n, 1], from tiles of `columns` items."""
    total = torch.full((len(state), 1), -torch.inf, dtype=state.dtype, device=state.device)
    for first in range(0, len(items), columns):
        scores = state @ items[first : first + columns].T
        total = torch.logaddexp(total, torch.logsumexp(scores, 1, keepdim=True))
    return total


def _checkpointed_cross_entropy(
    states: Tensor, items: Tensor, targets: Tensor, score: Score, block: int
) -> Tensor:
    """The same for any score: rows of at most `block` scores, computed again in the backward pass."""

    def of_rows(state: Tensor, item: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(score(state, item), target, reduction="sum")

    rows = max(block // len(items), 1)
    losses = [
        checkpoint(of_rows, states[at : at + rows], items, targets[at : at + rows], use_reentrant=False)
        for at in range(0, len(states), rows)
    ]
    return sum(losses, states.new_zeros(())) / max(len(states), 1)
