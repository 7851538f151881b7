"""What every ranker has: vectors of items, states of users, a loss, and a declaration of its modalities.

A ranker is a `torch.nn.Module` made from `(data, config)`. There are two kinds:

* `SequenceRanker`: a user is the sequence of items before now; the state comes from it alone, so that users
  whom training did not know are served alike;
* `PairRanker`: a user is a row of a table.

The score of an item is the inner product of state and item vector, unless the ranker says otherwise.

**Modalities.** Plug-ins such as REVEAL's gradient reweighting need to know what belongs to a modality, and to
run the model without it. `parameters_of("image")` are the parameters that learn nothing without the image: no
gradient reaches them where it is zeroed. Every method takes `without=("image",)`: the modality is zero after
its projection (bias and all), in the sequence and in the candidates. What items say of themselves by their
number ("id") stays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from recllm.errors import DataError
from recllm.rankers.batches import Batch, Examples
from recllm.rankers.criteria import Criterion, Loss
from recllm.rankers.training_data import TrainingData

Without = Collection[str]


class Ranker(nn.Module):
    """What rankers of both kinds have.

    Attributes:
        examples: What it learns from.
        losses: The losses that it can be trained with, its own first.
        modalities: The features that it needs ("text", "image").
        modality_parts: The names of the submodules and parameters that belong to a modality alone.
        frozen: The names of parameters that no training changes.
        needs: What it needs of the data beside interactions and features: "times" (see `check_needs`).
        reads_user_texts: Whether it reads `TrainingData.user_features`.
        config: How it was made.
    """

    examples: ClassVar[Examples]
    losses: ClassVar[tuple[Loss, ...]] = ("ce", "sampled-ce", "bce", "bpr", "gbce")
    modalities: ClassVar[tuple[str, ...]] = ()
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {}
    frozen: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    reads_user_texts: ClassVar[bool] = False
    config: Any

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Returns the whole training loss of a batch; a scalar."""
        raise NotImplementedError

    def begin_epoch(self, random: np.random.Generator) -> None:
        """Called before each epoch, by every process with a generator of equal state."""

    def score(self, states: Tensor, items: Tensor) -> Tensor:
        """Returns the scores [B, I] of items [I, D] for states [B, D]."""
        return states @ items.T

    def parameters_of(self, modality: str) -> list[tuple[str, nn.Parameter]]:
        """Returns the parameters that belong to a modality alone, by name.

        Raises:
            KeyError: The ranker does not have the modality.
            LookupError: A declared part is not there.
        """
        if modality not in self.modality_parts:
            known = ", ".join(self.modality_parts) or "none"
            raise KeyError(f"{type(self).__name__} has no modality {modality!r}; it has {known}")
        parts = self.modality_parts[modality]
        found = [
            (name, parameter)
            for name, parameter in self.named_parameters()
            if any(name == part or name.startswith(f"{part}.") for part in parts)
        ]
        for part in parts:
            if not any(name == part or name.startswith(f"{part}.") for name, _ in found):
                raise LookupError(
                    f"{type(self).__name__} declares {part!r} of {modality}, and has no such part"
                )
        return found


class SequenceRanker(Ranker):
    """A ranker of what comes after a sequence."""

    examples = "positions"

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state of the user after each item; shape [B, T, D]."""
        raise NotImplementedError

    def states(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state of each user after the latest item; shape [B, D]."""
        return at_last(self(batch, without=without), batch)

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the vectors of all items, by code; shape [I, D]."""
        raise NotImplementedError


class PairRanker(Ranker):
    """A ranker of items for a known user.

    Attributes:
        folds_in: Whether `fold_in` gives vectors to users whom training did not know.
        served: Which users `vectors` has a vector of, with or without a training interaction; bool, shape
            [users]. None: those with one.
    """

    examples = "pairs"
    losses = ("bpr",)
    folds_in: ClassVar[bool] = False
    served: np.ndarray | None = None

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns the vectors of all users [U, D] and of all items [I, D], by code."""
        raise NotImplementedError

    def fold_in(self, interactions: sparse.csr_array, *, without: Without = ()) -> Tensor:
        """Returns vectors of users whom training did not know, from what is known of them by now.

        Items without a training interaction say nothing of a user: their rows were not trained. A user with
        no other items gets 0.

        Args:
            interactions: 1 where a user has interacted with an item; shape [B, I].
            without: As everywhere.

        Returns:
            Shape [B, D].
        """
        raise NotImplementedError


def check_needs(kind: type[Ranker], data: TrainingData) -> None:
    """Checks what a ranker needs beside features, which take longer to make.

    Raises:
        DataError: The training interactions have no times, and it needs them.
    """
    if "times" in kind.needs and data.train.days is None:
        raise DataError(
            f"{kind.__name__} needs the times of interactions, and no training interaction has one: give "
            "interactions.parquet a column timestamp, or take a ranker that does without, such as UniSRec"
        )


def freeze_absent(ranker: Ranker, data: TrainingData) -> None:
    """Freezes the parameters of modalities that no item has, which nothing could train."""
    for name in ranker.modalities:
        if not data.features[name].present.any():
            for _, parameter in ranker.parameters_of(name):
                parameter.requires_grad_(False)


def at_last(states: Tensor, batch: Batch) -> Tensor:
    """Picks the state after each row's latest item: [B, T, D] to [B, D]."""
    last = (batch.lengths - 1).clamp(min=0)
    return states[torch.arange(len(batch), device=states.device), last]


def states_at_targets(
    ranker: SequenceRanker, batch: Batch, *, without: Without = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs a ranker on rows of like length together, and picks what its criterion compares.

    Returns:
        As `Batch.at_targets`, the targets in the order of the groups.
    """
    picked = [part.at_targets(ranker(part, without=without)) for _, part in batch.by_length()]
    states, targets, negatives = zip(*picked, strict=True)
    return torch.cat(states), torch.cat(targets), None if negatives[0] is None else torch.cat(negatives)
