"""Rewards as TRL's trainer calls them: a function for each part, of which all share one judgment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recllm.training.rewards import Answer, Rewards, Source
from recllm.training.rewards.wording import faults


class Judge:
    """Judges completions of TRL's trainer.

    Args:
        rewards: The rewards.
        sources: The prompts; a row names its place among them.
        ends: The tokens that end an answer.
    """

    def __init__(self, rewards: Rewards, sources: Sequence[Source], ends: Sequence[int]) -> None:
        self.rewards = rewards
        self._sources, self._ends = sources, frozenset(ends)
        self._judged: Any = None
        self.answers: list[Answer] = []
        self.table = np.zeros((0, len(rewards.names)))

    @property
    def kinds(self) -> list[str]:
        """The kind of each prompt."""
        return [source.kind for source in self._sources]

    def images(self, rows: Sequence[int], folder: Path) -> list[list[str]]:
        """Returns the image files of some prompts."""
        return [[str(folder / image) for image in self._sources[row].images] for row in rows]

    def functions(self) -> list[Callable[..., list[float | None]]]:
        """Returns a reward function of TRL's form for each part."""
        return [_Column(self, place, name) for place, name in enumerate(self.rewards.names)]

    def judge(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> np.ndarray:
        """Returns the parts of each completion, (completions, parts); the same list is judged once."""
        if self._judged is not completions:
            self.answers = [
                Answer(self._sources[row], said[0]["content"], bool(self._ends.intersection(ids[-1:])))
                for said, ids, row in zip(completions, completion_ids, rows, strict=True)
            ]
            self.table = self.rewards(self.answers)
            self._judged = completions
        return self.table

    def faults(self) -> dict[str, int]:
        """Returns how many answers were judged last, as `answers`, and how many of them have each fault."""
        found = [faults(answer) for answer in self.answers]
        return {
            "answers": len(self.answers),
            **{name: sum(each[name] for each in found) for name in found[0]},
        }


class _Column:
    """One part, as TRL calls it."""

    def __init__(self, judge: Judge, place: int, name: str) -> None:
        self._judge, self._place = judge, place
        self.__name__ = name

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        row: Sequence[int],
        **_: Any,
    ) -> list[float | None]:
        values = self._judge.judge(completions, completion_ids, row)[:, self._place]
        return [None if np.isnan(value) else float(value) for value in values]


def settle(rewards: torch.Tensor, group: int, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes parts that hardly differ within a group equal there, so that they push nothing.

    Standardized, a part whose values differ by a thousandth would weigh as much as any. Ours.

    Args:
        rewards: (prompts x group, parts), NaN where a part does not apply.
        group: Answers to a prompt.
        floor: Least difference of the highest and the lowest value of a group.

    Returns:
        The rewards, and which groups are dead: (prompts, parts), 1 where a part does not differ, 0 where it
        does, NaN where it applies to fewer than two answers.
    """
    grouped = rewards.view(-1, group, rewards.shape[1])
    known = ~grouped.isnan()
    counted = known.sum(1)
    highest = grouped.masked_fill(~known, -torch.inf).amax(1)
    lowest = grouped.masked_fill(~known, torch.inf).amin(1)
    spread = torch.where(counted > 0, highest - lowest, 0.0)
    dead = (spread < floor) | (spread == 0)
    means = grouped.nanmean(1, keepdim=True).expand_as(grouped)
    settled = torch.where(dead[:, None] & known, means, grouped)
    share = torch.where(counted > 1, dead.to(rewards.dtype), torch.nan)
    return settled.reshape_as(rewards), share


def dead_shares(dead: torch.Tensor, names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Returns the share of dead groups of each part, and as `all` of groups in which no part teaches.

    Args:
        dead: Of `settle`.
        names: The parts.
        weights: Their weights; those of weight 0 teach nothing anyway.
    """
    shares = {}
    for place, name in enumerate(names):
        column = dead[:, place]
        column = column[~column.isnan()]
        if len(column):
            shares[name] = float(column.mean())
    taught = [place for place, name in enumerate(names) if weights[name] > 0]
    alive = (dead[:, taught] == 0).any(1)
    shares["all"] = float((~alive).float().mean())
    return shares
