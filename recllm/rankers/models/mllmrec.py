"""MLLMRec: an MLLM's texts of items and users, and a refined item graph (arXiv 2508.15304, SIGIR 2026).

    e_i   = sentence vector of the item's text, e_u = of the user's preference text     (eq. 5, 13), frozen
    S^    = N^-1/2 S* N^-1/2, the refined item graph of `recllm.graphs.refinement`       (eq. 6 to 11)
    e*_i  = row i of E + S^ E + .. + S^^L E                                              (eq. 11, 12)
    h_u   = LeakyReLU(e_u W_1 + b_1) W_2 + b_2;  h_i alike from e*_i, by weights of its own (eq. 14)
    y^_ui = h_u . h_i,   loss = BPR(h_u, h_i)                                            (eq. 15)

Neither items nor users have a vector by their number. All that is propagated is frozen, so e* is computed
once. Weights start Xavier-uniform, biases at 0, as the paper says (the release has torch's default).

Shapes: e_i [I, d_t], e_u [U, d_t], h_u [U, d], h_i [I, d]; W_1 [d_t, d_1], W_2 [d_1, d].

Ablations (table 2 and table 1): without reasoning, e_u is a learned row; without denoising, S~ has no
threshold; without enhancement, S* = S~; without the item graph, e* = e; and with the user graph,
    h     = h + sum of the layers 0 .. 2 of LightGCN over the training interactions, from h / |h|  (release).

Ours: a user without a text is the mean of the texts' vectors of his items, which the same weights map to
h_u: of the training items, or, for a user whom training did not know, of the items that are known by then. A
user with a text is served by it, with or without a training interaction. Who has neither gets h_u = 0, an
item that no text reaches h_i = 0: nothing is invented. The items' b_2 is left out, since it adds the same
to each score of a user. The loss is the mean over the pairs, not the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.config import refuse_given
from recllm.errors import DataError
from recllm.graphs.propagation import (
    SparseMatrix,
    bipartite,
    fold_in,
    interaction_matrix,
    mean_of_layers,
    row_normalized,
    symmetric_edges,
    symmetric_normalized,
    trained_only,
)
from recllm.graphs.refinement import refined_graph
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.item_graphs import audience_of, neighbors_of
from recllm.rankers.pairs import compare, content_of, item_codes, xavier_table
from recllm.rankers.ranker import PairRanker, Without
from recllm.rankers.training_data import TrainingData

_USER_LAYERS = 2


@dataclass(frozen=True)
class MLLMRecConfig:
    """Sizes and ablations of MLLMRec.

    Attributes:
        transductive: False: items are known by their texts alone.
    """

    transductive: ClassVar[bool] = False

    width: int = 64
    """d: width of users and items."""
    hidden: int = 256
    """d_1: width within the two networks."""
    item_layers: int = 1
    """L: propagations over the item graph."""
    neighbors: int = 10
    """K_s: nearest items of an item by their texts, itself included."""
    threshold: float = 0.6
    """alpha: least cosine of an edge; the paper searches 0.4, 0.5, 0.6 and 0.7."""
    audience_neighbors: int = 10
    """K_c: of an item, the items with the largest Jaccard similarity of training users; the paper searches
    5, 10, 15 and 20."""
    reasoning: bool = True
    """Users are their preference texts; --no-reasoning (w/o RS): learned vectors."""
    denoising: bool = True
    """--no-denoising (w/o GD): no threshold."""
    enhancement: bool = True
    """--no-enhancement (w/o TE): no edges between items with the same training users."""
    item_graph: bool = True
    """--no-item-graph (w/o GCN_II): items are not propagated."""
    user_graph: bool = False
    """--user-graph (w/ GCN_UI): two layers of LightGCN over the training interactions on top."""

    def check(self) -> None:
        """Raises a `DataError` for options that an ablation leaves without effect."""
        off = {
            "item_graph": (
                *("item_layers", "neighbors", "threshold", "audience_neighbors"),
                *("denoising", "enhancement"),
            ),
            "denoising": ("threshold",),
            "enhancement": ("audience_neighbors",),
        }
        for name, without_effect in off.items():
            if not getattr(self, name):
                refuse_given(
                    self, without_effect, f"with --no-{name.replace('_', '-')}. Leave one of them out"
                )


class MLLMRec(PairRanker):
    """Two networks over frozen texts: of users, and of items smoothed over the refined item graph."""

    Config: ClassVar[type] = MLLMRecConfig
    folds_in = True
    reads_user_texts = True
    modalities = ("text",)
    modality_parts: ClassVar = {"text": ("item_network",)}

    def __init__(self, data: TrainingData, config: MLLMRecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MLLMRecConfig()
        texts = content_of(data, "MLLMRec", needed=("text",))["text"]
        content = torch.from_numpy(texts.vectors) * torch.from_numpy(texts.present)[:, None]
        interactions = interaction_matrix(*data.pairs(), data.n_users, data.n_items)
        items = self._propagated(content, texts, data)
        self.register_buffer("items", items, persistent=False)
        self.register_buffer("reached", items.any(1, keepdim=True).float(), persistent=False)
        self.register_buffer("content", content, persistent=False)
        self.user_table, self.served = None, None
        if config.reasoning:
            users = _users(data, interactions, content)
            self.register_buffer("users", users, persistent=False)
            self.served = users.any(1).numpy()
        else:
            self.user_table = xavier_table(data.n_users, content.shape[1])
        self.user_network = network(content.shape[1], config, bias=True)
        self.item_network = network(content.shape[1], config, bias=False)
        self.graph = None
        if config.user_graph:
            self.graph = SparseMatrix(symmetric_normalized(bipartite(interactions)))
            self._degrees = interactions.sum(0)

    def _propagated(self, content: Tensor, texts: Features, data: TrainingData) -> Tensor:
        """Returns e* of all items; shape [I, d_t]."""
        config = self.config
        if not config.item_graph:
            return content
        audience = None
        if config.enhancement:
            audience = audience_of(data, config.audience_neighbors, texts.cache)
        threshold = config.threshold if config.denoising else None
        graph = symmetric_normalized(
            refined_graph(neighbors_of(texts, config.neighbors), threshold, audience)
        )
        layer = total = content.numpy()
        for _ in range(config.item_layers):
            layer = graph @ layer
            total = total + layer
        return torch.from_numpy(total)

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns h of all users [U, d] and of all items [I, d]."""
        users = self.users if self.user_table is None else self.user_table.weight
        return self._with_user_graph(
            self._map_users(users), self._map_items(self.items, self.reached, without)
        )

    def _map_users(self, content: Tensor) -> Tensor:
        """Maps e_u [..., d_t] to h_u [..., d]; zero stays zero."""
        return self.user_network(content) * content.any(-1, keepdim=True)

    def _map_items(self, content: Tensor, reached: Tensor, without: Without) -> Tensor:
        mapped = self.item_network(content) * reached
        return torch.zeros_like(mapped) if "text" in without else mapped

    def _with_user_graph(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            return users, items
        scaled = F.normalize(users), F.normalize(items)
        of_users, of_items = mean_of_layers(self.graph, *scaled, _USER_LAYERS)
        return users + (_USER_LAYERS + 1) * of_users, items + (_USER_LAYERS + 1) * of_items

    @torch.no_grad()
    def fold_in(self, interactions: sparse.csr_array, *, without: Without = ()) -> Tensor:
        """Returns h of users whom neither training nor a text knows, from the texts of their items; [B, d].

        With --no-reasoning, nothing is known of them: zero.
        """
        if self.user_table is not None:
            return self.content.new_zeros(interactions.shape[0], self.config.width)
        mapped = self._map_users(_mean_texts(interactions, self.content.cpu()).to(self.content.device))
        if self.graph is None:
            return mapped
        users, items = self.users, self._map_items(self.items, self.reached, without)
        scaled = F.normalize(self._map_users(users)), F.normalize(items)
        edges = SparseMatrix(symmetric_edges(trained_only(interactions, self._degrees), self._degrees))
        read = fold_in(self.graph, *scaled, _USER_LAYERS, edges.to(items.device))
        return mapped + F.normalize(mapped) + (_USER_LAYERS + 1) * read

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs."""
        codes = item_codes(batch)
        if self.graph is not None:
            users, items = self.vectors(without=without)
            return compare(F.embedding(batch.users, users), F.embedding(codes, items), criterion)
        table = self.users if self.user_table is None else self.user_table.weight
        users = self._map_users(F.embedding(batch.users, table))
        items = self._map_items(self.items[codes], self.reached[codes], without)
        return compare(users, items, criterion)


def network(width: int, config: MLLMRecConfig, *, bias: bool) -> nn.Sequential:
    """Returns the network of eq. 14; `bias`: of its last layer."""
    layers = nn.Sequential(
        nn.Linear(width, config.hidden), nn.LeakyReLU(0.01), nn.Linear(config.hidden, config.width, bias)
    )
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layers


def _users(data: TrainingData, interactions: sparse.csr_array, content: Tensor) -> Tensor:
    """Returns e_u: of a user's text, else of the texts of the user's training items; shape [U, d_t]."""
    texts = data.user_features
    if texts is None:
        raise DataError(
            "MLLMRec needs texts about users: give --user-text preference, which `recllm build users DATASET "
            "--system mllmrec` writes; or --no-reasoning for learned vectors"
        )
    if texts.vectors.shape[1] != content.shape[1]:
        raise DataError(
            f"vectors of users' texts have the width {texts.vectors.shape[1]}, those of items' texts "
            f"{content.shape[1]}; expected one encoder for both (--text with texts, not a file of vectors)"
        )
    users = torch.from_numpy(texts.vectors) * torch.from_numpy(texts.present)[:, None]
    without = (~texts.present).nonzero()[0]
    users[without] = _mean_texts(interactions[without], content)
    return users


def _mean_texts(interactions: sparse.csr_array, content: Tensor) -> Tensor:
    """Returns the mean vector of those items [B, I] that have a text; shape [B, d_t]."""
    known = sparse.csr_array(interactions @ sparse.diags_array(content.any(1).numpy().astype("float32")))
    known.eliminate_zeros()
    return torch.from_numpy(row_normalized(known) @ content.numpy())
