"""MMSR: Adaptive Multi-Modalities Fusion in Sequential Recommendation Systems (Hu et al., CIKM 2023, arXiv
2308.15980).

A sequence is a graph. Its nodes are the distinct items, and the distinct image clusters and text clusters of
these items (k-means of the frozen features, 20 of each).

homogeneous neighbors: nodes of one kind by relation r: self, next, previous, or both ways (one came directly
    after the other, and elsewhere before it)
heterogeneous neighbors: of an item itself, its image cluster and its text cluster

    h_i = W [x_i; kind; mean position of i]   x of an item E_i, of a cluster P_m (its center)
    v_i = W_v h_i                             W_v and W_k are apart for each kind m of node
    A(x)  = softmax of LeakyReLU(a_r . (x_i * x_j)) over homogeneous neighbors
    B(x)  = softmax of LeakyReLU((W_q x_i) . (W_k x_j) / sqrt d) over heterogeneous neighbors
    o_1   = B(A(v) h) v                       homogeneous first
    o_2   = A(B(h) v) v                       heterogeneous first
    o     = sum_n softmax_n(w_2 ReLU(W_1 o_n)) o_n
    r_i   = Dropout(o of the latest item) . E_i

What is mixed first says only where the second step looks; what it takes are the nodes' own v.

Shapes: items [B, T]; nodes of each of the three kinds in T slots, slot t for what occurs first at place t;
state [B, d], items' vectors [I, d]. Loss: cross-entropy.

Repaired: in the release keys and values are overwritten by queries, and o_1 does not depend on A.
Ours: a cluster's vector is a learned map of its center (the release reduces centers and trains them freely);
one cluster for an item and modality; the products are divided by sqrt d; only items ask in B, as with one
layer nothing reads what clusters would get: the paper's links of image and text clusters have no part. An
item that lacks a modality, or is run without it, has no node of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.clustering import minibatch_kmeans, nearest
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.layers import Dropout, Projection
from recllm.rankers.ranker import SequenceRanker, Without
from recllm.rankers.training_data import TrainingData

KINDS = ("item", "text", "image")
RELATIONS = ("self", "next", "previous", "both")
PASSES = 25  # of k-means, at most


@dataclass(frozen=True)
class MMSRConfig:
    """Sizes of MMSR; the defaults are those of the authors' run on Beauty."""

    width: int = 128
    """d: width of nodes."""
    clusters: int = 20
    """Clusters of images, and of texts."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.4
    """Of nodes after attention."""
    attention_dropout: float = 0.2
    """Of attention's weights."""
    slope: float = 0.1
    """Of LeakyReLU below zero."""


@dataclass(frozen=True)
class Graph:
    """The graphs of a batch, as the latest item sees them: 3 kinds of nodes in T slots each.

    Attributes:
        slots: The slot of what is at each place, of each kind; int64, shape [B, 3, T].
        linked: Which of these an item at each place is linked to, itself among them; bool, shape [B, 3, T].
        relation: Number of the homogeneous relation to each slot of what is at the latest place, -1 for none;
            int64, shape [B, 3, T].
    """

    slots: Tensor
    linked: Tensor
    relation: Tensor


class Clusters(nn.Module):
    """Clusters of a modality: of which each item is, and a learned map of the clusters' centers."""

    def __init__(self, features: Features, clusters: int, width: int) -> None:
        super().__init__()
        vectors = torch.from_numpy(features.vectors)
        centers = cluster_centers(features.vectors[features.present], clusters)
        every = np.ones(len(centers), bool)
        self.projection = Projection(Features(centers.numpy(), every, "centers of clusters"), width)
        codes = torch.where(torch.from_numpy(features.present), nearest(vectors, centers) + 1, 0)
        self.register_buffer("codes", F.pad(codes, (1, 0)))
        frozen = self.projection.features
        for name, found in list(frozen.named_buffers()):
            frozen.register_buffer(name, found)  # saved, as another machine's k-means may end elsewhere


