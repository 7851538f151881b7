"""Seeded sampling: a request's text depends on its seed and key, not on what else is in the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

if TYPE_CHECKING:
    from recllm.mllm.chat import Decoding


def sampling_processors(
    decoding: Decoding, keys: Sequence[bytes], device: torch.device
) -> LogitsProcessorList:
    """Returns the processors that make greedy decoding of a batch draw from its distribution.

    Temperature and top-p as usual, then noise from a generator of each request's own. Nothing is
    returned for greedy decoding.

    Args:
        decoding: The settings.
        keys: The key of the request in each row of the batch.
        device: Where the logits are. CPU and accelerator have different generators and so give different
            texts.
    """
    if decoding.temperature == 0:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(decoding.temperature))]
    if decoding.top_p < 1:
        processors.append(TopPLogitsWarper(decoding.top_p))
    return LogitsProcessorList([*processors, ExponentialRace(decoding.seed, keys, device)])


class ExponentialRace(LogitsProcessor):
    """Divides probabilities by exponential noise, so that a row's argmax is an exact sample.

    This is the Gumbel-max trick without its logarithms: argmax(log p - log e) is argmax(p / e). Each row
    draws as many numbers as there are tokens at each step, from its own generator; in float64, for float32
    has too few small numbers for rare tokens.
    """

    def __init__(self, seed: int, keys: Sequence[bytes], device: torch.device):
        self._generators = [_generator(seed, key, device) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns [rows, tokens] float64 numbers of which the argmax is a sample."""
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.softmax(-1).double() / noise


def _generator(seed: int, key: bytes, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(str(seed).encode() + b"\0" + key).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
