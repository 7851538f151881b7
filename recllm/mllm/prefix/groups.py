"""Groups of prompts that share a prefix, and batches of groups that fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, as tokens.

    Attributes:
        row: Its place in the table.
        id: Its name, for errors.
        tokens: (tokens,) int64, what the model reads.
        contents: (tokens,) int64, as `tokens`, but an image's tokens are a negative number that stands for
            its content: equal only where the image is.
        images: The keys of its images, in order.
        image_ends: One past each image's last token, ascending.
    """

    row: int
    id: str
    tokens: np.ndarray
    contents: np.ndarray
    images: tuple[str, ...]
    image_ends: np.ndarray


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts with the same beginning.

    Attributes:
        prompts: One or more.
        shared: Tokens that they have in common; at least one less than the shortest prompt has.
    """

    prompts: tuple[Prompt, ...]
    shared: int

    @property
    def tokens(self) -> int:
        """What is computed: the common tokens once, and the rest of each prompt."""
        return self.shared + sum(len(prompt.tokens) - self.shared for prompt in self.prompts)

    def part(self, start: int, end: int) -> Group:
        """Returns some of the prompts, with the same beginning."""
        return replace(self, prompts=self.prompts[start:end])


def contents_of(
    tokens: np.ndarray, image_token: int, images: Sequence[int], counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `contents` and `image_ends` of a prompt.

    An image reaches from its first visual feature to its last: what a processor writes between its tiles is
    part of it.

    Args:
        tokens: The prompt.
        image_token: What stands for a visual feature of an image.
        images: A number for the content of each image, 0 or more.
        counts: How many visual features each image has.
    """
    places, features = np.flatnonzero(tokens == image_token), np.array(counts, np.int64)
    if len(places) != features.sum():
        raise RuntimeError(f"{len(places)} image tokens for {features.sum()} visual features")
    behind = features.cumsum()
    ends = places[behind - 1] + 1
    contents = tokens.copy()
    for start, end, number in zip(places[behind - features], ends, images, strict=True):
        contents[start:end] = -1 - number
    return contents, ends


def share(prompts: Sequence[Prompt], most: int | None = None) -> Group:
    """Returns a group with the longest beginning that all prompts have in common.

    An image's tokens are equal where the image is; each prompt keeps a token of its own.

    Args:
        prompts: One or more.
        most: Tokens to share at most.
    """
    first = prompts[0].contents
    shared = min(len(prompt.tokens) for prompt in prompts) - 1
    shared = shared if most is None else min(shared, most)
    for prompt in prompts[1:]:
        different = np.flatnonzero(first[:shared] != prompt.contents[:shared])
        if len(different):
            shared = int(different[0])
    while shared and first[shared] < 0 and first[shared] == first[shared - 1]:
        shared -= 1  # an image is not cut in two
    return Group(tuple(prompts), shared)


def plan(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """Returns batches of at most `budget` tokens; a group that is larger is split, its beginning repeated.

    A prompt that alone is over the budget is a batch of its own.
    """
    batches: list[list[Group]] = []
    held, room = [], budget
    for whole in groups:
        for group in _split(whole, budget):
            if held and group.tokens > room:
                batches.append(held)
                held, room = [], budget
            held.append(group)
            room -= group.tokens
    return [*batches, held] if held else batches


def plan_padded(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """Returns batches of whole prompts of similar length, for rows padded to the longest of each."""
    alone = [Group((prompt,), 0) for group in groups for prompt in group.prompts]
    waiting = sorted(alone, key=lambda group: (-group.tokens, group.prompts[0].row))
    batches = []
    while waiting:
        count = max(1, budget // waiting[0].tokens)
        batches.append(waiting[:count])
        waiting = waiting[count:]
    return batches


def halves(batch: list[Group]) -> list[list[Group]]:
    """Returns a batch as two: groups apart, or one group's prompts; one prompt alone stays what it is."""
    if len(batch) > 1:
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]
    group = batch[0]
    middle = len(group.prompts) // 2
    return [[group.part(0, middle)], [group.part(middle, len(group.prompts))]] if middle else [batch]


def _split(group: Group, budget: int) -> Iterator[Group]:
    start, tokens = 0, group.shared
    for place, prompt in enumerate(group.prompts):
        own = len(prompt.tokens) - group.shared
        if place > start and tokens + own > budget:
            yield group.part(start, place)
            start, tokens = place, group.shared
        tokens += own
    yield group.part(start, len(group.prompts))
