"""Item graphs of frozen features, what they are made of kept on disk: all pairs of items are compared once.

The graph of frozen features depends on these alone, that of the items' users on the interactions alone. Both
are needed whenever a ranker is made: for training, for each scoring, and again over the graph of what is
known later.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import sparse

from recllm.config import refuse_given
from recllm.errors import DataError
from recllm.files import write_file
from recllm.graphs.knn import Neighbors, nearest_neighbors
from recllm.graphs.propagation import interaction_matrix, symmetric_normalized
from recllm.graphs.refinement import audience_graph, refined_graph
from recllm.rankers.features import Features
from recllm.rankers.training_data import TrainingData

_VERSION = 1  # of what `nearest_neighbors` finds
_AUDIENCE_VERSION = 1  # of what `audience_graph` finds
_NAMES = ("items", "neighbors", "cosines")


@dataclass(frozen=True)
class RefinementConfig:
    """MLLMRec's refinement of the graph of nearest items (eq. 6 to 10), for any ranker with such a graph."""

    refine: bool = False
    """Refine the graph of the items nearest by raw features as MLLMRec does: edges below --threshold are
    left out, edges between items with the same training users are added."""
    threshold: float = 0.6
    """alpha: least cosine of an edge between items."""
    audience_neighbors: int = 10
    """K_c: of an item, the items with the largest Jaccard similarity of training users."""

    def check(self) -> None:
        """Raises a `DataError` for options of the refinement without it."""
        if not self.refine:
            refuse_given(
                self, ("threshold", "audience_neighbors"), "without --refine. Add it, or leave them out"
            )


def item_graph(
    features: Features, k: int, data: TrainingData, refinement: RefinementConfig, *, weighted: bool
) -> sparse.csr_array:
    """Returns the normalized graph of the items nearest by raw features; float32, shape [items, items].

    Refined, its edges weigh 1 and, where items share training users, their Jaccard similarity more (MLLMRec
    eq. 10). The paper does not say how it refines the graphs of other rankers. Ours: each modality's graph is
    refined by itself, and only items with the modality get edges.

    Args:
        features: The vectors.
        k: Nearest neighbors of an item, itself included.
        data: The training interactions.
        refinement: Whether to refine, and how.
        weighted: Edges that are not refined weigh their cosine, negative ones 0; else 1.
    """
    near = neighbors_of(features, k)
    if not refinement.refine:
        return symmetric_normalized(near.matrix().maximum(0) if weighted else near.matrix(weighted=False))
    audience = audience_of(data, refinement.audience_neighbors, features.cache)
    known = np.zeros(near.n_items, dtype=np.float32)
    known[near.items.numpy()] = 1
    audience = sparse.csr_array(sparse.diags_array(known) @ audience @ sparse.diags_array(known))
    audience.eliminate_zeros()
    return symmetric_normalized(refined_graph(near, refinement.threshold, audience))


def audience_of(data: TrainingData, k: int, cache: Path | None) -> sparse.csr_array:
    """Returns each item's k most similar items by training users (see `audience_graph`).

    They are read from `cache`, or found and kept there, by a hash of the interactions, as in `neighbors_of`.
    """
    users, items = data.pairs()
    path = None
    if cache is not None:
        digest = hashlib.sha256(f"{data.n_items}".encode())
        digest.update(np.ascontiguousarray(users, np.int64).data)
        digest.update(np.ascontiguousarray(items, np.int64).data)
        path = cache / f"audience-{digest.hexdigest()[:32]}-k{k}-v{_AUDIENCE_VERSION}.safetensors"
        if (kept := _read(path, data.n_items)) is not None:
            return kept.matrix()
    interactions = interaction_matrix(users, items, data.n_users, data.n_items)
    found = audience_graph(interactions, k)
    edges = found.tocoo()
    rows, columns = (torch.from_numpy(each.astype(np.int64)) for each in edges.coords)
    _keep(path, Neighbors(data.n_items, rows, columns, torch.from_numpy(edges.data)))
    return found


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
    _keep(path, found)
    return found


def _keep(path: Path | None, found: Neighbors) -> None:
    if path is not None:
        tensors = {name: getattr(found, name).contiguous() for name in _NAMES}
        with suppress(DataError, OSError):
            write_file(path, lambda temporary: save_file(tensors, temporary))


def _read(path: Path, n_items: int) -> Neighbors | None:
    try:
        tensors = load_file(path)
        found = Neighbors(n_items, *(tensors[name] for name in _NAMES))
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found.items) == len(found.neighbors) == len(found.cosines) else None
