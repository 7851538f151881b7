"""Muon in float32, for training the embedded model on any CPU.

`torch.optim.Muon` orthogonalizes in bfloat16; without bfloat16 instructions a product of two 128 x 128
matrices then takes nine times as long as in float32. This one also treats matrices of equal shape as one
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al., 2024, "Muon")."""
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalized, with the step sizes of AdamW (`0.2 * sqrt(longer side)`).

    Args:
        matrices: Parameters of two dimensions, in float32.
        lr: Learning rate.
        momentum: Share of the running mean of gradients that stays at each step (Nesterov's kind).
        weight_decay: Decoupled from the gradient, as in AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[torch.nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Applies the gradients; parameters without one stay as they are."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                directions = orthogonalized(torch.stack([self._nesterov(each, group) for each in matrices]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)

    def _nesterov(self, matrix: torch.nn.Parameter, group: dict) -> torch.Tensor:
        state = self.state[matrix]
        if not state:
            state["mean"] = torch.zeros_like(matrix)
        state["mean"].lerp_(matrix.grad, 1 - group["momentum"])
        return matrix.grad.lerp(state["mean"], group["momentum"])


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Moves the singular values of matrices near one (about 0.7 to 1.2) and keeps their singular vectors.

    Args:
        matrices: [count, rows, columns].

    Returns:
        As many matrices of the same shape.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide
