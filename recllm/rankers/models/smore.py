"""SMORE: Spectrum-based Modality Representation Fusion GCN (Ong and Khong, WSDM 2025, arXiv 2412.14978).

With F the real Fourier transform along the d features (orthonormal) and learned complex filters w:

    x_m    = W_m f_i + b_m,  m in {text, image}
    c_m    = F^-1( F(x_m) * w_m )                       denoised modality
    c_f    = F^-1( F(x_text) * F(x_image) * w_f )       fusion: a circular convolution of all three
    v_m    = S_m ( E_items * sigmoid(G_m c_m) ),  m in {text, image, f};   v of users: R~ v
    e      = mean of the layers 0 .. L of LightGCN over the interactions
    a_m    = softmax over the d features of Q_m(v_f), m in {text, image};  a_f = 1
    s      = mean over m of  Dropout(sigmoid(P_m e)) * a_m * v_m
    user, item = e + s;   y^_{ui} = user . item
    loss   = BPR + lambda / (2 B) sum of squares of the batch's vectors
             + mu ( InfoNCE(s_i, e_i) + InfoNCE(s_u, e_u) ), cosines over the temperature, in the batch

S_m: each item's k nearest by the raw features, cosines as weights, D^-1/2 S D^-1/2. S_f has the edges of
both, with the larger weight. With --refine, S_m is MLLMRec's (see `item_graphs`). R~ = D_u^-1/2 R D_i^-1/2.

Shapes: e, s, v [U + I, d]; users [U, d], items [I, d]; filters [d / 2 + 1, 2] (real and imaginary part).

The fusion is a product of two spectra, so both modalities are needed. Without a modality its edges are gone:
v_m = 0, and S_f is the graph of the other. An item without a modality has x_m = 0 and no edges in S_m.
Raw features stay frozen (the release trains a copy of them, which its graphs do not follow).
Q_m is two linear maps with a tanh between.
Ours: a user whom training did not know has e as in `lightgcn` and v from a row of R~ of its own, and s from
these; negative cosines are no edges; the learning rate is constant (in the release it falls by 4 % every 50
epochs), and the recipe's is 5e-3: at 1e-3 it stayed at chance on MovieLens for 22 epochs, as long as the
contrast had a part; the likely reason is that short vectors get more gradient from it than from BPR.
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
    degree_normalized,
    fold_in,
    interaction_matrix,
    mean_of_layers,
    symmetric_edges,
    symmetric_normalized,
    trained_only,
)
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.item_graphs import RefinementConfig, item_graph
from recllm.rankers.layers import Dropout
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
class SMOREConfig(RefinementConfig):
    """Sizes of SMORE."""

    width: int = 64
    """d: width of users, items and projected features."""
    layers: int = 3
    """L: propagations over the interactions."""
    text_neighbors: int = 10
    """k of the text's item graph, the item itself included."""
    image_neighbors: int = 10
    """k of the image's item graph, the item itself included."""
    dropout: float = 0.0
    """Of the preferences sigmoid(P_m e)."""
    regularization: float = 1e-4
    """lambda: weight of half the squares of a batch's vectors of users and items, per pair."""
    contrast: float = 0.01
    """mu: weight of the contrast of what items say with what users did."""
    temperature: float = 0.2
    """Of the contrast."""


