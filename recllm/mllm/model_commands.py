"""The `recllm model ...` commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class TinyOptions:
    """Prints the folder of the embedded model, which comes with the package."""


@dataclass
class TrainTinyOptions:
    """Trains an embedded model from nothing, on the lessons of the package's own, into a folder."""

    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The folder to make; give it as a model's name wherever `tiny` stands."""
    seed: int = 0
    """Decides the first weights, the lessons and the pictures."""
    overwrite: bool = False
    """Replace OUT if it is an embedded model."""


def tiny(options: TinyOptions) -> None:
    """Prints the folder of the embedded model."""
    from recllm.mllm.tiny import checkpoint_folder

    print(checkpoint_folder())


def train_tiny(options: TrainTinyOptions) -> None:
    """Trains the embedded model and prints its folder."""
    from recllm.mllm.tiny import train_checkpoint

    print(train_checkpoint(options.out, seed=options.seed, overwrite=options.overwrite))
