"""The nearest neighbors of items by raw features, kept on disk: a product of all pairs of items is made once.

The graph of frozen features depends on these alone, and is needed whenever a ranker is made: for training,
for each scoring, and again over the graph of what is known later.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recllm.errors import DataError
from recllm.files import write_file
from recllm.graphs.knn import Neighbors, nearest_neighbors
from recllm.rankers.features import Features

_VERSION = 1  # of what `nearest_neighbors` finds
_NAMES = ("items", "neighbors", "cosines")


def neighbors_of(features: Features, k: int) -> Neighbors:
    """Returns the k nearest items of each item (see `nearest_neighbors`).

    They are read from `features.cache`, or found and kept there. A file that is damaged, or a folder that
    cannot be written, costs the time of finding them again and nothing else.

    Args:
        features: The vectors; without a `cache`, nothing is kept.
        k: Neighbors of an item, itself included.
    """
    count = len(features.present)
    path = None
    if features.cache is not None:
        path = features.cache / f"{features.fingerprint[:32]}-k{k}-v{_VERSION}.safetensors"
        if (kept := _read(path, count)) is not None:
            return kept
    found = nearest_neighbors(torch.from_numpy(features.vectors), torch.from_numpy(features.present), k)
    if path is not None:
        tensors = {name: getattr(found, name).contiguous() for name in _NAMES}
        with suppress(DataError, OSError):
            write_file(path, lambda temporary: save_file(tensors, temporary))
    return found


def _read(path: Path, n_items: int) -> Neighbors | None:
    try:
        tensors = load_file(path)
        found = Neighbors(n_items, *(tensors[name] for name in _NAMES))
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found.items) == len(found.neighbors) == len(found.cosines) else None
