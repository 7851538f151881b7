"""LATTICE: Mining Latent Structures for Multimedia Recommendation
(Zhang et al., ACM MM 2021, arXiv 2104.09036).

For each modality m, over the k nearest items N_i by cosine (an item is its own neighbor):

    S_m    from the raw features f_i, once;    L_m    from W_m f_i + b_m, learned
    a_ij   = max(cos_ij, 0), j in N_i;         S~, L~ = D^-1/2 A D^-1/2, D the row sums
    A_m    = lambda S~_m + (1 - lambda) L~_m
    A      = sum over m of alpha_m A_m,        alpha  = softmax of learned weights
    h      = A E_items

Over the interactions, with A_ui row-normalized and with self-loops as in MMRec:

    E      = mean of the layers 0 .. L of A_ui
    user   = E_u,  item = E_i + h_i / |h_i|,   y^_{ui} = user . item
    loss   = BPR + lambda_2 / (2 B) sum of squares of the batch's vectors

Shapes: users [U, d], items [I, d], W_m f [I, features], learned edges [I, k].

Learned neighbors are looked up once an epoch and for rankings; the weights of their edges come from the
projections at every step, and carry the gradient to W_m (in MMRec one step of an epoch does so). Nothing is
items x items (MMRec holds several such matrices whole). Raw features stay frozen (MMRec trains a copy).
Either modality alone will do; items without a modality have no edges in its graphs. With --refine, S_m is
refined as in MLLMRec (see `recllm.rankers.item_graphs`), and L_m stays as it is.
Ours: a user whom training did not know starts from 0 and reads the graph from outside, by a row of A_ui of
its own: (its own layer + those of its items) / (items + 1). Learned graphs are normalized for each modality,
as in the paper (MMRec normalizes their sum).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.graphs.knn import nearest_neighbors
from recllm.graphs.propagation import (
    SparseMatrix,
    bipartite,
    fold_in,
    interaction_matrix,
    mean_of_layers,
    row_normalized,
    trained_only,
)
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.item_graphs import RefinementConfig, item_graph
from recllm.rankers.pairs import (
    MODALITIES,
    compare,
    content_of,
    penalty,
    rows_of,
    xavier_projection,
    xavier_table,
)
from recllm.rankers.ranker import PairRanker, Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class LATTICEConfig(RefinementConfig):
    """Sizes of LATTICE."""

    width: int = 64
    """d: width of users and items."""
    features: int = 64
    """Width of the projected features, whose cosines make the learned graphs."""
    layers: int = 2
    """L: propagations over the interactions."""
    neighbors: int = 10
    """k: of an item in each item graph, itself included."""
    frozen_share: float = 0.9
    """lambda: share of the graph of raw features; the rest is learned."""
    regularization: float = 1e-4
    """lambda_2: weight of half the squares of a batch's vectors of users and items, per pair."""


