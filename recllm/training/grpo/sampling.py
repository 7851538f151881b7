"""The order of prompts, a function of seed and epoch alone, each repeated for its group of answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class GroupSampler(Sampler[int]):
    """Yields blocks of prompts, each prompt `group` times in a row, each block `repeats` times.

    A block has prompts of one kind: with an image, or without. A batch that mixed them could hold none of the
    images, which vision towers refuse, and TRL looks at the first row alone to see whether there are any.

    TRL's `RepeatSampler` continues one generator from epoch to epoch, so that a run that is resumed in its
    second epoch would go through it in the order of the first. Ours.

    Args:
        kinds: The kind of each prompt.
        block: Prompts that are answered at once; those of a kind that fill no block are left out of an epoch.
        group: Answers to a prompt.
        repeats: Batches, over all passes, that one block's answers make.
        seed: Seed of the order.
    """

    def __init__(self, kinds: Sequence[str], block: int, group: int, repeats: int, seed: int) -> None:
        self._of_kind = {kind: [] for kind in dict.fromkeys(kinds)}
        for row, kind in enumerate(kinds):
            self._of_kind[kind].append(row)
        self._block, self._group = block, group
        self._repeats, self._seed, self._epoch = repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of an epoch, counted from 0."""
        self._epoch = epoch

    @property
    def blocks(self) -> int:
        """Blocks in an epoch."""
        return sum(len(rows) // self._block for rows in self._of_kind.values())

    def __len__(self) -> int:
        return self.blocks * self._block * self._group * self._repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        blocks = []
        for rows in self._of_kind.values():
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(rows) - self._block + 1, self._block):
                blocks.append([rows[place] for place in order[start : start + self._block]])
        for number in torch.randperm(len(blocks), generator=generator).tolist():
            for _ in range(self._repeats):
                for row in blocks[number]:
                    yield from [row] * self._group
