"""MMGCN: Multi-modal Graph Convolution Network (Wei et al., ACM MM 2019, doi 10.1145/3343031.3351034).

For each modality m, over users and items alike (x is a user's preference or an item's projected features, of
length 1; N_v are the neighbors of v among the training interactions):

    h_v   = LeakyReLU(W_1 mean over N_v of x_j)     aggregation
    x^_v  = LeakyReLU(W_2 x_v) + id_v               combination; id is shared by the modalities
    x'_v  = LeakyReLU(W_3 [h_v; x^_v])

for each of L layers; the vector of a user or an item is the mean over the modalities.
    loss  = BPR + lambda / (2 B) sum of squares of the batch's rows of `id` and of the preferences

Shapes: preferences [U, latent], id [U + I, d], x [U + I, latent or d].

Repaired: tables of numbers and preferences are trained (in MMRec they are plain tensors, which no optimizer
ever changes). Either modality alone will do; a user or an item without neighbors has h = 0.
Ours: a user whom training did not know has id = 0 and x = 0 at first, and at each layer h from its items;
features of both modalities are projected to the same `latent` width; the mean over modalities is the
paper's sum up to a factor; two layers by default (MMRec has three).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.graphs.propagation import (
    SparseMatrix,
    bipartite,
    interaction_matrix,
    row_normalized,
    trained_only,
)
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.pairs import (
    MODALITIES,
    compare,
    content_of,
    item_codes,
    penalty,
    rows_of,
    xavier_projection,
    xavier_table,
)
from recllm.rankers.ranker import PairRanker, Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class MMGCNConfig:
    """Sizes of MMGCN."""

    width: int = 64
    """d: width of users and items."""
    latent: int = 64
    """Width of a user's preference and of an item's projected features."""
    layers: int = 2
    """L: graph convolutions of each modality."""
    regularization: float = 1e-4
    """lambda: weight of half the squares of a batch's rows of the tables, per pair."""


