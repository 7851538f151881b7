"""What rankers of user-item pairs share: tables of vectors, comparing a batch of pairs, features of items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.layers import Projection
from recllm.rankers.training_data import TrainingData

MODALITIES = ("text", "image")


def xavier_table(rows: int, width: int) -> nn.Embedding:
    """Returns a table of vectors [rows, width], initialized as MMRec's: Xavier-uniform."""
    table = nn.Embedding(rows, width)
    nn.init.xavier_uniform_(table.weight)
    return table


def rows_of(users: Tensor, items: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Picks the vectors of a batch of pairs.

    Args:
        users: The vectors of all users; shape [U, D].
        items: The vectors of all items; shape [I, D].
        batch: B pairs with K negatives each.

    Returns:
        The users [B, D]; the items [B, 1 + K, D], each row's target first.
    """
    return F.embedding(batch.users, users), F.embedding(item_codes(batch), items)


def item_codes(batch: Batch) -> Tensor:
    """Returns the item codes of a batch of pairs, each row's target first; int64, shape [B, 1 + K]."""
    return torch.cat([batch.targets, batch.negatives[:, 0]], 1) - 1


def compare(users: Tensor, items: Tensor, criterion: Criterion) -> Tensor:
    """Returns the criterion of users [B, D] and their items [B, 1 + K, D], the target first; a scalar."""
    place = torch.arange(items.shape[0] * items.shape[1], device=items.device).view(items.shape[:2])
    return criterion(users, items.flatten(0, 1), place[:, 0], place[:, 1:])


def penalty(users: Tensor, items: Tensor) -> Tensor:
    """Returns half the sum of squares of users [B, D] and their items [B, 1 + K, D], per pair; a scalar."""
    return (users.square().sum() + items.square().sum()) / (2 * len(users))


def content_of(data: TrainingData, ranker: str, needed: Iterable[str] = ()) -> Mapping[str, Features]:
    """Returns the features of texts and images that there are.

    Args:
        data: What the ranker knows.
        ranker: The ranker's name, for the message.
        needed: Modalities that it cannot do without.

    Raises:
        DataError: There are none, or one is missing that is needed.
    """
    given = {modality: data.features[modality] for modality in MODALITIES if modality in data.features}
    missing = [modality for modality in needed if modality not in given]
    if missing:
        raise DataError(
            f"{ranker} needs the items' {' and '.join(missing)}: give --{' and --'.join(missing)}"
        )
    if not given:
        raise DataError(f"{ranker} needs what the items' texts or images say: give --text, --image or both")
    return given


def xavier_projection(features: Features, width: int, *, bias: bool = True) -> Projection:
    """Returns a projection of frozen features to a width, initialized Xavier-uniform."""
    projection = Projection(features, width, bias)
    nn.init.xavier_uniform_(projection.linear.weight)
    return projection
