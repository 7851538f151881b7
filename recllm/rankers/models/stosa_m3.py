"""STOSA with multimodal expert embeddings: the backbone that REVEAL (arXiv 2606.09082) trains as "M3SRec".

It is no M3SRec (Bian et al., CIKM 2023); the release adds an embedding layer to STOSA (`stosa`, whose layers,
loss and scores are used as they are). For the mean and for the covariance, each with weights of its own, let
e_id embed an item's number and e_text, e_image map its frozen vectors linearly to the width d:

    o    = sum_k softmax(G [e_id; e_text; e_image])_k E_k([e_id; e_text; e_image])     2 shared experts
    o_m  = sum_k softmax(G_m e_m)_k E_{m,k}(e_m + o)                                   4 experts of modality m
    a    = softmax(A [o; o_id; o_text; o_image])                                       A: 4 d to 4
    x    = e_id + e_text + e_image + a_0 o + a_1 o_id + a_2 o_text + a_3 o_image + p   p of the position

    mean       = ELU(Dropout(LayerNorm(x)))
    covariance = ELU(Dropout(LayerNorm(x))) + 1

E is Linear, GELU, Linear; G is Linear to d / 4, GELU (ours), Linear. Candidates are the Gaussians of e_id
alone, as in the release: text and image matter in what was read, and not in what is ranked.

Shapes: items [B, T]; e, o and x [B, T, d]; states [B, T, 2 d + 1], items' vectors [I, 2 d + 1] as in STOSA.

Loss: STOSA's, -log sigma(d(s, n) - d(s, p)) + weight * max(0, d(s, p) - d(p, n)).

Repaired: the release takes the softmax a over features, reads it at positions 0 to 3, mixes the experts of
position 0 alone, which is padding for most users, and adds the result to each of a fixed 100 positions; here
each position has its own, at any length. Its mean stream sees no context, and its negatives avoid held-out
items (see `stosa`).
Ours: the vectors of text and image stay frozen, where the release trains copies of them; an item that lacks a
modality, or has it projected to zero, has no o_m of it (its share of a is 0); the covariance has one dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.layers import Projection
from recllm.rankers.models.m3srec import ExpertMixture
from recllm.rankers.models.stosa import STOSA, STOSAConfig, as_state, init_gaussian, positive
from recllm.rankers.ranker import Without
from recllm.rankers.training_data import TrainingData


@dataclass(frozen=True)
class STOSAM3Config(STOSAConfig):
    """Sizes of STOSA with multimodal expert embeddings; the defaults are those of REVEAL's release."""

    width: int = 256
    """d: width of a mean and of a covariance."""
    shared_experts: int = 2
    """Experts that read all modalities."""
    experts: int = 4
    """Experts of each modality."""


class ModalityExperts(nn.Module):
    """What experts add to the embedding of an item, for means or for covariances."""

    def __init__(self, names: tuple[str, ...], width: int, shared: int, own: int) -> None:
        super().__init__()
        every = len(names) * width
        self.shared = ExpertMixture(every, width, width, shared, _router(every, width // 4, shared))
        self.own = nn.ModuleDict(
            {name: ExpertMixture(width, width, width, own, _router(width, width // 4, own)) for name in names}
        )
        self.weights = nn.Linear(every + width, len(names) + 1)

    def forward(self, embedded: dict[str, Tensor], without: Without = ()) -> Tensor:
        """Maps the modalities' embeddings, each [..., width], to [..., width]; those left out are zero."""
        common = self.shared(torch.cat(list(embedded.values()), -1))
        outputs, there = [common], [torch.ones_like(common[..., 0], dtype=torch.bool)]
        for name, part in embedded.items():
            there.append(part.any(-1))
            if name in without:
                outputs.append(torch.zeros_like(common))
            else:
                outputs.append(self.own[name](part + common, routed=part) * there[-1][..., None])
        logits = self.weights(torch.cat(outputs, -1))
        shares = logits.masked_fill(~torch.stack(there, -1), -torch.inf).softmax(-1)
        return torch.einsum("...m,...md->...d", shares, torch.stack(outputs, -2))


class STOSAM3(STOSA):
    """Reads a sequence of Gaussians of what items are, look and read like; foretells the next by distance."""

    Config: ClassVar[type] = STOSAM3Config
    modalities = ("text", "image")
    modality_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        name: (name, f"mean_experts.own.{name}", f"covariance_experts.own.{name}") for name in modalities
    }

    def __init__(self, data: TrainingData, config: STOSAM3Config | None = None) -> None:
        config = config or STOSAM3Config()
        super().__init__(data, config)
        for name in self.modalities:
            if name not in data.features:
                raise DataError(f"stosa_m3 needs vectors of the items' {name}s; give --{name}")
        # Means and covariances side by side: two linear maps that share the frozen vectors.
        self.text = Projection(data.features["text"], 2 * config.width)
        self.image = Projection(data.features["image"], 2 * config.width)
        sizes = (("id", *self.modalities), config.width, config.shared_experts, config.experts)
        self.mean_experts, self.covariance_experts = ModalityExperts(*sizes), ModalityExperts(*sizes)
        init_gaussian(self)

    def forward(self, batch: Batch, *, without: Without = ()) -> Tensor:
        """Returns the state after each item; shape [B, T, 2 d + 1]."""
        numbers, places = batch.items.unique(return_inverse=True)  # an item is the same wherever it stands
        means, covariances = self._embedded(numbers, without)
        place = torch.arange(batch.items.shape[1], device=batch.items.device)
        mean = F.embedding(places, means) + self.mean_positions(place)
        covariance = F.embedding(places, covariances) + self.covariance_positions(place)
        mean = F.elu(self.dropout(self.mean_norm(mean)))
        covariance = positive(self.dropout(self.covariance_norm(covariance)))
        for block in self.blocks:
            mean, covariance = block(mean, covariance)
        return as_state(mean, covariance)

    def _embedded(self, numbers: Tensor, without: Without) -> tuple[Tensor, Tensor]:
        """Returns x without positions of item numbers [n], for means and for covariances; each [n, d]."""
        text = self.text(numbers, zeroed="text" in without).chunk(2, -1)
        image = self.image(numbers, zeroed="image" in without).chunk(2, -1)
        number = self.means(numbers), self.covariances(numbers)
        found = []
        for experts, *parts in zip(
            (self.mean_experts, self.covariance_experts), number, text, image, strict=True
        ):
            embedded = dict(zip(("id", *self.modalities), parts, strict=True))
            found.append(sum(embedded.values(), experts(embedded, without)))
        return found[0], found[1]


def _router(inputs: int, inner: int, experts: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, inner), nn.GELU(), nn.Linear(inner, experts))
