"""The order of training rows: a function of seed and epoch alone, so that a resumed run goes on in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Shuffles groups of rows, in batches of about equal length where lengths are given.

    transformers' own samplers draw from the global generator, which dropout moves on as well: the order of
    an epoch that was begun before a kill cannot be had again. Ours.

    Args:
        groups: The group of each row; neighboring rows of one group stay neighbors.
        step: Rows of one optimizer step over all ranks.
        seed: Seed of the order.
        lengths: Tokens of each row; None to shuffle without regard to them.
    """

    def __init__(self, groups: Sequence[int], step: int, seed: int, lengths: Sequence[int] | None = None):
        # Read once, in order: a column of a `datasets.Dataset` takes a millisecond for each single index.
        numbers = np.asarray(groups[:], np.int64)
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        self._members = [range(*bounds) for bounds in pairwise([*starts.tolist(), len(numbers)])]
        self._lengths = None
        if lengths is not None:
            longest = np.asarray(lengths[:], np.int64)
            self._lengths = np.maximum.reduceat(longest, starts).tolist() if len(starts) else []
        self._step = max(1, step * len(self._members) // max(1, len(numbers)))
        self._rows, self._seed, self._epoch = len(numbers), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of an epoch, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        if self._lengths is None:
            order = torch.randperm(len(self._members), generator=generator).tolist()
        else:
            order = get_length_grouped_indices(self._lengths, self._step, generator=generator)
        return (row for number in order for row in self._members[number])
