"""Which items make a pool that several systems share: those with content of one or more kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recllm.data.dataset import Dataset

VECTOR_FILES = (".npy", ".safetensors")


def items_with_all(dataset: Dataset, sources: Sequence[str], order: str | None = None) -> np.ndarray | None:
    """Returns which items have content in each of some sources; bool, shape [items]; None without sources.

    Args:
        dataset: The dataset.
        sources: Names of texts, as `recllm.data.texts.item_texts` takes them, or files of vectors (.npy,
            .safetensors), as `recllm.rankers.features.read_features` does.
        order: Of the rows of .npy files (see `read_features`).

    Raises:
        DataError: A text or a file is missing or damaged.
    """
    if not sources:
        return None
    from recllm.data.texts import item_texts
    from recllm.rankers.features import read_features

    marks = []
    for source in sources:
        if source.endswith(VECTOR_FILES):
            marks.append(read_features(dataset, Path(source), order=order).present)
        else:
            marks.append(np.array([bool(text.strip()) for text in item_texts(dataset, source)], dtype=bool))
    return np.all(marks, axis=0)
