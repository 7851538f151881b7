"""MISSRec: Multi-modal Interest-aware Sequence Representation (Wang et al., ACM MM 2023, arXiv 2308.11175).

    t_i, v_i = W_t x_i + b_t,  W_v y_i + b_v                     adapted text and image of an item
    C        = the centroids of all t_i and v_i                  interests, found before each epoch
    Q        = {the interests of t_j} and {those of v_j}         of a sequence, each interest once
    M        = LayerNorm(Block(Q))                               encoder: self-attention, no positions
    z_j      = Dropout(LayerNorm(t_j + v_j + e_j + p_j))         e_j embeds the item, p_j its position
    H        = LayerNorm(Layer(z, M))                            decoder: both-sided self-attention, attention
                                                                 to M, network; post-norm, GELU
    s        = H_last / |H_last|                                 the last layer computes this place alone

    a        = w cos(s, t_i) + (1 - w) cos(s, v_i),   w = softmax(f [cos(s, t_i), cos(s, v_i)])_1
    score    = (cos(s, e_i) + 2 a) / 3 / tau                     a / tau where not transductive

f is learned from 0, the plain mean: which modality counts depends on the user and the candidate.

Shapes: items [B, T], interests [B, N], M [B, N, d], states [B, d], items' vectors [I, 3 d] = [t, v, e], each
normalized; [I, 2 d] where not transductive.

Loss: cross-entropy over the whole catalog + weight * mean over the rows of |sum over Q of M|^2 / d. As a
LayerNorm has settled the norm of each row of M, the second term sets a user's interests apart.

Repaired: the release clusters the absolute values of all coordinates, stops after one pass because it
compares the centroids with themselves, and draws those without points toward zero; it counts padding in the
second term and as an item in the cross-entropy.
Ours: that term is a mean over rows, where the release sums 512 of them with weight 1e-4; an item that lacks a
modality is scored by the other alone, and has no interest of it. The release also multiplies the sum of M by
the share of the row that is no padding; here a row has none. Without the paper's pre-training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.clustering import dpc_knn, minibatch_kmeans
from recllm.rankers.criteria import Criterion
from recllm.rankers.layers import Block, CrossAttention, Dropout, Projection, init_normal
from recllm.rankers.ranker import SequenceRanker, Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class MISSRecConfig:
    """Sizes of MISSRec."""

    transductive: bool = True
    """Also gives each item an embedding by its number."""
    width: int = 300
    """d: width of tokens, interests and states."""
    layers: int = 1
    """Layers of the encoder, and of the decoder."""
    heads: int = 4
    """Attention heads."""
    inner: int = 256
    """Width within a layer's network."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.5
    """Of embeddings, attention and networks."""
    clustering: Literal["k-means", "dpc-knn"] = "k-means"
    """How interests are found: mini-batch k-means, or density peaks."""
    interest_share: float = 0.5
    """Interests for each adapted vector."""
    passes: int = 5
    """Most passes of k-means."""
    interest_weight: float = 0.05
    """Weight of the loss's second term."""
    temperature: float = 0.07
    """tau: cosines are divided by it."""


