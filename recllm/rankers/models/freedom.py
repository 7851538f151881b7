"""FREEDOM: Freezing and Denoising Graph Structures (Zhou and Shen, ACM Multimedia 2023, arXiv 2211.06924).

Frozen item graph: S_m joins each item with its k nearest by the raw features of modality m, all edges 1,
    S~_m = D^-1/2 S_m D^-1/2,   S = alpha S~_image + (1 - alpha) S~_text
    h    = S E_items
Denoised interactions: each epoch keeps a share 1 - rho of the training pairs, drawn without replacement with
    p(u, i) proportional to 1 / sqrt(d_u d_i)
and normalized anew; E = mean of the layers 0 .. L of LightGCN over them
    user = E_u,  item = E_i + h_i,  y^_{ui} = user . item
    loss = BPR(user, item) + lambda sum over m of BPR(user, W_m f_i + b_m)

Rankings come from the whole graph of interactions. Users whom training did not know are folded in as in
`lightgcn` (ours). Shapes: users [U, d], items [I, d], W_m f [I, d].

With one modality alone, S is its graph. An item without the modality has no edges in S_m, and without a
modality there is no S_m. As in the paper, no penalty of the tables. Raw features stay frozen (MMRec trains
a copy of them). With --refine, S_m is refined as in MLLMRec (see `recllm.rankers.item_graphs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from recllm.graphs.propagation import (
    SparseMatrix,
    bipartite,
    fold_in,
    interaction_matrix,
    mean_of_layers,
    symmetric_edges,
    symmetric_normalized,
    trained_only,
)
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.item_graphs import RefinementConfig, item_graph
from recllm.rankers.pairs import (
    MODALITIES,
    compare,
    content_of,
    item_codes,
    rows_of,
    xavier_projection,
    xavier_table,
)
from recllm.rankers.ranker import PairRanker, Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class FREEDOMConfig(RefinementConfig):
    """Sizes of FREEDOM."""

    width: int = 64
    """d: width of users and items."""
    layers: int = 2
    """L: propagations over the interactions."""
    neighbors: int = 10
    """k: of an item in the item graph, itself included."""
    image_weight: float = 0.1
    """alpha: weight of the image's item graph where there is the text's as well."""
    pruned: float = 0.8
    """rho: share of the training pairs that an epoch leaves out of the graph."""
    content_loss: float = 1e-3
    """lambda: weight of the comparison of users with projected features."""


class FREEDOM(PairRanker):
    """LightGCN on part of the interactions, plus one step over a frozen graph of similar items."""

    Config: ClassVar[type] = FREEDOMConfig
    folds_in = True
    modalities = MODALITIES
    modality_parts: ClassVar = {"text": ("text",), "image": ("image",)}

    def __init__(self, data: TrainingData, config: FREEDOMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FREEDOMConfig()
        self.users = xavier_table(data.n_users, config.width)
        self.items = xavier_table(data.n_items, config.width)
        content = content_of(data, "FREEDOM")
        self.modalities = tuple(content)
        self.modality_parts = {modality: (modality,) for modality in content}
        self.item_graphs = nn.ModuleDict()
        for modality, features in content.items():
            self.add_module(modality, xavier_projection(features, config.width))
            self.item_graphs[modality] = SparseMatrix(
                item_graph(features, config.neighbors, data, config, weighted=False)
            )
        self._touched = interaction_matrix(*data.pairs(), data.n_users, data.n_items)
        self.graph = SparseMatrix(symmetric_normalized(bipartite(self._touched)))
        self.pruned_graph = self.graph
        self._degrees = self._touched.sum(0)

    def begin_epoch(self, random: np.random.Generator) -> None:
        """Draws the pairs of the epoch's graph."""
        kept = prune(self._touched, self.config.pruned, random)
        device = self.users.weight.device
        self.pruned_graph = SparseMatrix(symmetric_normalized(bipartite(kept))).to(device)

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns the vectors of users [U, d] and of items [I, d]; in training over the epoch's graph."""
        graph = self.pruned_graph if self.training else self.graph
        users, items = mean_of_layers(graph, self.users.weight, self.items.weight, self.config.layers)
        return users, items + self._over_item_graph(self.items.weight, without)

    def fold_in(self, interactions: sparse.csr_array, *, without: Without = ()) -> Tensor:
        """Returns the vectors of users outside the graph of interactions; shape [B, d]."""
        users, items = self.users.weight, self.items.weight
        edges = SparseMatrix(symmetric_edges(trained_only(interactions, self._degrees), self._degrees))
        return fold_in(self.graph, users, items, self.config.layers, edges.to(items.device))

    def _over_item_graph(self, items: Tensor, without: Without) -> Tensor:
        share = {"image": self.config.image_weight, "text": 1 - self.config.image_weight}
        total = torch.zeros_like(items)
        for each in self.modalities:
            if each not in without:
                total = total + (share[each] if len(self.modalities) > 1 else 1.0) * self.item_graphs[each](
                    items
                )
        return total

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs by the items' vectors, and by their projected features."""
        users, items = rows_of(*self.vectors(without=without), batch)
        numbers = item_codes(batch) + 1
        by_content = sum(
            compare(users, self.get_submodule(each)(numbers, zeroed=each in without), criterion)
            for each in self.modalities
        )
        return compare(users, items, criterion) + self.config.content_loss * by_content


def prune(touched: sparse.csr_array, share: float, random: np.random.Generator) -> sparse.csr_array:
    """Leaves a share of the pairs out, rather those of much-touched items and busy users.

    Draws without replacement: with E ~ Exp(1), the smallest E / p are such a draw.

    Args:
        touched: 1 where a user has touched an item; shape [U, I].
        share: rho.
        random: Settles the draw.
    """
    pairs = touched.tocoo()
    users, items = pairs.coords
    degrees = touched.sum(1)[users] * touched.sum(0)[items]
    keys = random.exponential(size=len(users)) * np.sqrt(degrees)
    kept = np.sort(np.argsort(keys, kind="stable")[: round(len(users) * (1 - share))])
    return interaction_matrix(users[kept], items[kept], *touched.shape)
