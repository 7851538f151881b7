"""Frozen vectors of items: of texts by a sentence encoder, of images by a multimodal LLM's vision tower, or
from a file.

An item without the modality has no vector: its row is zero and its mark `present` is False. Nothing is
invented for it (REVEAL's release draws noise).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recllm.data.dataset import Dataset
from recllm.data.origins import Origin, check_same_origin, read_made
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.mllm.embedding import DEFAULT_ENCODER
from recllm.rankers.feature_order import rows_of_items

LARGEST = 1e9
"""Number that a vector may have; the squares of larger ones soon are infinite."""


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of one modality for the whole catalog.

    Attributes:
        vectors: One for each item code; float32, shape [items, width]; zero where there is none.
        present: Which items have one; bool, shape [items].
        source: Where they come from, in words.
        cache: Where what is derived from them is kept, by fingerprint; None for nowhere.
    """

    vectors: np.ndarray
    present: np.ndarray
    source: str
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.present.shape != self.vectors.shape[:1]:
            raise ValueError(f"vectors {self.vectors.shape}, present {self.present.shape}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vectors and marks: what a checkpoint was trained with."""
        digest = hashlib.sha256(f"{self.vectors.dtype} {self.vectors.shape}".encode())
        digest.update(np.ascontiguousarray(self.vectors).data)
        digest.update(np.packbits(self.present).data)
        return digest.hexdigest()


def text_features(
    dataset: Dataset,
    source: str = "catalog",
    *,
    order: str | None = None,
    encoder: str = DEFAULT_ENCODER,
    device: str | None = None,
    progress: bool = False,
) -> Features:
    """Embeds the items' texts, kept in DATASET/embeddings; or reads vectors from a file.

    Args:
        dataset: The dataset.
        source: `catalog` (title and text of items.parquet), the name of a file in DATASET/texts, or a path
            that ends in .npy or .safetensors (see `read_features`).
        order: Of the rows of a .npy file (see `read_features`).
        encoder: A sentence encoder, as in `recllm.mllm.embedding.find_encoder`.
        device: Where the encoder runs.
        progress: Show a bar.

    Raises:
        DataError: The texts, the encoder or the file are missing, or no item has a text.
    """
    if _is_file(source):
        return read_features(dataset, Path(source), order=order)
    from recllm.data.texts import item_texts
    from recllm.mllm.embedding import find_encoder, stored_embeddings

    found = find_encoder(encoder)
    folder = dataset.folder / "embeddings" / f"{source}-{found.fingerprint[:12]}"
    texts = item_texts(dataset, source)
    embedded = stored_embeddings(folder, texts, found, device=device, progress=progress)
    if not embedded.present.any():
        raise DataError(f"{dataset.folder}: no item has a text in {source!r}, so there is nothing to embed")
    source = f"{source}, embedded by {found.name} ({found.origin})"
    return Features(embedded.vectors, embedded.present, source, _cache(dataset))


def image_features(
    dataset: Dataset, source: str, *, order: str | None = None, max_pixels: int | None = None
) -> Features:
    """Averages a vision tower's tokens over each item's images; or reads vectors from a file.

    Args:
        dataset: The dataset.
        source: A multimodal model (`tiny`, a local folder, a hub id), whose visual tokens are kept in
            DATASET/visual; or a path that ends in .npy or .safetensors (see `read_features`).
        order: Of the rows of a .npy file (see `read_features`).
        max_pixels: Of an image, as the model sees it; None for the processor's own.

    Raises:
        DataError: The model or the file is missing, or no item has an image that can be read.
    """
    if _is_file(source):
        return read_features(dataset, Path(source), order=order)
    from recllm.mllm.loading import load
    from recllm.mllm.vision.images import resolve_image
    from recllm.mllm.vision.of_dataset import open_visual_store

    loaded = load(source, max_pixels=max_pixels)
    store = open_visual_store("auto", loaded, dataset.folder, required=True, together=False)
    rows: dict[int, np.ndarray] = {}
    for code, images in enumerate(dataset.items["images"]):
        paths = [resolve_image(dataset.folder, image) for image in images]
        usable = [path for path in paths if str(path) not in store.manifest["unusable"]]
        if usable:
            means = [store.features(key).float().mean(0).numpy() for key in store.keys_of(usable)]
            rows[code] = np.mean(means, axis=0)
    if not rows:
        raise DataError(f"{dataset.folder}: no item has an image that can be read")
    return _from_rows(rows, dataset, f"mean visual tokens of {source}")


def check_learned_from(source: str | None, split: Split) -> None:
    """Raises a `DataError` if a .safetensors file says that it was made from another split.

    The prompts of REVEAL's image vectors are made of training reviews and rewritten by feedback from
    validation lists; what one split trains and validates on, another may test on.

    Args:
        source: As `image_features` takes it; any other kind passes.
        split: The split that a ranker is trained on.
    """
    if source is None or not source.endswith(".safetensors"):
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="np") as file:
            facts = read_made(file.metadata() or {}, source)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{source}: not readable as safetensors ({error})") from None
    own = Origin(source, {"split": facts.get("split_hash")})
    check_same_origin(own, split.origin, remedy="embed the images under prompts of this split")


