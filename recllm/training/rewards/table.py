"""The parts by name, their gates, and what they come to together."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from recllm.errors import DataError
from recllm.mllm.embedding import DEFAULT_ENCODER
from recllm.training.rewards import wording
from recllm.training.rewards.answers import Answer
from recllm.training.rewards.choice import rank

if TYPE_CHECKING:
    from recllm.training.rewards.likelihood import FrozenModel
    from recllm.training.rewards.utility import Utility

Part = Callable[[Sequence[Answer]], Sequence[float | None]]
"""Judges answers: a number in [0, 1] for each, or None where it does not apply."""
Name = Literal[
    "information",
    "reconstruction",
    "paper_reconstruction",
    "length",
    "paper_length",
    "agreement",
    "utility",
    "originality",
    "distinctness",
    "form",
    "rank",
]
CONTENT = ("information", "reconstruction", "paper_reconstruction", "agreement", "utility")
"""Parts that judge what is said; the band gates them."""
KEYWORDS_ONLY = ("form", "paper_length")
CHOICES_ONLY = ("rank",)
_DIGITS = 4


@dataclass(frozen=True)
class RewardSettings:
    """What decides a reward besides the answers.

    Attributes:
        weights: The weight of each part, by name or `module:function`. A part of weight 0 is reported and
            teaches nothing.
        least: The fewest keywords (of summaries, words) of the band.
        most: The most.
        gate: Parts of `CONTENT` are worth 0 outside the band: length-conditional masking, as BalCapRL has it.
        truncated: What an answer gets that was cut off: `none` (it does not count in its group) or `minimum`.
        cap: Of `Information`.
        clip: Of `Reconstruction`.
        encoder: Of `Information`.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"information": 1.0, "length": 1.0})
    least: int = 3
    most: int = 6
    gate: bool = True
    truncated: Literal["none", "minimum"] = "none"
    cap: float = 1.0
    clip: float = 8.0
    encoder: str = DEFAULT_ENCODER

    def __post_init__(self) -> None:
        if not self.weights or not any(self.weights.values()):
            raise DataError("--rewards: expected at least one part with a weight above 0")
        for name, weight in self.weights.items():
            if name not in get_args(Name) and ":" not in name:
                near = difflib.get_close_matches(name, get_args(Name), n=1, cutoff=0.0)[0]
                raise DataError(
                    f"--rewards: unknown part {name!r}; the nearest is {near!r}, and a part of your own is "
                    f"module:function (parts: {', '.join(get_args(Name))})"
                )
            if not 0 <= weight < math.inf:
                raise DataError(f"--rewards: the weight of {name} is {weight}; expected 0 or more")
        if not 1 <= self.least <= self.most:
            raise DataError(f"band {self.least} to {self.most}: expected 1 <= least <= most")
        if not 0 < self.cap <= 1:
            raise DataError(f"--information-cap {self.cap}: expected above 0, and at most 1")
        if not 0 < self.clip < math.inf:
            raise DataError(f"--reconstruction-clip {self.clip}: expected a number above 0")