class DecoderBlock(nn.Module):
    """A decoder layer: attention to the items, to the interests, and a network, each in a residual."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.items, self.interests = (CrossAttention(width, heads, dropout) for _ in range(2))
        self.expand, self.contract = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, items: Tensor, known: Tensor, interests: Tensor, real: Tensor) -> Tensor:
        """Maps places x [B, N, width], which read items [B, T, width] and interests [B, M, width].

        `known` [B, T] and `real` [B, M] say which there are.
        """
        x = self.norms[0](x + self.dropout(self.items(x, items, known)))
        x = self.norms[1](x + self.dropout(self.interests(x, interests, real)))
        inner = self.dropout(F.gelu(self.expand(x)))
        return self.norms[2](x + self.dropout(self.contract(inner)))


class MISSRec(SequenceRanker):
    """Reads a sequence in the light of the interests that its texts and images belong to."""

    Config: ClassVar[type] = MISSRecConfig
    examples = "next"
    losses = ("ce",)
    modalities = ("text", "image")
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {"text": ("text",), "image": ("image",)}

    def __init__(self, data: TrainingData, config: MISSRecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MISSRecConfig()
        for name in self.modalities:
            if name not in data.features:
                raise DataError(f"MISSRec needs vectors of the items' {name}s; give --{name}")
        width, dropout = config.width, config.dropout
        self.text = Projection(data.features["text"], width)
        self.image = Projection(data.features["image"], width)
        self.items = nn.Embedding(data.n_items + 1, width, padding_idx=0) if config.transductive else None
        self.positions = nn.Embedding(config.length, width)
        self.norm, self.dropout = nn.LayerNorm(width), Dropout(dropout)
        sizes = (width, config.heads, config.inner, dropout)
        self.encoder = nn.ModuleList(Block(*sizes) for _ in range(config.layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderBlock(*sizes) for _ in range(config.layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.fusion = nn.Parameter(torch.zeros(()))
        init_normal(self)

        tokens = sum(int(data.features[name].present.sum()) for name in self.modalities)
        count = math.ceil(config.interest_share * tokens)
        self.register_buffer("centroids", torch.zeros(count + 1, width))
        for name in self.modalities:
            self.register_buffer(f"{name}_interests", torch.zeros(data.n_items + 1, dtype=torch.int64))
        self._find_interests(np.random.default_rng(0), passes=0)  # so that there are some before training

    def begin_epoch(self, random: np.random.Generator) -> None:
        """Finds the interests anew, as the adapters have moved."""
        self._find_interests(random, self.config.passes)

    @torch.no_grad()
    def _find_interests(self, random: np.random.Generator, passes: int) -> None:
        """Clusters the adapted vectors of all items that have the modality; interest 0 is none."""
        here = [self.text.features.present[:, 0] > 0, self.image.features.present[:, 0] > 0]
        tokens = torch.cat([self.text()[here[0][1:]], self.image()[here[1][1:]]])
        count = len(self.centroids) - 1
        if self.config.clustering == "dpc-knn":
            found = dpc_knn(tokens, count)
        else:
            batch = max(2048, math.ceil(1.1 * count))
            found = minibatch_kmeans(tokens, count, random, passes=passes, batch=batch)
        self.centroids[1:] = found.centroids
        of_text, of_image = (found.labels + 1).split([int(each.sum()) for each in here])
        self.text_interests[here[0]], self.image_interests[here[1]] = of_text, of_image

    def states(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the normalized state of each user; shape [B, d]."""
        return self._read(batch, without)[0]

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the normalized vectors of all items, [t, v, e] side by side; shape [I, 3 d] or [I, 2 d]."""
        parts = [self.text(zeroed="text" in without), self.image(zeroed="image" in without)]
        if self.items is not None:
            parts.append(self.items.weight[1:])
        return torch.cat([F.normalize(part, dim=-1) for part in parts], -1)

    def score(self, states: Tensor, items: Tensor) -> Tensor:
        """Returns the scores [B, I] by the fusion that state and candidate call for."""
        text, image, *by_number = items.split(states.shape[-1], -1)
        text_cosine, image_cosine = states @ text.T, states @ image.T
        apart = text_cosine - image_cosine
        share = torch.sigmoid(self.fusion * apart)
        share = share.masked_fill(~image.any(-1), 1.0).masked_fill(~text.any(-1), 0.0)
        agreement = image_cosine + share * apart
        if by_number:
            agreement = (states @ by_number[0].T + 2 * agreement) / 3
        return agreement / self.config.temperature

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares each row's state with the item that came next, and sets its interests apart."""
        read = [(self._read(part, without), part) for _, part in batch.by_length()]
        states = torch.cat([state for (state, _), _ in read])
        overlap = torch.cat([overlap for (_, overlap), _ in read])
        targets = torch.cat([part.targets[part.targets > 0] - 1 for _, part in read])
        compared = criterion(states, self.item_vectors(without=without), targets, score=self.score)
        return compared + self.config.interest_weight * overlap.mean()

    def _read(self, batch: Batch, without: Without) -> tuple[Tensor, Tensor]:
        """Returns the states [B, d], and the loss's second term of each row [B]."""
        text = self.text(batch.items, zeroed="text" in without)
        image = self.image(batch.items, zeroed="image" in without)
        interests = distinct(
            torch.cat(
                [
                    self.text_interests[batch.items] * text.any(-1),
                    self.image_interests[batch.items] * image.any(-1),
                ],
                1,
            )
        )
        real = interests > 0
        memory, attended = self.centroids[interests], _at_least_one(real)
        for block in self.encoder:
            memory = block(memory, attended)
        memory = self.encoder_norm(memory)

        tokens = text + image + self.positions(torch.arange(text.shape[1], device=text.device))
        if self.items is not None:
            tokens = tokens + self.items(batch.items)
        x, known = self.dropout(self.norm(tokens)), _at_least_one(batch.known)
        *blocks, block = self.decoder
        for each in blocks:
            x = each(x, x, known, memory, attended)
        rows, last = torch.arange(len(batch), device=x.device), (batch.lengths - 1).clamp(min=0)
        x = block(x[rows, last, None], x, known, memory, attended)
        state = self.decoder_norm(x[:, 0])
        overlap = (memory * real[..., None]).sum(1).square().sum(-1) / self.config.width
        return F.normalize(state, dim=-1), overlap


def distinct(numbers: Tensor) -> Tensor:
    """Keeps each number above 0 of a row once, in falling order, padded with 0; [B, N] to [B, at most N]."""
    ordered = numbers.sort(1, descending=True).values
    again = ordered[:, 1:] == ordered[:, :-1]
    once = (
        torch.cat([ordered[:, :1], ordered[:, 1:].masked_fill(again, 0)], 1).sort(1, descending=True).values
    )
    return once[:, : max(int((once > 0).sum(1).max()), 1)]


def _at_least_one(mask: Tensor) -> Tensor:
    """Lets a row of nothing attend to its first place, so that its numbers are finite."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return mask | (first & ~mask.any(1, keepdim=True))
