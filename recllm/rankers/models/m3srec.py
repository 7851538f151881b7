"""M3SRec, our own specification: Multi-modal Mixture of Experts for Sequential Recommendation.

The paper (Bian et al., CIKM 2023) names a mixture-of-experts fusion of modalities in a sequence, of which no
code is public; all that follows is ours. (What REVEAL's release calls M3SRec is `stosa_m3`.) For item i and
modality m of id, text and image, let z_{m,i} embed the item's number or map its frozen vector linearly. The
item at place j of a sequence gives the tokens

    x_{m,j} = Dropout(LayerNorm(z_{m,j} + p_j + c_m))            position and modality
    MoE(x)  = sum_k softmax(R x + r)_k (W2_k GELU(W1_k x + b1_k) + b2_k)
    Block   : y = LayerNorm(x + Dropout(Attention(x))),  LayerNorm(y + Dropout(MoE(y)))
    y_m     = Block_m(x_m)                                       within a modality, with experts of its own
    h       = Block(y_id, y_text, y_image)                       over all tokens, with shared experts
    fuse(h) = sum_m a_m h_m,  a = softmax_m(w . tanh(W h_m + b))
    s_j     = fuse(h_{id,j}, h_{text,j}, h_{image,j}),   score = s_j . fuse(z_{id,i}, z_{text,i}, z_{image,i})

A token attends to tokens of its own item and of those before it. An item that lacks a modality has no token
of it: nothing attends to it, and fusion passes over it. A modality that is projected to zero is lacking.

Shapes: items [B, T], tokens of a modality [B, T, d], of all [B, 3 T, d], states [B, T, d], items' vectors
[I, d].

Loss: cross-entropy over the whole catalog, after every item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.layers import Dropout, Projection, attention, init_normal
from recllm.rankers.ranker import SequenceRanker, Without, states_at_targets
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class M3SRecConfig:
    """Sizes of M3SRec; all ours."""

    width: int = 64
    """d: width of tokens, states and items."""
    own_layers: int = 1
    """Layers within each modality."""
    shared_layers: int = 1
    """Layers over the tokens of all modalities."""
    heads: int = 2
    """Attention heads."""
    experts: int = 4
    """Experts of a mixture."""
    inner: int = 64
    """Width within an expert."""
    length: int = 50
    """Latest items that are read."""
    dropout: float = 0.5
    """Of tokens, attention and mixtures."""


class ExpertMixture(nn.Module):
    """Two-layer networks of one input, summed by the shares that a router gives them.

    Args:
        inputs: Width of what comes in.
        inner: Width within an expert.
        outputs: Width of what comes out.
        experts: How many.
        router: Maps what comes in to [..., experts], of which the softmax is taken; linear where None.
    """

    def __init__(
        self, inputs: int, inner: int, outputs: int, experts: int, router: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.router = nn.Linear(inputs, experts) if router is None else router
        self.expand = nn.Linear(inputs, experts * inner)
        self.contract = nn.Parameter(torch.empty(experts * inner, outputs))
        self.shifts = nn.Parameter(torch.zeros(experts, outputs))
        nn.init.normal_(self.contract, std=0.02)

    def forward(self, x: Tensor, routed: Tensor | None = None) -> Tensor:
        """Maps [..., inputs] to [..., outputs]; the router reads `routed` [..., inputs] where it is given."""
        shares = self.router(x if routed is None else routed).softmax(-1)
        inner = F.gelu(self.expand(x)).unflatten(-1, (shares.shape[-1], -1))
        return (shares[..., None] * inner).flatten(-2) @ self.contract + shares @ self.shifts


class ExpertBlock(nn.Module):
    """A post-norm Transformer layer whose network is a mixture of experts."""

    def __init__(self, width: int, heads: int, inner: int, experts: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mixture = ExpertMixture(width, inner, width, experts)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Maps [B, N, width] to [B, N, width]; `allowed` [B, N, N]: which token attends to which."""
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attention(*heads, allowed[:, None], self.dropout.p if self.training else 0)
        x = self.norms[0](x + self.dropout(self.output(mixed.transpose(1, 2).flatten(2))))
        return self.norms[1](x + self.dropout(self.mixture(x)))


