"""What the `recllm model ...` commands do and print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TinyOptions:
    """Trains the embedded model, where it is not in the cache folder yet, and prints its folder."""

    seed: int = 0
    """Decides its weights; `tiny` as a model's name is that of seed 0."""


def tiny(options: TinyOptions) -> None:
    """Prints the folder of the embedded model, after it was trained."""
    from recllm.mllm.tiny import ensure

    print(ensure(options.seed))
