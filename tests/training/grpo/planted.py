"""Rewards for tests: one for a word, and one that differs between any two answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from recllm.training.rewards import Answer

WORD = "striped"


def says_it(answers: Sequence[Answer]) -> list[float]:
    """1 for answers with the planted word."""
    return [float(WORD in answer.text) for answer in answers]


def differs(answers: Sequence[Answer]) -> list[float]:
    """A number that a text alone decides, and that no two texts share."""
    return [hashlib.sha256(answer.text.encode()).digest()[0] / 255 for answer in answers]