class Fusion(nn.Module):
    """The attention that fuses the modalities of a state, and those of an item."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.weight = nn.Linear(width, width), nn.Linear(width, 1, bias=False)

    def forward(self, parts: Tensor, there: Tensor) -> Tensor:
        """Maps [..., M, width] to [..., width]; `there` [..., M]: which of the M modalities count."""
        logits = self.weight(torch.tanh(self.hidden(parts)))[..., 0]
        nothing = ~there.any(-1, keepdim=True)  # padding: zero, and used nowhere
        shares = logits.masked_fill(~(there | nothing), -torch.inf).softmax(-1).masked_fill(nothing, 0.0)
        return torch.einsum("...m,...md->...d", shares, parts)


class M3SRec(SequenceRanker):
    """Reads a sequence by modality and across modalities, with mixtures of experts."""

    Config: ClassVar[type] = M3SRecConfig
    modalities = ("text", "image")
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("text", "own.text", "kinds.text"),
        "image": ("image", "own.image", "kinds.image"),
    }

    def __init__(self, data: TrainingData, config: M3SRecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or M3SRecConfig()
        for name in self.modalities:
            if name not in data.features:
                raise DataError(f"M3SRec needs vectors of the items' {name}s; give --{name}")
        sizes = (config.width, config.heads, config.inner, config.experts, config.dropout)
        self.items = nn.Embedding(data.n_items + 1, config.width, padding_idx=0)
        self.text = Projection(data.features["text"], config.width)
        self.image = Projection(data.features["image"], config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.own = nn.ModuleDict()
        self.kinds = nn.ParameterDict()
        for name in ("id", *self.modalities):
            self.own[name] = nn.ModuleList(ExpertBlock(*sizes) for _ in range(config.own_layers))
            self.kinds[name] = nn.Parameter(0.02 * torch.randn(config.width))
        self.shared = nn.ModuleList(ExpertBlock(*sizes) for _ in range(config.shared_layers))
        self.norm, self.dropout = nn.LayerNorm(config.width), Dropout(config.dropout)
        self.fusion = Fusion(config.width)
        init_normal(self)

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state after each item; shape [B, T, d]."""
        embedded = self._embed(batch.items, without)
        there = [part.any(-1) for part in embedded.values()]
        place = torch.arange(batch.items.shape[1], device=batch.items.device)
        tokens = []
        for (name, part), known in zip(embedded.items(), there, strict=True):
            x = self.dropout(self.norm(part + self.positions(place) + self.kinds[name]))
            allowed = attended(place, known)
            for block in self.own[name]:
                x = block(x, allowed)
            tokens.append(x)
        x, allowed = torch.cat(tokens, 1), attended(place.repeat(len(tokens)), torch.cat(there, 1))
        for block in self.shared:
            x = block(x, allowed)
        return self.fusion(torch.stack(x.chunk(len(tokens), 1), -2), torch.stack(there, -1))

    def item_vectors(self, *, without: Without = ()) -> Tensor:
        """Returns the fused embeddings of all items; shape [I, d]."""
        embedded = torch.stack(list(self._embed(None, without).values()), -2)
        return self.fusion(embedded, embedded.any(-1))

    def loss(self, batch: Batch, criterion: Criterion, *, without: Without = ()) -> Tensor:
        """Compares each position's state with the item that came next."""
        states, targets, negatives = states_at_targets(self, batch, without=without)
        return criterion(states, self.item_vectors(without=without), targets, negatives)

    def _embed(self, numbers: Tensor | None, without: Without) -> dict[str, Tensor]:
        """z of each modality that is not left out [..., d], of item numbers or of the whole catalog by code.

        Tokens of a modality that is projected to zero are lacking, so that none are made.
        """
        embedded = {"id": self.items.weight[1:] if numbers is None else self.items(numbers)}
        for name in self.modalities:
            if name not in without:
                embedded[name] = self.get_submodule(name)(numbers)
        return embedded


def attended(places: Tensor, there: Tensor) -> Tensor:
    """Says which token attends to which: itself, and those that are there and of no later item.

    Args:
        places: The place of each token's item in its row; int64, shape [N].
        there: Which tokens there are; bool, shape [B, N].

    Returns:
        Whether the first attends to the second; bool, shape [B, N, N].
    """
    itself = torch.eye(len(places), dtype=torch.bool, device=places.device)
    return (places[:, None] >= places) & there[:, None, :] | itself