class Rewards:
    """Judges answers by all parts, with the gates.

    * An answer that is empty, or holds no keyword, is worth 0 in every part that applies to it: no answer of
      its group is worth less.
    * One that was cut off counts nowhere (None), or as an empty one.
    * Outside the band, what it says is worth nothing; `length` tells it the way back.

    Args:
        parts: Those to judge by, in order.
        settings: Weights, band and gates.
    """

    def __init__(self, parts: Mapping[str, Part], settings: RewardSettings) -> None:
        if set(parts) != set(settings.weights):
            raise ValueError("a part is missing, or has no weight")
        self.settings = settings
        self.names = tuple(settings.weights)
        self._parts = parts

    def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
        """Returns the parts of each answer: float64, (answers, parts), NaN where a part does not apply."""
        table = np.full((len(answers), len(self.names)), np.nan)
        judged = [place for place, answer in enumerate(answers) if answer.usable and answer.finished]
        for column, name in enumerate(self.names):
            applies = self._applies(name, answers)
            values = self._values(name, [answers[place] for place in judged])
            for place, value in zip(judged, values, strict=True):
                if value is not None:
                    table[place, column] = value
            for place, answer in enumerate(answers):
                if not (answer.usable and answer.finished) and applies[place]:
                    table[place, column] = self._unusable(answer)
        return np.round(table, _DIGITS)

    def total(self, table: np.ndarray) -> np.ndarray:
        """Returns the weighted mean of the parts that apply to each answer; see `total`."""
        return total(table, [self.settings.weights[name] for name in self.names])

    def _unusable(self, answer: Answer) -> float:
        """0, or NaN for an answer that was cut off and does not count."""
        if not answer.finished and self.settings.truncated == "none":
            return math.nan
        return 0.0

    def _applies(self, name: str, answers: Sequence[Answer]) -> list[bool]:
        """Whether a part applies to an answer's source; of one that a user wrote, always."""
        check = getattr(self._parts[name], "applies", None)
        return [True if check is None else check(answer.source) for answer in answers]

    def _values(self, name: str, answers: Sequence[Answer]) -> list[float | None]:
        """Judges usable answers; those outside the band are not looked at where the part is gated."""
        settings = self.settings
        gated = settings.gate and name in CONTENT
        inside = [not gated or wording.in_band(each, settings.least, settings.most) for each in answers]
        asked = [answer for answer, is_in in zip(answers, inside, strict=True) if is_in]
        found = list(self._parts[name](asked)) if asked else []
        if len(found) != len(asked):
            raise DataError(f"reward {name}: returned {len(found)} numbers for {len(asked)} answers")
        for answer, value in zip(asked, found, strict=True):
            if value is not None and not (0 <= value <= 1):  # NaN is neither
                raise DataError(
                    f"reward {name}: {value} for {answer.source.id} ({answer.text[:60]!r}); expected a "
                    "number from 0 to 1, or None"
                )
        applies = self._applies(name, answers)
        left = iter(found)
        return [
            next(left) if is_in else (0.0 if can else None)
            for is_in, can in zip(inside, applies, strict=True)
        ]


def make_rewards(
    settings: RewardSettings,
    *,
    judge: FrozenModel | None = None,
    others: Mapping[str, str] | None = None,
    utility: Utility | None = None,
    device: str | None = None,
) -> Rewards:
    """Makes the parts that the weights name.

    Args:
        settings: Names, weights and what the parts take.
        judge: The frozen language model of reconstruction and agreement.
        others: The image of another item for each item with one; of agreement.
        utility: The part, whose contexts depend on a split.
        device: Where the sentence encoder runs.

    Raises:
        DataError: A function of one's own cannot be imported, or a part's model is missing.
    """
    least, most = settings.least, settings.most

    def needed(thing: object, name: str) -> None:
        if thing is None:
            raise DataError(f"reward {name}: what it is judged by was not given")

    parts: dict[str, Part] = {}
    for name in settings.weights:
        if name == "information":
            from recllm.training.rewards.information import Information

            parts[name] = Information(settings.encoder, cap=settings.cap, device=device)
        elif name in ("reconstruction", "paper_reconstruction"):
            from recllm.training.rewards.likelihood import Reconstruction

            needed(judge, name)
            parts[name] = Reconstruction(judge, clip=settings.clip, paper=name.startswith("paper"))
        elif name == "agreement":
            from recllm.training.rewards.likelihood import Agreement

            needed(judge, name)
            parts[name] = Agreement(judge, others or {})
        elif name == "utility":
            needed(utility, name)
            parts[name] = utility
        elif name == "rank":
            parts[name] = each(rank)
        elif name == "length":
            parts[name] = each(lambda answer: wording.length(answer, least, most))
        elif name == "paper_length":
            parts[name] = each(wording.paper_length)
        elif name in ("originality", "distinctness", "form"):
            parts[name] = each(getattr(wording, name))
        else:
            parts[name] = imported(name)
    return Rewards(parts, settings)


def each(judge: Callable[[Answer], float | None]) -> Part:
    """Returns a part of a function that judges one answer."""
    return lambda answers: [judge(answer) for answer in answers]


def imported(name: str) -> Part:
    """Imports a part of one's own, `module:function`: it takes a list of answers.

    Raises:
        DataError: There is no such module or function in it.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"--rewards {name}: {error}; expected module:function, importable from this folder or PYTHONPATH"
        ) from None
    if not callable(found):
        raise DataError(f"--rewards {name}: a {type(found).__name__}, not a function")
    return found


def total(table: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Returns the weighted mean of the parts that apply: float64, (answers,), NaN where none does.

    Args:
        table: (answers, parts), NaN where a part does not apply.
        weights: One a part.
    """
    counted = np.where(np.isnan(table), 0.0, np.asarray(weights, float))
    sums = counted.sum(1)
    weighted = (np.nan_to_num(table) * counted).sum(1)
    return np.divide(weighted, sums, out=np.full(len(table), np.nan), where=sums > 0)
