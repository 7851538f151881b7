"""The order of training rows: a function of seed and epoch alone, so that a resumed run goes on in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Shuffles rows, in batches of about equal length where lengths are given.

    transformers' own samplers draw from the global generator, which dropout moves on as well: the order of
    an epoch that was begun before a kill cannot be had again. Ours.

    Args:
        rows: How many rows there are.
        group: Rows of one optimizer step over all ranks.
        seed: Seed of the order.
        lengths: Tokens of each row; None to shuffle without regard to them.
    """

    def __init__(self, rows: int, group: int, seed: int, lengths: Sequence[int] | None = None):
        self._rows, self._group, self._seed, self._lengths = rows, group, seed, lengths
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of an epoch, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        if self._lengths is None:
            return iter(torch.randperm(self._rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self._lengths, self._group, generator=generator))
