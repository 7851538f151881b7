"""HM4SR: Hierarchical Time-Aware Mixture of Experts for Multi-Modal Sequential Recommendation (Zhang et al.,
WWW 2025, arXiv 2501.14269).

An item j of a sequence has three vectors, each with the same position added: x_id = E_j, x_text and x_image
by a linear map of its frozen features. Three streams of them are read side by side.

    c   = [x_id; x_text; x_image]
    x_m = x_m + w_m sum_k softmax(G_m x_m)_k  expert_k(c)_m   interactive mixture, w starts at (0, 1, 1)
    b_j = floor(100 log2(seconds since item j - 1, plus 1))    interval, 0 for the first item
    a_j = cos((w t_j + b) * 10000^(-i/d))                      absolute time
    x   = sum_k softmax(R [B_b; a])_k  [x_id; x_text; x_image] * v_k   temporal mixture, v_k in R^3d
    h_m = Transformer_m(Dropout(LayerNorm(x_m)))               causal, post-norm, one for each stream
    r_i = h_id . E_i + h_text . x_text_i + h_image . x_image_i

Shapes: items and days [B, T]; states and items' vectors have width 3 d, in the order id, text, image.

Loss: cross-entropy, and with a weight each
    IDCL  in-batch contrast of h_id and E of the target, by cosine;
    CP    binary cross-entropy of all categories of each item of the sequences, from [E; x_text; x_image];
          left out where the catalog has no categories;
    PCL   in-batch contrast of h_m with that of a sequence in which 3 of 10 tokens are placeholders
          P_m [B_b; a], mean over text and image.
The logit of another row with the same target is 0, whatever their cosine, as in the release.

Ours: cross-entropy at all positions, where the paper trains on all prefixes (with causal encoders, the same
within a window, up to weights); IDCL and PCL take one prefix of each row, drawn anew each epoch. Draws come
from a hash of epoch and row, so that no other row moves them. Without a modality its stream is not read: it
meets only zeros in r, and PCL leaves it out.
Repaired: in the release the temporal experts are no parameters, so that they are neither trained nor saved;
intervals at padding are logarithms of negative numbers; CP reads single numbers of the wrong rows and
columns; absolute time is the cosine of seconds since 1970, which is noise: here t is 0 at the first and 1 at
the last training interaction, and w starts from N(0, 2 pi). Intervals longer than any in training share the
last bucket. For an interaction without a time a = 0, and b = 0 for it and for the item after it.
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
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.layers import Block, Dropout, Projection, init_normal
from recllm.rankers.ranker import SequenceRanker, Without, check_needs
from recllm.rankers.training_data import SECONDS_A_DAY, Histories, TrainingData


@dataclass(frozen=True)
class HM4SRConfig:
    """Sizes of HM4SR, and the weights of its losses."""

    width: int = 64
    """d: width of each stream."""
    layers: int = 2
    """Layers of each stream's Transformer."""
    heads: int = 2
    """Attention heads."""
    inner: int = 256
    """Width within a layer's network."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.5
    """Of the streams, attention and networks."""
    experts: int = 4
    """Of each of the two mixtures."""
    interval_scale: float = 100.0
    """Interval buckets for each doubling of the time between two items."""
    id_contrast: float = 1.0
    """Weight of IDCL."""
    id_temperature: float = 0.2
    """Cosines of IDCL are divided by it."""
    categories: float = 1.0
    """Weight of CP."""
    placeholder_contrast: float = 1.0
    """Weight of PCL."""
    placeholder_temperature: float = 1.0
    """Cosines of PCL are divided by it."""
    placeholders: float = 0.3
    """Share of a sequence's tokens that PCL replaces."""