def read_features(dataset: Dataset, path: Path, *, order: str | None = None) -> Features:
    """Reads vectors from a file.

    .safetensors: one tensor for each item, named by its id. .npy: a matrix; whose row is whose is said by
    `<name>.items.txt` beside it, an id on each line, or by `order`. Items that the file lacks, and rows of
    NaN, are items without the modality.

    Args:
        dataset: The dataset.
        path: The file.
        order: Of the rows of a .npy file: `numeric`, `source`, `dataset` or the path of a mapping (see
            `recllm.rankers.feature_order`). A .safetensors file has ids and takes none.

    Raises:
        DataError: The file is missing or damaged, has no vector for any item, has vectors of several widths,
            or a number that is infinite or partly missing; or the order is not named or does not fit.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected vectors of items")
    code_of = {item: code for code, item in enumerate(dataset.items["item"])}
    named = _read_npy(path, dataset, order) if path.suffix == ".npy" else _read_safetensors(path, code_of)
    rows = {code_of[item]: row for item, row in named if item in code_of and not np.isnan(row).all()}
    if not rows:
        raise DataError(f"{path}: no vector for any of the {len(code_of):,} items of {dataset.folder}")
    widths = {row.shape for row in rows.values()}
    if len(widths) > 1 or len(next(iter(widths))) != 1:
        raise DataError(f"{path}: vectors of shapes {sorted(widths)[:3]}; expected one width")
    ids = dataset.items["item"]
    for code, row in rows.items():
        if not np.isfinite(row).all():
            raise DataError(f"{path}: the vector of item {ids[code]!r} has a number that is NaN or infinite")
        if np.abs(row).max() > LARGEST:
            raise DataError(f"{path}: the vector of item {ids[code]!r} has a number beyond {LARGEST:.0e}")
    return _from_rows(rows, dataset, path.name)


def no_features(items: int, source: str) -> Features:
    """Returns features of width 1 that none of the N items has."""
    return Features(np.zeros((items, 1), np.float32), np.zeros(items, bool), source)


def _read_safetensors(path: Path, code_of: dict[str, int]) -> list[tuple[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return [(name, file.get_tensor(name).float().numpy()) for name in file.keys() if name in code_of]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not readable as safetensors ({error})") from None


def _read_npy(path: Path, dataset: Dataset, order: str | None) -> list[tuple[str, np.ndarray]]:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not readable as .npy without pickles ({error})") from None
    if not isinstance(matrix, np.ndarray):
        raise DataError(f"{path}: an archive of arrays; expected one array, as numpy.save writes it")
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise DataError(f"{path}: {matrix.dtype} of shape {matrix.shape}; expected floats [items, width]")
    vectors = np.asarray(matrix, dtype=np.float32)
    return [(item, vectors[row]) for item, row in rows_of_items(dataset, path, len(matrix), order)]


def _from_rows(rows: dict[int, np.ndarray], dataset: Dataset, source: str) -> Features:
    items = len(dataset.items)
    vectors = np.zeros((items, len(next(iter(rows.values())))), dtype=np.float32)
    present = np.zeros(items, dtype=bool)
    for code, row in rows.items():
        vectors[code], present[code] = row, True
    return Features(vectors, present, source, _cache(dataset))


def _cache(dataset: Dataset) -> Path:
    return dataset.folder / "embeddings" / "neighbors"


def _is_file(source: str) -> bool:
    return source.endswith((".npy", ".safetensors"))
