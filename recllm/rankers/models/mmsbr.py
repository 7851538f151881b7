"""MMSBR: Beyond Co-occurrence: Multi-modal Session-based Recommendation (Zhang et al., TKDE 2024, arXiv
2309.17037).

An item has 4 pivots P in R^d of its own, and 4 aspects of its text and of its image, T_n = f_n(t) and
V_n = g_n(v): t and v are linear maps of the frozen features, f_n and g_n networks of two tanh layers.

    3 rounds:  P', T' = Transformer([P; T]),  P = (P + P') / 2,  T = T + T'     pivots read the text
               P', V' = Transformer([P; V]),  P = (P + P') / 2,  V = V + V'     and then the image
    x_i = ReLU(W_2 ReLU(W_1 [P_1; ...; P_4])) + W_0 [own P_1; ...; P_4]         the item
    h   = sum_j (w . sigma(W_3 x_j + W_4 mean x)) x_j                           interest, over the sequence
    (M, S)_i = price level's + mean of the categories', S = ELU(S) + 1          an item's price, a Gaussian
    (M, S)_s = Wasserstein self-attention of the sequence's prices, the latest  (as in STOSA)
    r_i = h . x_i - W2((M, S)_s, (M, S)_i)^2

Shapes: items [B, T]; state [B, d] or with prices [B, 3 d + 1], items' vectors [I, d] or [I, 3 d + 1]. Without
prices in the catalog the price part is left out, and categories with it. An item without a price is not read
by the attention, and is at the mean distance of the items; a sequence without a price has no price part.

Loss: cross-entropy, and with a small weight the contrast by cosine of v with the pseudo-image made from the
text, and of t with the pseudo-text made from the image, against the hardest negatives.

Ours: the paper's pseudo-modalities come from generative models; here a linear map each makes them, and the
contrast is among the distinct targets of a batch that have both, instead of among all pairs of items. Prices
add their distance, where the release multiplies interest by it, so that far prices count as near ones. Levels
are quantiles. f_n and g_n have no biases, so that an item without image or text adds none. W_0 is ours, and
W_2 begins at a tenth: without, training stayed at the loss of equal scores, on generated data (from the
release's initialization also) and on MovieLens. Likely what all items' vectors share crowded out their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.layers import Block, Dropout, Projection
from recllm.rankers.models.stosa import WassersteinAttention, as_item, as_state, positive
from recllm.rankers.ranker import SequenceRanker, Without
from recllm.rankers.training_data import TrainingData

BLOCK = 1024  # items whose pivots are read at a time


@dataclass(frozen=True)
class MMSBRConfig:
    """Sizes of MMSBR."""

    width: int = 64
    """d: width of pivots, aspects and prices."""
    pivots: int = 4
    """Pivots of an item."""
    aspects: int = 4
    """Aspects of a text, and of an image."""
    rounds: int = 3
    """How often pivots read text and image; two layers each."""
    heads: int = 4
    """Attention heads."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.4
    """Of aspects, and of the pivots' attention and networks."""
    item_dropout: float = 0.2
    """Of the items' vectors, and of prices."""
    price_levels: int = 100
    """Quantiles of the prices."""
    contrast: float = 0.01
    """Weight of the contrast with pseudo-modalities."""
    temperature: float = 0.2
    """Its cosines are divided by it."""
    hard_negatives: int = 100
    """Its nearest negatives, which alone count."""


class Aspects(nn.Module):
    """What a modality says of an item."""

    def __init__(self, features: Features, config: MMSBRConfig) -> None:
        super().__init__()
        self.projection = Projection(features, config.width)
        self.networks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.width, config.width, bias=False),
                nn.Tanh(),
                Dropout(config.dropout),
                nn.Linear(config.width, config.width, bias=False),
                nn.Tanh(),
                Dropout(config.dropout),
            )
            for _ in range(config.aspects)
        )

    def forward(self, numbers: Tensor, *, zeroed: bool = False) -> Tensor:
        """Returns the aspects of item numbers [n]; shape [n, aspects, d]."""
        projected = self.projection(numbers, zeroed=zeroed)
        return torch.stack([network(projected) for network in self.networks], 1)


