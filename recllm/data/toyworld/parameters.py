"""What a toy world is made from, and its independent streams of random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES
from recllm.errors import DataError

SIZES = (len(COLORS), len(PATTERNS), len(SHAPES))
LOOKS = ((0, 1), (0, 2), (1, 2))  # which two of (color, pattern, shape) a user looks at
MOST_PHASES = min(SIZES[a] * SIZES[b] for a, b in LOOKS)


@dataclass(frozen=True)
class Parameters:
    """What a toy world is made from.

    Attributes:
        users: How many users.
        items: How many items.
        seed: 0 or more.
        phases: Tastes per user over time, at most `MOST_PHASES`; 1 means no drift.
        shortest: Fewest history interactions in a phase.
        longest: Most history interactions in a phase.
        taste: Log-odds for each looked-at attribute that matches the present taste.
        category: Log-odds for the liked category.
        noise: Share of picks made regardless of taste, in [0, 1).
    """

    users: int = 500
    items: int = 200
    seed: int = 0
    phases: int = 12
    shortest: int = 3
    longest: int = 4
    taste: float = 4.25
    category: float = 2.25
    noise: float = 0.015

    def __post_init__(self) -> None:
        if self.users < 1:
            raise DataError(f"users={self.users}: a toy world needs at least one user")
        if self.seed < 0:
            raise DataError(f"seed={self.seed}: expected 0 or more")
        if not 1 <= self.phases <= MOST_PHASES:
            raise DataError(
                f"phases={self.phases}: expected 1 to {MOST_PHASES}, there are no more different tastes"
            )
        if not 1 <= self.shortest <= self.longest:
            raise DataError(
                f"shortest={self.shortest}, longest={self.longest}: expected 1 <= shortest <= longest"
            )
        if not 0 <= self.noise < 1:
            raise DataError(f"noise={self.noise}: expected a share, 0 or more and below 1")
        if self.items < self.longest_history + 1:
            raise DataError(
                f"items={self.items}: a user takes up to {self.longest_history} different items "
                f"({self.phases} phases of up to {self.longest}, and one more), and one must be left; "
                f"give at least {self.longest_history + 1} items, or fewer phases"
            )

    @property
    def longest_history(self) -> int:
        """Most interactions that a user can have, the last one included."""
        return self.phases * self.longest + 1


class Stream(IntEnum):
    """One stream of random numbers for each purpose: a change to one leaves the others as they are."""

    ITEMS = 0
    IMAGES = 1
    FAVORITES = 2
    LOOKS = 3
    PROFILES = 4
    TASTES = 5
    LENGTHS = 6
    CHOICES = 7
    NOISE = 8
    RATINGS = 9
    WORDINGS = 10
    SPANS = 11
    GAPS = 12


def stream(seed: int, purpose: Stream, number: int = 0) -> np.random.Generator:
    """Returns the generator for one purpose (and, for pictures, one item)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, number)))