class LATTICE(PairRanker):
    """LightGCN, plus a step over a graph of similar items that is partly learned."""

    Config: ClassVar[type] = LATTICEConfig
    folds_in = True
    modalities = MODALITIES
    modality_parts: ClassVar = {"text": ("text",), "image": ("image",)}

    def __init__(self, data: TrainingData, config: LATTICEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LATTICEConfig()
        self.users = xavier_table(data.n_users, config.width)
        self.items = xavier_table(data.n_items, config.width)
        content = content_of(data, "LATTICE")
        self.modalities = tuple(content)
        self.modality_parts = {modality: (modality,) for modality in content}
        for modality, features in content.items():
            self.add_module(modality, ModalityGraphs(features, data, config))
        if len(content) > 1:
            self.importance = nn.Parameter(torch.zeros(len(content)))
        touched = interaction_matrix(*data.pairs(), data.n_users, data.n_items)
        with_self = bipartite(touched) + sparse.eye_array(data.n_users + data.n_items, dtype=np.float32)
        self.graph = SparseMatrix(row_normalized(sparse.csr_array(with_self)))
        self._degrees = touched.sum(0)

    def begin_epoch(self, random: np.random.Generator) -> None:
        """Looks up the neighbors of the learned graphs."""
        for each in self.modalities:
            self.get_submodule(each).look_up_neighbors()

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns the vectors of users [U, d] and of items [I, d]."""
        users, items = mean_of_layers(self.graph, self.users.weight, self.items.weight, self.config.layers)
        return users, items + F.normalize(self._over_item_graph(self.items.weight, without))

    def fold_in(self, interactions: sparse.csr_array, *, without: Without = ()) -> Tensor:
        """Returns the vectors of users outside the graph of interactions; shape [B, d]."""
        users, items = self.users.weight, self.items.weight
        known = trained_only(interactions, self._degrees)
        own = 1 / (known.sum(1) + 1)
        edges = SparseMatrix(sparse.csr_array(sparse.diags_array(own) @ known)).to(items.device)
        own = torch.from_numpy(own.astype(np.float32))[:, None].to(items.device)
        return fold_in(self.graph, users, items, self.config.layers, edges, own)

    def _over_item_graph(self, items: Tensor, without: Without) -> Tensor:
        alpha = torch.softmax(self.importance, 0) if len(self.modalities) > 1 else items.new_ones(1)
        total = torch.zeros_like(items)
        for weight, modality in zip(alpha, self.modalities, strict=True):
            if modality not in without:
                total = total + weight * self.get_submodule(modality)(items)
        return total

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs, and keeps their vectors small."""
        users, items = rows_of(*self.vectors(without=without), batch)
        return compare(users, items, criterion) + self.config.regularization * penalty(users, items)


class ModalityGraphs(nn.Module):
    """The frozen and the learned item graph of one modality."""

    def __init__(self, features: Features, data: TrainingData, config: LATTICEConfig) -> None:
        super().__init__()
        self.projection = xavier_projection(features, config.features)
        self.k, self.frozen_share = config.neighbors, config.frozen_share
        self.frozen = SparseMatrix(item_graph(features, self.k, data, config, weighted=True))
        self.register_buffer("neighbors", None, persistent=False)
        self.register_buffer("owners", None, persistent=False)
        self._looked_up: tuple[Tensor, ...] | None = None

    def look_up_neighbors(self) -> None:
        """Finds the neighbors [P, k] of the P items with the modality, by their projections as they are.

        Nothing is computed if the weights are those of the look-up before: an epoch begins with those of the
        validation before it.
        """
        weights = tuple(each.detach() for each in self.projection.parameters())
        if self._looked_up is not None and all(
            then.device == now.device and torch.equal(then, now)
            for then, now in zip(self._looked_up, weights, strict=True)
        ):
            return
        self._looked_up = tuple(each.clone() for each in weights)
        with torch.no_grad():
            projected = self.projection()
            found = nearest_neighbors(projected, projected.any(1), self.k)
        self.owners, counts = found.items.unique_consecutive(return_counts=True)
        self.neighbors = found.neighbors.view(len(counts), min(self.k, len(counts)))

    def forward(self, items: Tensor) -> Tensor:
        """Returns A_m times the items' vectors; shape [I, d]."""
        if not self.training or self.neighbors is None:
            self.look_up_neighbors()
        return self.frozen_share * self.frozen(items) + (1 - self.frozen_share) * self._learned(items)

    def _learned(self, items: Tensor) -> Tensor:
        """Returns L~_m times the items' vectors, differentiable in the projections by the edges' weights."""
        projected = F.normalize(self.projection())
        near = F.embedding(self.neighbors, projected)
        weights = torch.einsum("pf,pkf->pk", projected[self.owners], near).relu()
        scale = weights.sum(1).rsqrt()
        scales = scale.new_ones(len(items)).index_copy(0, self.owners, scale)
        weights = weights * scale[:, None] * scales[self.neighbors]
        rows = torch.einsum("pk,pkd->pd", weights, F.embedding(self.neighbors, items))
        return torch.zeros_like(items).index_copy(0, self.owners, rows)