class Prices(nn.Module):
    """Prices as Gaussians: of the items, and what a sequence says of the next one's."""

    def __init__(self, data: TrainingData, config: MMSBRConfig) -> None:
        super().__init__()
        priced = np.isfinite(data.prices)
        shares = np.arange(1, config.price_levels) / config.price_levels
        edges = np.quantile(data.prices[priced], shares)
        levels = np.searchsorted(edges, np.where(priced, data.prices, 0), side="right")
        self.register_buffer("priced", torch.from_numpy(priced), persistent=False)
        self.register_buffer("levels", torch.from_numpy(levels), persistent=False)
        self.means, self.spreads = (nn.Embedding(config.price_levels, config.width) for _ in range(2))
        self.categories = None
        if data.categories is not None:
            self.categories = nn.EmbeddingBag(data.categories.shape[1], config.width, mode="mean")
            firsts = np.concatenate([[0], data.categories.sum(1).cumsum()[:-1]])
            self.register_buffer("first", torch.from_numpy(firsts), persistent=False)
            self.register_buffer("listed", torch.from_numpy(data.categories.nonzero()[1]), persistent=False)
        self.dropout = Dropout(config.item_dropout)
        self.attention = WassersteinAttention(
            config.width, config.heads, config.item_dropout, config.item_dropout
        )

    def gaussians(self) -> tuple[Tensor, Tensor]:
        """Returns means and covariances of all items' prices [I, d]; without a price they mean nothing."""
        mean, spread = self.means(self.levels), self.spreads(self.levels)
        if self.categories is not None:
            category = self.categories(self.listed, self.first)
            mean, spread = mean + category, spread + category
        return mean, positive(spread)

    def items(self) -> Tensor:
        """Returns the items' side of the distance; shape [I, 2 d + 1]."""
        vectors = as_item(*self.gaussians())
        return torch.where(self.priced[:, None], vectors, vectors[self.priced].mean(0))

    def forward(self, batch: Batch) -> Tensor:
        """Returns the sequences' side of the distance; shape [B, 2 d + 1]."""
        mean, covariance = self.gaussians()
        rows, parts = zip(*batch.by_length(), strict=True)
        states = torch.cat([self._states(part, mean, covariance) for part in parts])
        return states[torch.cat(rows).argsort()]

    def _states(self, batch: Batch, mean: Tensor, covariance: Tensor) -> Tensor:
        codes = (batch.items - 1).clamp(min=0)
        priced = batch.known & self.priced[codes]
        codes = codes.gather(
            1, (~priced).long().argsort(dim=1, stable=True)
        )  # those without a price come last
        mean, covariance = self.attention(self.dropout(mean[codes]), self.dropout(covariance[codes]))
        latest = torch.arange(len(batch), device=codes.device), (priced.sum(1) - 1).clamp(min=0)
        return as_state(mean[latest], positive(covariance[latest])) * priced.any(1, keepdim=True)


