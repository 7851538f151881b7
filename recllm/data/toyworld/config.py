"""The command `recllm data toyworld`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from recllm.data.dataset import Dataset
from recllm.data.toyworld.parameters import Parameters
from recllm.data.toyworld.world import generate


@dataclass
class ToyworldConfig:
    """Makes a toy dataset in which it is known what seeing, remembering order and reading are worth."""

    out: tyro.conf.Positional[Path]
    """The dataset folder to make."""
    users: int = Parameters.users
    """How many users."""
    items: int = Parameters.items
    """How many items."""
    seed: int = Parameters.seed
    """The same seed gives the same tables and pictures."""
    phases: int = Parameters.phases
    """How often a user's taste changes, plus one; 1 means no drift. Fewer phases need fewer items."""
    noise: float = Parameters.noise
    """Share of picks made regardless of taste."""
    overwrite: bool = False
    """Replace the folder where it exists."""
    discard_derived: bool = False
    """With --overwrite: also delete what other commands made from the old dataset (splits, texts,
    instructions, ...). Generated answers, visual tokens and embeddings are kept in any case."""


def write_toyworld(config: ToyworldConfig) -> Dataset:
    """Generates a toy world and writes it as a dataset folder; see `ToyWorld.write` for what is in it.

    Raises:
        DataError: The sizes cannot work, the folder exists, or the disk is full.
    """
    world = generate(config.users, config.items, config.seed, phases=config.phases, noise=config.noise)
    return world.write(config.out, overwrite=config.overwrite, discard_derived=config.discard_derived)
