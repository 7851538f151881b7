"""The visual store of a dataset: named, or made for the whole catalog where it is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from recllm.errors import DataError
from recllm.mllm.images import resolve_image
from recllm.mllm.visual_journal import DTYPES
from recllm.mllm.visual_store import VisualStore, build_visual_store
from recllm.mllm.visual_tower import store_identity

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel


def open_visual_store(choice: str, loaded: LoadedModel, dataset: Path) -> VisualStore:
    """Opens the visual store at `choice`, or for `auto` that of the dataset, made where it is missing.

    Call it on rank 0 first.

    Args:
        choice: A folder, or `auto`.
        loaded: The model.
        dataset: The dataset folder; `auto` encodes all images of its items.

    Raises:
        DataError: The store is missing, or belongs to another model.
    """
    model, processor = loaded.model, loaded.processor
    if choice != "auto":
        if not Path(choice).is_dir():
            raise DataError(f"--visual-store {choice}: no such folder; `auto` makes one below the dataset")
        return VisualStore.open(Path(choice), model, processor)
    identity = store_identity(model, processor)
    dtype = str(loaded.base_model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise DataError(f"--visual-store auto: weights in {dtype} cannot be stored; build one yourself")
    folder = dataset / "visual" / f"{identity['tower'][:12]}-{identity['processor'][:12]}-{dtype}"
    if folder.exists():
        return VisualStore.open(folder, model, processor)
    items = pl.read_parquet(dataset / "items.parquet", glob=False)
    listed = items["images"].list.explode().drop_nulls().unique(maintain_order=True)
    return build_visual_store(
        model, processor, [resolve_image(dataset, image) for image in listed], folder, dtype=dtype
    )