class MMSBR(SequenceRanker):
    """Reads what items look and read like through pivots, and weighs prices."""

    Config: ClassVar[type] = MMSBRConfig
    examples = "next"
    modalities = ("text", "image")
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("image",), "text": ("text",)}

    def __init__(self, data: TrainingData, config: MMSBRConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MMSBRConfig()
        for name in self.modalities:
            if name not in data.features:
                raise DataError(f"MMSBR needs vectors of the items' {name}s; give --{name}")
        width = config.width
        self.text, self.image = (Aspects(data.features[name], config) for name in self.modalities)
        self.pivots = nn.Embedding(data.n_items, config.pivots * width)
        self.text_blocks, self.image_blocks = (
            nn.ModuleList(
                Block(width, config.heads, 4 * width, config.dropout, "relu") for _ in range(config.rounds)
            )
            for _ in range(2)
        )
        last = nn.Linear(width, width)
        self.item = nn.Sequential(
            Dropout(config.item_dropout),
            nn.Linear(config.pivots * width, width),
            nn.ReLU(),
            Dropout(config.item_dropout),
            last,
            nn.ReLU(),
            Dropout(config.item_dropout),
        )
        self.pivots_item = nn.Linear(config.pivots * width, width, bias=False)
        self.own, self.mean = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.weight = nn.Linear(width, 1)
        self.pseudo_image, self.pseudo_text = nn.Linear(width, width), nn.Linear(width, width)
        has_prices = data.prices is not None and np.isfinite(data.prices).any()
        self.prices = Prices(data, config) if has_prices else None
        for part in self.modules():
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                nn.init.uniform_(part.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(0.1)

    def states(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state of each user after the latest item; shape [B, d] or [B, 3 d + 1]."""
        numbers, places = batch.items.unique(return_inverse=True)
        items = self.fused((numbers - 1).clamp(min=0), without)
        return self._states(batch, items[places])

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the vectors of all items; shape [I, d] or [I, 3 d + 1]."""
        codes = torch.arange(self.pivots.num_embeddings, device=self.pivots.weight.device)
        items = self.fused(codes, without)
        return items if self.prices is None else torch.cat([items, self.prices.items()], -1)

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """The criterion, and the contrast of modalities with what is made from the other."""
        vectors = self.item_vectors(without=without)
        items = vectors[:, : self.config.width]
        states = self._states(batch, items[(batch.items - 1).clamp(min=0)])
        states = states[:, None].expand(-1, batch.items.shape[1], -1)
        states, targets, negatives = batch.at_targets(states)
        loss = criterion(states, vectors, targets, negatives)
        return loss + self.config.contrast * self.alignment(targets.unique(), without)

    def alignment(self, codes: Tensor, without: Without = ()) -> Tensor:
        """Contrasts texts and images with their pseudo-modalities, of the items [n] that have both."""
        present = [
            getattr(self, name).projection.features.present[codes + 1, 0] > 0 for name in self.modalities
        ]
        numbers = codes[present[0] & present[1]] + 1
        if not len(numbers):  # a gradient of zero, for the processes that do have some to average with
            parts = self.pseudo_image, self.pseudo_text, self.text.projection, self.image.projection
            return 0 * sum(each.sum() for part in parts for each in part.parameters())
        text = self.text.projection(numbers, zeroed="text" in without)
        image = self.image.projection(numbers, zeroed="image" in without)
        options = self.config.temperature, self.config.hard_negatives
        to_image = hard_contrast(image, self.pseudo_image(text), *options)
        return to_image + hard_contrast(text, self.pseudo_text(image), *options)

    def _states(self, batch: Batch, items: Tensor) -> Tensor:
        """States of sequences whose items' vectors are [B, T, d]."""
        known = batch.known[..., None]
        mean = (items * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        weights = self.weight(torch.sigmoid(self.own(items) + self.mean(mean)))
        interest = (weights * known * items).sum(1)
        return interest if self.prices is None else torch.cat([interest, self.prices(batch)], -1)

    def fused(self, codes: Tensor, without: Without) -> Tensor:
        """Returns x of item codes [n]; shape [n, d].

        For gradients, blocks are computed again in the backward pass: memory is that of a block.
        """
        blocks = codes.split(BLOCK)
        if not torch.is_grad_enabled():
            return torch.cat([self._fused(block, without) for block in blocks])
        return torch.cat([checkpoint(self._fused, block, without, use_reentrant=False) for block in blocks])

    def _fused(self, codes: Tensor, without: Without) -> Tensor:
        count = self.config.pivots
        own = self.pivots(codes)
        pivots = own.unflatten(-1, (count, -1))
        text = self.text(codes + 1, zeroed="text" in without)
        image = self.image(codes + 1, zeroed="image" in without)
        everything = torch.ones(len(codes), count + text.shape[1], dtype=torch.bool, device=codes.device)
        for of_text, of_image in zip(self.text_blocks, self.image_blocks, strict=True):
            read = of_text(torch.cat([pivots, text], 1), everything)
            pivots, text = (pivots + read[:, :count]) / 2, text + read[:, count:]
            read = of_image(torch.cat([pivots, image], 1), everything)
            pivots, image = (pivots + read[:, :count]) / 2, image + read[:, count:]
        return self.item(pivots.flatten(1)) + self.pivots_item(own)


def hard_contrast(vectors: Tensor, others: Tensor, temperature: float, negatives: int) -> Tensor:
    """Contrast by cosine, in which row i of `vectors` [n, d] is to find row i of `others` [n, d].

    Only the `negatives` nearest other rows count.
    """
    cosines = F.normalize(vectors, dim=1) @ F.normalize(others, dim=1).T / temperature
    itself = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    own = cosines.diagonal()[:, None]
    hardest = cosines.masked_fill(itself, -torch.inf).topk(min(negatives, len(cosines) - 1)).values
    return (torch.cat([own, hardest], 1).logsumexp(1) - own[:, 0]).mean()
