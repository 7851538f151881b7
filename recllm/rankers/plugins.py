"""The seam of `fit`: what changes how a ranker learns, and leaves the ranker and its loss as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.ranker import Ranker


class Plugin:
    """A plug-in of `fit`. This one does nothing; others override what they need.

    In each step `fit` calls `before_step`, computes loss and gradients, calls `after_backward`, and then the
    optimizer. A plug-in must leave the random number generators of the step as they were.
    """

    def begin(
        self,
        ranker: Ranker,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        """Called once, before a state is loaded and before the first step.

        Args:
            ranker: The ranker, on its device.
            criterion: What it is trained with.
            optimizer: The optimizer of its parameters, in one group.
            mean: Averages a tensor over the processes.
        """

    def before_step(self, batch: Batch, weight: float) -> None:
        """Called before the loss of a step is computed, in training mode.

        Args:
            batch: This process's rows of the batch.
            weight: Of the mean of their losses; the mean of the weighted losses over the processes is the
                loss of the whole batch.
        """

    def after_backward(self) -> None:
        """Called when the gradients are there and the optimizer has not used them."""

    def numbers(self) -> dict[str, float]:
        """Returns what the log says of the epoch that has ended; called once after each epoch."""
        return {}

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs; JSON types."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` returned when the run was interrupted.

        Raises:
            DataError: The state is another plug-in's.
        """
        if state:
            raise DataError(
                f"the run was interrupted in training with a plug-in ({', '.join(state)}); resume it with it"
            )