class MMGCN(PairRanker):
    """Passes messages over the interactions in each modality apart, tied by the tables of numbers."""

    Config: ClassVar[type] = MMGCNConfig
    folds_in = True
    modalities = MODALITIES
    modality_parts: ClassVar = {"text": ("text.projection",), "image": ("image.projection",)}

    def __init__(self, data: TrainingData, config: MMGCNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MMGCNConfig()
        self.users = xavier_table(data.n_users, config.width)
        self.items = xavier_table(data.n_items, config.width)
        content = content_of(data, "MMGCN")
        self.modalities = tuple(content)
        self.modality_parts = {modality: (f"{modality}.projection",) for modality in content}
        for modality, features in content.items():
            self.add_module(modality, ModalityGraph(features, data.n_users, config))
        touched = interaction_matrix(*data.pairs(), data.n_users, data.n_items)
        self.graph = SparseMatrix(row_normalized(bipartite(touched)))
        self._degrees = touched.sum(0)

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns the means over the modalities, [U, d] and [I, d]."""
        numbers = torch.cat([self.users.weight, self.items.weight])
        every = torch.arange(len(numbers), device=numbers.device)
        mean = self._mean(numbers, every, without)
        return mean[: len(self.users.weight)], mean[len(self.users.weight) :]

    def fold_in(self, interactions: sparse.csr_array, *, without: Without = ()) -> Tensor:
        """Returns the means over the modalities of users outside the graph; shape [B, d]."""
        numbers = torch.cat([self.users.weight, self.items.weight])
        known = row_normalized(trained_only(interactions, self._degrees))
        edges = SparseMatrix(known).to(numbers.device)
        parts = [
            self.get_submodule(each).fold_in(self.graph, numbers, edges, zeroed=each in without)
            for each in self.modalities
        ]
        some = torch.from_numpy(known.sum(1) > 0).to(numbers.device)  # biases alone say nothing of a user
        return sum(parts) / len(parts) * some[:, None]

    def _mean(self, numbers: Tensor, nodes: Tensor, without: Without) -> Tensor:
        """Returns the mean over the modalities of some users and items; shape [nodes, d]."""
        parts = [
            self.get_submodule(each)(self.graph, numbers, nodes, zeroed=each in without)
            for each in self.modalities
        ]
        return sum(parts) / len(parts)

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs, and keeps their rows of the tables small."""
        small = penalty(*rows_of(self.users.weight, self.items.weight, batch))
        for each in self.modalities:
            preferences = self.get_submodule(each).preferences
            small = small + preferences(batch.users).square().sum() / (2 * len(batch))
        items = item_codes(batch)
        nodes = torch.cat([batch.users, items.flatten() + len(self.users.weight)])
        numbers = torch.cat([self.users.weight, self.items.weight])
        users, items = self._mean(numbers, nodes, without).split([len(batch), items.numel()])
        items = items.view(len(batch), -1, users.shape[1])
        return compare(users, items, criterion) + self.config.regularization * small


class ModalityGraph(nn.Module):
    """The graph convolutions of one modality."""

    def __init__(self, features: Features, n_users: int, config: MMGCNConfig) -> None:
        super().__init__()
        self.preferences = xavier_table(n_users, config.latent)
        self.projection = xavier_projection(features, config.latent)
        widths = [config.latent, *[config.width] * (config.layers - 1)]
        self.of_neighbors = nn.ModuleList(nn.Linear(width, width, bias=False) for width in widths)
        self.of_own = nn.ModuleList(nn.Linear(width, config.width) for width in widths)
        self.together = nn.ModuleList(nn.Linear(width + config.width, config.width) for width in widths)
        for part in (*self.of_neighbors, *self.of_own, *self.together):
            nn.init.xavier_uniform_(part.weight)

    def forward(self, graph: SparseMatrix, numbers: Tensor, nodes: Tensor, *, zeroed: bool = False) -> Tensor:
        """Returns some users and items as the modality shows them; shape [nodes, d].

        Args:
            graph: The mean over neighbors; shape [U + I, U + I].
            numbers: The tables of numbers, users first; shape [U + I, d].
            nodes: Users and items, the latter from U on; the last layer is computed for these alone.
            zeroed: Leave the items' features out.
        """
        x = self._first(zeroed)
        last = len(self.together) - 1
        for layer in range(len(self.together)):
            around, own_number = graph(x), numbers
            if layer == last:
                around, x, own_number = (F.embedding(nodes, each) for each in (around, x, numbers))
            x = self._layer(layer, around, x, own_number)
        return x

    @torch.no_grad()
    def fold_in(
        self, graph: SparseMatrix, numbers: Tensor, edges: SparseMatrix, *, zeroed: bool = False
    ) -> Tensor:
        """Returns users outside the graph as the modality shows them; shape [B, d].

        Args:
            graph: As in `forward`.
            numbers: As in `forward`.
            edges: The mean over the items of each user; shape [B, I].
            zeroed: As in `forward`.
        """
        x = self._first(zeroed)
        new = x.new_zeros(edges.shape[0], x.shape[1])
        nobody = numbers.new_zeros(())
        for layer in range(len(self.together)):
            around = edges(x[len(x) - edges.shape[1] :])
            new, x = self._layer(layer, around, new, nobody), self._layer(layer, graph(x), x, numbers)
        return new

    def _first(self, zeroed: bool) -> Tensor:
        return F.normalize(torch.cat([self.preferences.weight, self.projection(zeroed=zeroed)]))

    def _layer(self, layer: int, around: Tensor, x: Tensor, numbers: Tensor) -> Tensor:
        """One convolution of nodes x [N, .] with the means over their neighbors and their numbers [N, d]."""
        neighbors = F.leaky_relu(self.of_neighbors[layer](around))
        own = F.leaky_relu(self.of_own[layer](x)) + numbers
        return F.leaky_relu(self.together[layer](torch.cat([neighbors, own], 1)))