class SMORE(PairRanker):
    """LightGCN, plus three views of the items' content: text, image and the fusion of their spectra."""

    Config: ClassVar[type] = SMOREConfig
    folds_in = True
    modalities = MODALITIES
    modality_parts: ClassVar = {"text": ("text",), "image": ("image",)}

    def __init__(self, data: TrainingData, config: SMOREConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SMOREConfig()
        self.users = xavier_table(data.n_users, config.width)
        self.items = xavier_table(data.n_items, config.width)
        content = content_of(data, "SMORE", needed=MODALITIES)
        self.text = ModalityView(content["text"], config)
        self.image = ModalityView(content["image"], config)
        self.fusion = View(config)
        text = item_graph(content["text"], config.text_neighbors, data, config, weighted=True)
        image = item_graph(content["image"], config.image_neighbors, data, config, weighted=True)
        self.graph_of_text, self.graph_of_image = SparseMatrix(text), SparseMatrix(image)
        self.graph_of_both = SparseMatrix(text.maximum(image))
        touched = interaction_matrix(*data.pairs(), data.n_users, data.n_items)
        self.graph = SparseMatrix(symmetric_normalized(bipartite(touched)))
        self.of_users = SparseMatrix(degree_normalized(touched))
        self._degrees = touched.sum(0)

    def vectors(self, *, without: Without = ()) -> tuple[Tensor, Tensor]:
        """Returns the vectors of users [U, d] and of items [I, d]."""
        behavior, *views = self._behavior_and_views(without)
        both = behavior + self._side(behavior, *views)
        return both[: len(self.users.weight)], both[len(self.users.weight) :]

    def fold_in(self, interactions: sparse.csr_array, *, without: Without = ()) -> Tensor:
        """Returns the vectors of users outside the graph of interactions; shape [B, d]."""
        users, items = self.users.weight, self.items.weight
        edges = SparseMatrix(symmetric_edges(trained_only(interactions, self._degrees), self._degrees))
        edges = edges.to(items.device)
        _, *views = self._behavior_and_views(without)
        behavior = fold_in(self.graph, users, items, self.config.layers, edges)
        return behavior + self._side(behavior, *(edges(view[len(users) :]) for view in views))

    def _behavior_and_views(self, without: Without) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns e, v_text, v_image and v_f, users first; each [U + I, d]."""
        behavior = mean_of_layers(self.graph, self.users.weight, self.items.weight, self.config.layers)
        text = self.text.projection(zeroed="text" in without)
        image = self.image.projection(zeroed="image" in without)
        return (
            torch.cat(behavior),
            self._view(self.text, denoise(text, self.text.filter), self._graph("text", without)),
            self._view(self.image, denoise(image, self.image.filter), self._graph("image", without)),
            self._view(self.fusion, fuse(text, image, self.fusion.filter), self._graph("both", without)),
        )

    def _side(self, behavior: Tensor, text: Tensor, image: Tensor, fused: Tensor) -> Tensor:
        """Returns s of users and items, from their rows of e, v_text, v_image and v_f; each [nodes, d]."""
        views = (
            self.text.preference(behavior) * self.text.attention(fused) * text,
            self.image.preference(behavior) * self.image.attention(fused) * image,
            self.fusion.preference(behavior) * fused,
        )
        return sum(views) / len(views)

    def _graph(self, which: str, without: Without) -> SparseMatrix | None:
        if which != "both":
            return None if which in without else self.get_submodule(f"graph_of_{which}")
        left = [modality for modality in MODALITIES if modality not in without]
        if len(left) == 2:
            return self.graph_of_both
        return self.get_submodule(f"graph_of_{left[0]}") if left else None

    def _view(self, view: View, content: Tensor, graph: SparseMatrix | None) -> Tensor:
        """Returns v_m, users first; shape [U + I, d]."""
        if graph is None:
            return content.new_zeros(len(self.users.weight) + len(content), content.shape[1])
        items = graph(self.items.weight * torch.sigmoid(view.gate(content)))
        return torch.cat([self.of_users(items), items])

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares the batch's pairs, keeps their vectors small, and ties content to behavior."""
        codes = item_codes(batch)
        nodes = torch.cat([batch.users, codes.flatten() + len(self.users.weight)])
        behavior, *views = (F.embedding(nodes, each) for each in self._behavior_and_views(without))
        side = self._side(behavior, *views)
        users, items = (behavior + side).split([len(batch), codes.numel()])
        items = items.view(*codes.shape, -1)
        contrast = sum(
            info_nce(side[rows], behavior[rows], self.config.temperature)
            for rows in (slice(0, len(batch)), slice(len(batch), None, codes.shape[1]))
        )
        return (
            compare(users, items, criterion)
            + self.config.regularization * penalty(users, items)
            + self.config.contrast * contrast
        )


class View(nn.Module):
    """What a view of the items' content has of its own: filter, gate and preference."""

    def __init__(self, config: SMOREConfig) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(config.width // 2 + 1, 2))
        self.gate = nn.Linear(config.width, config.width)
        self.preference = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Sigmoid(), Dropout(config.dropout)
        )


class ModalityView(View):
    """The view of one modality: it has a projection, and the fusion settles how much each feature counts."""

    def __init__(self, features: Features, config: SMOREConfig) -> None:
        super().__init__(config)
        self.projection = xavier_projection(features, config.width)
        self.attention = nn.Sequential(
            nn.Linear(config.width, config.width),
            nn.Tanh(),
            nn.Linear(config.width, config.width, bias=False),
            nn.Softmax(dim=-1),
        )


def denoise(content: Tensor, weights: Tensor) -> Tensor:
    """Filters vectors [I, d] in the spectrum by complex weights [d / 2 + 1, 2]; shape [I, d]."""
    spectrum = torch.fft.rfft(content, norm="ortho") * torch.view_as_complex(weights)
    return torch.fft.irfft(spectrum, n=content.shape[-1], norm="ortho")


def fuse(text: Tensor, image: Tensor, weights: Tensor) -> Tensor:
    """Multiplies the spectra of texts [I, d] and images [I, d] and filters them; shape [I, d].

    Equals their circular convolution with each other and with the filter's impulse response, over sqrt(d).
    """
    spectrum = torch.fft.rfft(text, norm="ortho") * torch.fft.rfft(image, norm="ortho")
    spectrum = spectrum * torch.view_as_complex(weights)
    return torch.fft.irfft(spectrum, n=text.shape[-1], norm="ortho")


def info_nce(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Returns how badly each row of `one` [B, d] is told from the cosines with all rows of `other` [B, d]."""
    cosines = F.normalize(one) @ F.normalize(other).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(one), device=one.device))
