"""VBPR: Visual Bayesian Personalized Ranking (He and McAuley, AAAI 2016, arXiv 1510.01784).

    x^_{ui} = beta_i + gamma_u . gamma_i + theta_u . (E f_i) + beta' . f_i  (eq. 4)
    loss    = BPR + lambda / (2 B) sum of squares of the batch's rows       (section 3.3)

f_i are frozen features, E [d, F] and beta' [F] are learned. The offset and the users' biases of eq. 4 are
left out, since no ranking depends on them.

Shapes: users [U, 2d] = [gamma_u; theta_u], items [I, d], E f_i [I, d]. An item's vector is
[gamma_i; E f_i; beta_i + beta' . f_i], a user's [gamma_u; theta_u; 1].

The paper knows images only. With texts as well, f_i is their concatenation (as in MMRec): E f_i is then
the sum of one projection for each modality. Either modality alone will do. Sizes are MMRec's, 64 + 64 (the
paper's are 10 + 10), its tables' weights Xavier-uniform; MMRec leaves out beta_i and beta'.

Ours: an item without a modality has no E f_i of it; what lambda keeps small are the batch's vectors
[gamma_u; theta_u] and [gamma_i; E f_i; beta_i + beta' . f_i], not E and beta' themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.pairs import (
    MODALITIES,
    compare,
    content_of,
    item_codes,
    penalty,
    xavier_projection,
    xavier_table,
)
from recllm.rankers.ranker import PairRanker, Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class VBPRConfig:
    """Sizes of VBPR."""

    width: int = 64
    """d: width of gamma, and of theta."""
    regularization: float = 0.01
    """lambda: weight of half the squares of a batch's vectors, per pair."""


class VBPR(PairRanker):
    """Matrix factorization with a second part, in which items are what they look and read like."""

    Config: ClassVar[type] = VBPRConfig
    modalities = MODALITIES
    modality_parts: ClassVar = {"text": ("text",), "image": ("image",)}

    def __init__(self, data: TrainingData, config: VBPRConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VBPRConfig()
        self.users = xavier_table(data.n_users, 2 * config.width)
        self.items = xavier_table(data.n_items, config.width)
        self.biases = nn.Embedding(data.n_items, 1)
        nn.init.zeros_(self.biases.weight)
        content = content_of(data, "VBPR")
        self.modalities = tuple(content)
        self.modality_parts = {modality: (modality,) for modality in content}
        for modality, features in content.items():
            self.add_module(modality, xavier_projection(features, config.width + 1, bias=False))

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """[gamma_u; theta_u; 1] and [gamma_i; E f_i; beta_i + beta' . f_i]; [U, 2d + 1], [I, 2d + 1]."""
        every = torch.arange(len(self.items.weight), device=self.items.weight.device)
        return with_one(self.users.weight), self._items(every, without)

    def _items(self, codes: Tensor, without: Without) -> Tensor:
        """Returns the vectors [..., 2d + 1] of items."""
        content = sum(self.get_submodule(each)(codes + 1, zeroed=each in without) for each in self.modalities)
        looks, taste = content[..., :-1], content[..., -1:]
        return torch.cat([self.items(codes), looks, self.biases(codes) + taste], -1)

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs, and keeps their vectors small."""
        users, items = self.users(batch.users), self._items(item_codes(batch), without)
        return compare(with_one(users), items, criterion) + self.config.regularization * penalty(users, items)


def with_one(users: Tensor) -> Tensor:
    """Appends a 1 to each user's vector, which takes an item's bias: [..., 2d] to [..., 2d + 1]."""
    return F.pad(users, (0, 1), value=1.0)
