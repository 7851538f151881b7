"""Fusions of two frozen item vectors without training (VLM4Rec, arXiv 2603.12625, Table 1).

With t and v an item's text and image vector at unit length:

    text      t
    image     v
    average   (t + v) / 2            "Naive Avg"
    weighted  w t + (1 - w) v        average is w = 0.5
    concat    [t; v]                 "Concat"; its cosine is the mean of the two where an item has both

The trained ones (attention, gating, cross, spectral) are `recllm.rankers.models.profile_fusion`.

Sums need equal widths. Ours: the wider vectors are projected to the narrower width by their leading principal
axes, without centering, so that cosines change as little as a projection lets them; they are unit vectors
again afterwards. (The released scripts skip such pairs, or feed them to layers of another width.) An item
that lacks one of the two is what it has: t or v, for `concat` [t; 0] or [0; v].

The released scripts fuse vectors as they come, so that the longer modality rules the cosine: `raw`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import polars as pl

from recllm.errors import DataError
from recllm.rankers.features import Features

Untrained = Literal["text", "image", "average", "weighted", "concat"]
TRAINED = ("attention", "gating", "cross", "spectral")
_ROWS = 65_536  # vectors in work at a time


def fuse(
    text: Features | None,
    image: Features | None,
    fusion: Untrained,
    item_ids: pl.Series,
    *,
    weight: float = 0.5,
    raw: bool = False,
) -> Features:
    """Returns one vector for each item.

    Args:
        text: The texts' vectors [items, dt]; None where the fusion reads none.
        image: The images' vectors [items, dv]; None where the fusion reads none.
        fusion: Which one.
        item_ids: The ids of the catalog, for errors.
        weight: w of `weighted`, from 0 to 1.
        raw: Fuse vectors as they come, not at unit length.

    Returns:
        Vectors [items, d]: d is dt for `text`, dv for `image`, dt + dv for `concat`, min(dt, dv) for sums.
        An item has a vector where it has a text or an image that the fusion reads.

    Raises:
        DataError: A vector is zero, or the weight is not a share.
    """
    if not 0 <= weight <= 1:
        raise DataError(f"--weights {weight}: expected a share of the text from 0 to 1")
    parts = {name: each for name, each in (("text", text), ("image", image)) if name in READS[fusion]}
    vectors = {name: _prepared(each, name, item_ids, raw) for name, each in parts.items()}
    if fusion in ("average", "weighted"):
        width = min(each.shape[1] for each in vectors.values())
        for name, each in vectors.items():
            if each.shape[1] > width:
                vectors[name] = _projected(each, parts[name].present, width, raw)
    marks = [each.present for each in parts.values()]
    fused = _FUSIONS[fusion](list(vectors.values()), marks, weight)
    return Features(fused, np.any(marks, axis=0), f"{fusion} of {' and '.join(parts)}")


def principal_axes(vectors: np.ndarray, count: int) -> np.ndarray:
    """Returns the leading right singular vectors of a matrix, a block of rows at a time.

    Args:
        vectors: Shape [n, d]; it may be memory-mapped.
        count: Axes, d at most.

    Returns:
        float32, shape [d, count]; of each axis the largest coordinate is positive.
    """
    gram = np.zeros((vectors.shape[1],) * 2)
    for at in range(0, len(vectors), _ROWS):
        block = np.asarray(vectors[at : at + _ROWS], dtype=np.float64)
        gram += block.T @ block
    axes = np.linalg.eigh(gram)[1][:, ::-1][:, :count]
    largest = axes[np.abs(axes).argmax(0), np.arange(count)]
    return (axes * np.where(largest < 0, -1, 1)).astype(np.float32)


def _prepared(features: Features, name: str, item_ids: pl.Series, raw: bool) -> np.ndarray:
    """The vectors at unit length, or as they come; zero where there is none."""
    length = np.linalg.norm(features.vectors.astype(np.float64), axis=1)
    if (wrong := features.present & ~(length > 0)).any():
        item = item_ids[int(wrong.argmax())]
        raise DataError(
            f"the {name} vector of item {item!r} is zero ({features.source}), so it has no direction to "
            "compare; leave the item out of the vectors"
        )
    scale = np.where(features.present, 1.0 if raw else 1 / np.where(length > 0, length, 1), 0.0)
    return features.vectors * scale[:, None].astype(np.float32)


def _projected(vectors: np.ndarray, present: np.ndarray, width: int, raw: bool) -> np.ndarray:
    projected = vectors @ principal_axes(vectors, width)
    if raw:
        return projected
    length = np.linalg.norm(projected, axis=1, keepdims=True)
    return np.where(present[:, None] & (length > 0), projected / np.where(length > 0, length, 1), 0)


def _sum(vectors: list[np.ndarray], marks: list[np.ndarray], weight: float) -> np.ndarray:
    (text, image), (has_text, has_image) = vectors, marks
    share = np.where(has_text & has_image, weight, has_text)[:, None].astype(np.float32)
    return share * text + (1 - share) * image


_FUSIONS: dict[str, Callable[[list[np.ndarray], list[np.ndarray], float], np.ndarray]] = {
    "text": lambda vectors, *_: vectors[0],
    "image": lambda vectors, *_: vectors[0],
    "average": lambda vectors, marks, _: _sum(vectors, marks, 0.5),
    "weighted": _sum,
    "concat": lambda vectors, *_: np.concatenate(vectors, axis=1),
}
READS: dict[str, tuple[str, ...]] = {
    name: (name,) if name in ("text", "image") else ("text", "image") for name in _FUSIONS
}
"""Which vectors a fusion reads."""