class MMSR(SequenceRanker):
    """Reads a sequence as a graph of items and of what they look and read like."""

    Config: ClassVar[type] = MMSRConfig
    examples = "next"
    modalities = ("text", "image")
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("image",), "text": ("text",)}

    def __init__(self, data: TrainingData, config: MMSRConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MMSRConfig()
        for name in self.modalities:
            if name not in data.features:
                raise DataError(f"MMSR needs vectors of the items' {name}s; give --{name}")
        width = config.width
        self.items = nn.Embedding(data.n_items + 1, width, padding_idx=0)
        self.text, self.image = (
            Clusters(data.features[name], config.clusters, width) for name in self.modalities
        )
        self.positions = nn.Embedding(config.length, width)
        self.kinds = nn.Parameter(torch.empty(len(KINDS), width))
        self.join = nn.Linear(3 * width, width, bias=False)
        self.relations = nn.Parameter(torch.empty(len(RELATIONS), width))
        self.query = nn.Linear(width, width, bias=False)
        self.keys, self.values = (nn.Parameter(torch.empty(len(KINDS), width, width)) for _ in range(2))
        self.order = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1, bias=False))
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(config.attention_dropout)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width))
        with torch.no_grad():
            self.items.weight[0].zero_()

    def states(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state of each user after the latest item; shape [B, d]."""
        rows, parts = zip(*batch.by_length(), strict=True)
        states = torch.cat([self._states(part, without) for part in parts])
        return states[torch.cat(rows).argsort()]

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the item table without its padding; shape [I, d]."""
        return self.items.weight[1:]

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the state of each sequence with the item that came next."""
        states = self.states(batch, without=without)[:, None].expand(-1, batch.items.shape[1], -1)
        states, targets, negatives = batch.at_targets(states)
        return criterion(states, self.item_vectors(without=without), targets, negatives)

    def _states(self, batch: Batch, without: Without) -> Tensor:
        texts, images = (
            getattr(self, name).codes[batch.items] * (name not in without) for name in self.modalities
        )
        codes = torch.stack([batch.items, texts, images], 1)
        graph = graph_of(codes)
        both = self.propagate(self._nodes(codes, graph, without), graph)
        mixed = (self.order(both).softmax(0) * both).sum(0)
        return self.dropout(mixed * (batch.lengths > 0)[:, None])

    def _nodes(self, codes: Tensor, graph: Graph, without: Without) -> Tensor:
        """h: [B, 3, T, d]."""
        vectors = torch.stack(
            [
                self.items(codes[:, 0]),
                self.text.projection(codes[:, 1], zeroed="text" in without),
                self.image.projection(codes[:, 2], zeroed="image" in without),
            ],
            1,
        )
        join_vector, join_kind, join_position = self.join.weight.split(self.config.width, 1)
        length = codes.shape[2]
        occurs = (F.one_hot(graph.slots, length) * (codes > 0)[..., None]).float().transpose(2, 3)
        positions = occurs @ F.linear(self.positions.weight[:length], join_position)
        positions = positions / occurs.sum(3, keepdim=True).clamp(min=1)
        return F.linear(vectors, join_vector) + F.linear(self.kinds, join_kind)[:, None] + positions

    def propagate(self, nodes: Tensor, graph: Graph) -> Tensor:
        """Mixes nodes [B, 3, T, d] in both orders; returns what the latest item gets, o_1 and o_2, [2, B, d].

        What it does not see is not computed: A is that of its own nodes, B that of its neighbors and its own.
        """
        values = torch.einsum("bmtd,mde->bmte", nodes, self.values)
        near, relation = nearest_first(graph.relation[:, 0])
        slots, linked = (of_places(each, near) for each in (graph.slots, graph.linked))
        seen, taken = (of_slots(each, slots) for each in (nodes, values))

        own = taken[:, :, 0]
        among_kind = self.homogeneous(own, values, graph.relation)[:, :, None] @ nodes
        weights = self.heterogeneous(among_kind, linked[:, :, :1])[:, :, 0, None]
        homogeneous_first = (weights * own).sum(1)

        across_kinds = (self.heterogeneous(seen, linked)[..., None] * taken).sum(1, keepdim=True)
        weights = self.homogeneous(across_kinds[:, :, 0], across_kinds, relation[:, None])
        heterogeneous_first = (weights @ taken[:, 0])[:, 0]
        return torch.stack([homogeneous_first, heterogeneous_first])

    def homogeneous(self, x: Tensor, others: Tensor, relation: Tensor) -> Tensor:
        """A: weights of nodes [B, M, T, d] for a node of the same kind [B, M, d]; [B, M, T]."""
        products = torch.einsum("bmd,rd,bmjd->bmrj", x, self.relations, others)
        chosen = products.gather(2, relation.clamp(min=0)[:, :, None])[:, :, 0]
        return self._weights(chosen, relation >= 0, dim=-1)

    def heterogeneous(self, x: Tensor, linked: Tensor) -> Tensor:
        """B: weights of an item and its clusters for the item; [B, 3, K] of K items' x [B, 3, K, d]."""
        keys = torch.einsum("bmkd,mde->bmke", x, self.keys)
        scores = (self.query(x[:, :1]) * keys).sum(-1) / math.sqrt(x.shape[-1])
        return self._weights(scores, linked, dim=1)

    def _weights(self, scores: Tensor, neighbors: Tensor, dim: int) -> Tensor:
        scores = F.leaky_relu(scores, self.config.slope).masked_fill(~neighbors, -torch.inf)
        return self.attention_dropout(scores.softmax(dim))


def graph_of(codes: Tensor) -> Graph:
    """Builds the graphs of sequences.

    A place without something of a kind has no part in that kind's graph. Where it is the latest, an empty
    slot is related to itself alone, and the item is not linked to it.

    Args:
        codes: What is at each place, of each kind, 0 for nothing, after the latest item too; int64, shape
            [B, 3, T].
    """
    known, length = codes > 0, codes.shape[2]
    place = torch.arange(length, device=codes.device)
    equal = codes[..., :, None] == codes[..., None, :]
    slots = torch.where(equal, place, length).amin(-1)
    latest = (known[:, 0].sum(1) - 1).clamp(min=0)
    own = of_places(slots, latest[:, None])
    here = (slots == own) & known
    after = torch.zeros_like(codes).scatter_add_(2, slots[..., 1:], (here[..., :-1] & known[..., 1:]).long())
    before = torch.zeros_like(codes).scatter_add_(
        2, slots[..., :-1], (here[..., 1:] & known[..., :-1]).long()
    )
    relation = (after > 0).long() + 2 * (before > 0)
    relation = relation.masked_fill(relation == 0, -1).scatter(2, own, 0)
    known[:, 0] = True  # an item is linked to itself, also where there is none
    return Graph(slots, known, relation)


def nearest_first(relation: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the slots of relation [B, T] with a neighbor, itself first, and their relation; both [B, K]."""
    count = int((relation >= 0).sum(1).max())
    near = ((relation >= 0).long() + (relation == 0)).argsort(dim=1, descending=True, stable=True)[:, :count]
    return near, relation.gather(1, near)


def of_places(x: Tensor, places: Tensor) -> Tensor:
    """Picks what x [B, 3, T] has at places [B, K]; [B, 3, K]."""
    return x.gather(2, places[:, None].expand(-1, x.shape[1], -1))


def of_slots(x: Tensor, slots: Tensor) -> Tensor:
    """Picks what x [B, 3, T, d] has in slots [B, 3, K]; [B, 3, K, d]."""
    return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[3]))


def cluster_centers(vectors: np.ndarray, clusters: int) -> Tensor:
    """Finds centers by k-means of distinct vectors, sorted, so that the catalog's order changes nothing.

    Args:
        vectors: float32, shape [items, width]; may be empty.
        clusters: Centers wanted.

    Returns:
        As many as wanted or as there are distinct vectors, at least one; float32, shape [centers, width].
    """
    if not len(vectors):
        return torch.zeros(1, vectors.shape[1])
    rows = np.ascontiguousarray(vectors).view(np.dtype((np.void, vectors.itemsize * vectors.shape[1])))
    distinct = torch.from_numpy(vectors[np.unique(rows, return_index=True)[1]])
    random = np.random.default_rng(0)
    return minibatch_kmeans(distinct, min(clusters, len(distinct)), random, passes=PASSES).centroids