class Times(nn.Module):
    """What the times of a sequence say: the interval before each item, and when it was."""

    def __init__(self, train: Histories, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        owner = np.repeat(np.arange(len(train)), np.diff(train.offsets))
        gaps = np.diff(train.days)[owner[1:] == owner[:-1]]
        largest = float(np.fmax.reduce(gaps, initial=0.0)) * SECONDS_A_DAY  # fmax passes over NaN
        self.intervals = nn.Embedding(math.floor(scale * math.log2(largest + 1)) + 1, width)
        self.span = float(np.fmax.reduce(train.days, initial=1.0))
        self.absolute = nn.Linear(1, width)
        slower = 10000.0 ** (-torch.arange(width) / width)
        self.register_buffer("slower", slower, persistent=False)

    def forward(self, days: Tensor) -> Tensor:
        """Returns [interval; absolute time] of each item; shape [B, T, 2 d].

        Args:
            days: Shape [B, T]; NaN for an item without a time.
        """
        known = days.isfinite()[..., None]
        turns = self.absolute((days.nan_to_num(0.0) / self.span)[..., None].to(self.slower.dtype))
        absolute = (turns * self.slower).cos() * known
        return torch.cat([self.intervals(self.buckets(days)), absolute], -1)

    def buckets(self, days: Tensor) -> Tensor:
        """Returns the bucket of the interval before each item; int64, shape [B, T].

        Days fall to 0 where the padding begins, so that differences are negative there. An interval with a
        time that is not known has bucket 0, as the first item's.
        """
        seconds = (days.diff(dim=1).nan_to_num(0.0) * SECONDS_A_DAY).round().clamp(min=0)
        bucket = (self.scale * (seconds + 1).log2()).floor().long()
        return F.pad(bucket, (1, 0)).clamp(max=self.intervals.num_embeddings - 1)


class Stream(nn.Module):
    """One of the three sequences: how it takes from the mixture, and how it is read."""

    def __init__(self, config: HM4SRConfig, share: float) -> None:
        super().__init__()
        width = config.width
        self.gate = nn.Linear(width, config.experts)
        self.share = nn.Parameter(torch.tensor(share))
        self.norm, self.dropout = nn.LayerNorm(width), Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.inner, config.dropout) for _ in range(config.layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reads tokens [B, T, d]; returns the state after each, [B, T, d]."""
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class ModalStream(Stream):
    """The stream of a modality."""

    def __init__(self, config: HM4SRConfig, features: Features) -> None:
        super().__init__(config, share=1.0)
        self.projection = Projection(features, config.width)
        self.placeholder = nn.Linear(2 * config.width, config.width)


class HM4SR(SequenceRanker):
    """Reads numbers, texts and images of a sequence side by side, mixed by content and by time."""

    Config: ClassVar[type] = HM4SRConfig
    modalities = ("text", "image")
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("image",), "text": ("text",)}
    needs = ("times",)

    def __init__(self, data: TrainingData, config: HM4SRConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HM4SRConfig()
        check_needs(type(self), data)
        for name in self.modalities:
            if name not in data.features:
                raise DataError(f"HM4SR needs vectors of the items' {name}s; give --{name}")
        width = config.width
        self.items = nn.Embedding(data.n_items + 1, width, padding_idx=0)
        self.positions = nn.Embedding(config.length, width)
        self.id = Stream(config, share=0.0)
        self.text, self.image = (ModalStream(config, data.features[name]) for name in self.modalities)
        self.interactive = nn.Linear(3 * width, config.experts * 3 * width)
        self.times = Times(data.train, width, config.interval_scale)
        self.route = nn.Linear(2 * width, config.experts)
        self.temporal = nn.Parameter(torch.empty(config.experts, 3 * width))
        marks = None if data.categories is None else torch.from_numpy(data.categories)
        self.register_buffer("marks", marks, persistent=False)
        self.category = None if marks is None else nn.Linear(3 * width, marks.shape[1])
        self._absent = [name for name in self.modalities if not data.features[name].present.any()]
        self._epoch = 0
        init_normal(self)
        nn.init.normal_(self.temporal, std=0.1)
        nn.init.normal_(self.times.absolute.weight, std=2 * math.pi)

    def begin_epoch(self, random: np.random.Generator) -> None:
        """Draws what this epoch's prefixes and placeholders are drawn from."""
        self._epoch = int(random.integers(2**31))

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state after each item; shape [B, T, 3 d]."""
        tokens, _ = self.tokens(batch, without)
        return self._read(tokens, without).flatten(2)

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns [E; x_text; x_image] of each item; shape [I, 3 d]."""
        text = self.text.projection(zeroed="text" in without)
        image = self.image.projection(zeroed="image" in without)
        return torch.cat([self.items.weight[1:], text, image], -1)

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """The criterion at all positions, IDCL, CP and PCL."""
        config, width = self.config, self.config.width
        items = self.item_vectors(without=without)
        parts = zip(*(self._compared(part, without) for _, part in batch.by_length()), strict=True)
        states, targets, negatives, state, replaced, target = (
            None if part[0] is None else torch.cat(part) for part in parts
        )
        loss = criterion(states, items, targets, negatives)
        to_id = contrast(state[:, 0], items[target, :width], target, config.id_temperature)
        loss = loss + config.id_contrast * to_id
        for stream, name in enumerate(self.modalities, 1):
            if name not in self._unread(without):
                term = contrast(state[:, stream], replaced[:, stream], target, config.placeholder_temperature)
                loss = loss + config.placeholder_contrast / len(self.modalities) * term
        if self.category is not None:
            loss = loss + config.categories * self.category_loss(items, batch)
        return loss

    def category_loss(self, items: Tensor, batch: Batch) -> Tensor:
        """CP: binary cross-entropy, mean over all categories of all items of the sequences."""
        codes, counts = (batch.items[batch.known] - 1).unique(return_counts=True)
        logits, marks = self.category(items[codes]), self.marks[codes].to(items.dtype)
        each = F.binary_cross_entropy_with_logits(logits, marks, reduction="none").mean(1)
        return (each * counts).sum() / counts.sum()

    def tokens(self, batch: Batch, without: Without) -> tuple[Tensor, Tensor]:
        """Returns what the Transformers read [B, T, 3, d], and times [B, T, 2 d]."""
        numbers = batch.items
        place = torch.arange(numbers.shape[1], device=numbers.device)
        text = self.text.projection(numbers, zeroed="text" in without)
        image = self.image.projection(numbers, zeroed="image" in without)
        x = torch.stack([self.items(numbers), text, image], 2) + self.positions(place)[:, None]
        experts = self.interactive(x.flatten(2)).unflatten(-1, (-1, *x.shape[2:]))
        shares = [s.share * s.gate(x[:, :, m]).softmax(-1) for m, s in enumerate(self._streams())]
        x = x + torch.einsum("btmk,btkmd->btmd", torch.stack(shares, 2), experts)
        time = self.times(batch.days)
        mixed = self.route(time).softmax(-1) @ self.temporal
        return x * mixed.view_as(x), time

    def _read(self, tokens: Tensor, without: Without) -> Tensor:
        """Returns h of each stream; shape [B, T, 3, d]."""
        read = [self.id(tokens[:, :, 0])]
        for stream, name in enumerate(self.modalities, 1):
            own = tokens[:, :, stream]
            unread = name in self._unread(without)
            read.append(torch.zeros_like(own) if unread else getattr(self, name)(own))
        return torch.stack(read, 2)

    def _unread(self, without: Without) -> set[str]:
        """Modalities whose streams are not read: those left out, and those that no item has."""
        return {*without, *self._absent}

    def _streams(self) -> tuple[Stream, Stream, Stream]:
        return self.id, self.text, self.image

    def _compared(self, batch: Batch, without: Without) -> tuple[Tensor | None, ...]:
        """What the losses compare, of rows of like length.

        Returns:
            States, targets and negatives of all positions, as `Batch.at_targets`; of a prefix of each row its
            states without and with placeholders in text and image, both [b, 3, d], and its target [b].
        """
        tokens, time = self.tokens(batch, without)
        states = self._read(tokens, without)
        place, hidden = self.drawn(batch)
        row = torch.arange(len(batch), device=place.device)
        state = states[row, place]
        replaced = [state[:, 0]]
        for stream, name in enumerate(self.modalities, 1):
            own = getattr(self, name)
            if name in self._unread(without):
                replaced.append(state[:, stream])
                continue
            some_hidden = torch.where(hidden[..., None], own.placeholder(time), tokens[:, :, stream])
            replaced.append(own(some_hidden)[row, place])
        compared = batch.at_targets(states.flatten(2))
        return *compared, state, torch.stack(replaced, 1), batch.targets[row, place] - 1

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draws a prefix of each row, and which of its tokens PCL replaces.

        Returns:
            The place of the prefix's last item, int64 [B]; the tokens, bool [B, T].
        """
        places = torch.arange(batch.items.shape[1], device=batch.items.device)
        whose = (self._epoch, batch.users[:, None], batch.items, places)
        place = hashed(*whose, 0).masked_fill(batch.targets == 0, -1).argmax(1)
        rank = hashed(*whose, 1).masked_fill(places > place[:, None], 2).argsort(1).argsort(1)
        return place, rank < (self.config.placeholders * (place + 1)).floor()[:, None]


def contrast(states: Tensor, others: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """In-batch contrast by cosine: row i of `states` [B, d] is to find row i of `others` [B, d].

    Rows with the same target [B] do not repel each other: their logit is 0.
    """
    logits = F.normalize(states, dim=1) @ F.normalize(others, dim=1).T / temperature
    same = targets[:, None] == targets
    same.fill_diagonal_(False)
    return F.cross_entropy(logits.masked_fill(same, 0), torch.arange(len(logits), device=logits.device))


def hashed(*parts: int | Tensor) -> Tensor:
    """Numbers in [0, 1) that look drawn, and depend on the integers alone; float64, of their joint shape."""
    mixed: int | Tensor = 0
    for part in parts:
        mixed = (31 * mixed + part) & 0xFFFFFFFF
        for _ in range(2):
            mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)).double() / 2**32
