"""Projected visual tokens on disk: with a frozen vision tower, each catalog image is encoded once.

A store is a folder: `tokens.bin` (one row a visual token: what the projector gave it, then its deepstack
features where the model has some; memory-mapped), `index.parquet` (one row an image, by the SHA-256 of its
file) and `manifest.json`. It belongs to one vision tower and one set of processor settings. Ours.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from recllm.errors import DataError
from recllm.files import MANIFEST, read_json
from recllm.mllm.processor import forward_names
from recllm.mllm.vision.building import BITS, DTYPES, INDEX, TOKENS, Journal
from recllm.mllm.vision.images import ImageError, map_in_threads, read_image_bytes
from recllm.mllm.vision.token_budget import ImageTokens
from recllm.mllm.vision.tower import VisionTower, store_identity, unwrapped
from recllm.progress import Progress
from recllm.runs.provenance import describe_run


class NoUsableImage(DataError):
    """A visual store would have no image."""


def image_key(path: Path) -> str:
    """Returns the SHA-256 of an image file's bytes, in hex; hashed once while size and time stay the same.

    Raises:
        ImageError: The file is missing, empty or not readable.
    """
    try:
        state = Path(path).stat()
    except (OSError, ValueError):
        return _key_of(read_image_bytes(path))
    return _hash_file(str(path), state.st_size, state.st_mtime_ns)


def build_visual_store(
    model: Any,
    processor: Any,
    paths: Iterable[Path],
    out: Path,
    *,
    batch_tokens: int = 8192,
    dtype: str = "bfloat16",
    workers: int = 2,
    progress: bool = True,
) -> VisualStore:
    """Encodes every image once and writes the store; files with equal bytes are one image.

    Each batch is on disk, synced, before the next begins (in `.<name>.building` beside `out`), so a killed
    build goes on where it was when it is started again, and ends in the same bytes. Images that cannot be
    used are named in the manifest with the reason.

    Args:
        model: A transformers image-text-to-text model, also within a PEFT adapter; runs on its own device.
        processor: Its processor, with the pixel budget set.
        paths: Image files.
        out: The folder to make.
        batch_tokens: The most visual tokens that the tower encodes at once; an image is never split.
        dtype: How tokens are stored: `float32`, `bfloat16` or `float16`.
        workers: Threads that decode images ahead of the tower.
        progress: Show a bar where there is a terminal.

    Raises:
        DataError: `out` exists, the model gives something else than visual tokens by image, a value does not
            fit `dtype`, no image can be used, or an unfinished build of another model lies there.
        BusyError: Another process builds the same store.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already; remove it, or give another folder")
    if dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    head = {**store_identity(model, processor), "dtype": dtype}
    tower, tokens = VisionTower(model, processor), ImageTokens(processor)
    unusable: dict[str, str] = {}
    files = 0
    with Journal(out, head) as journal:
        done = journal.keys

        def prepare(path: Path) -> tuple[str, Any]:
            data = read_image_bytes(path)
            key = _key_of(data)
            return key, None if key in done else tower.pixels(tokens.decode(data, path))

        def try_prepare(path: Path) -> tuple[str, Any] | ImageError:
            try:
                return prepare(path)
            except ImageError as error:
                return error

        batch: dict[str, dict[str, Any]] = {}
        size = 0
        for path, got in Progress(
            map_in_threads(try_prepare, paths, workers),
            "encoding",
            len(paths) if hasattr(paths, "__len__") else None,
            unit="image",
            disable=not progress,
        ):
            files += 1
            if isinstance(got, ImageError):
                unusable[str(path)] = str(got)
                continue
            key, pixels = got
            if key in done or key in batch:
                continue
            count = tower.count(pixels)
            if batch and size + count > batch_tokens:
                journal.append(tower.encode(batch))
                batch, size = {}, 0
            batch[key] = pixels
            size += count
        if batch:
            journal.append(tower.encode(batch))
        if not done:
            raise NoUsableImage(
                f"{out}: none of {files} images can be used; {next(iter(unusable.values()), '')}"
            )
        manifest = {
            "kind": "visual store",
            **head,
            **journal.layout,
            "files": files,
            "images": len(done),
            "tokens": sum(journal.index["tokens"]),
            "unusable": unusable,
            "run": describe_run(),
        }
        journal.finish(out, manifest)
    return VisualStore.open(out, model, processor)


@dataclass(frozen=True)
class VisualStore:
    """Reads what `build_visual_store` wrote: a store, or several parts of one.

    Open it with `VisualStore.open` or `VisualStore.open_parts`.
    """

    folder: Path
    manifest: dict[str, Any]
    _model_inputs: frozenset[str]
    _rows: tuple[np.ndarray, ...]
    _keys: np.ndarray
    _index: pl.DataFrame = field(repr=False)
    _key_of: Callable[[Path], str] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, model: Any, processor: Any) -> VisualStore:
        """Opens a store for the model and processor that it was made with.

        Raises:
            DataError: It was made by another vision tower or with other image settings, or is not whole.
        """
        return cls.open_parts(Path(folder), [Path(folder)], model, processor)

    @classmethod
    def open_parts(
        cls,
        folder: Path,
        parts: Sequence[Path],
        model: Any,
        processor: Any,
        key_of: Callable[[Path], str] = image_key,
    ) -> VisualStore:
        """Opens several stores of one model as one; where several have an image, the first is read.

        Args:
            folder: Names the whole in errors.
            parts: Stores, one or more.
            model: As for `open`.
            processor: As for `open`.
            key_of: Returns an image file's key, as `image_key` does.

        Raises:
            DataError: As `open`; or the parts do not fit together.
        """
        identity = store_identity(model, processor)
        read = [_open_part(part, identity) for part in parts]
        layouts = [(each["dtype"], each["columns"], each["tile"]) for each, _, _ in read]
        for part, layout in zip(parts, layouts, strict=True):
            if layout != layouts[0]:
                raise DataError(f"{part} does not fit the other parts of {folder}; remove it")
        index = pl.concat([index.with_columns(part=number) for number, (_, index, _) in enumerate(read)])
        index = index.unique("key", keep="first", maintain_order=True).sort("key")
        manifest = {
            **read[0][0],
            "files": sum(each["files"] for each, _, _ in read),
            "images": index.height,
            "tokens": int(index["tokens"].sum()),
            "unusable": {name: why for each, _, _ in read for name, why in each["unusable"].items()},
        }
        return cls(
            Path(folder),
            manifest,
            forward_names(unwrapped(model)),
            tuple(rows for _, _, rows in read),
            index["key"].to_numpy().astype("S64"),
            index,
            key_of,
        )

    def __contains__(self, key: str) -> bool:
        position = int(np.searchsorted(self._keys, key.encode()))
        return position < len(self._keys) and self._keys[position] == key.encode()

    def keys_of(self, paths: Iterable[Path]) -> list[str]:
        """Returns the key of each image file.

        Raises:
            DataError: The store does not have a file's content: it is new, or was changed since.
        """
        keys = []
        for path in paths:
            keys.append(self._key_of(path))
            if keys[-1] not in self:
                reason = self.manifest["unusable"].get(
                    str(path), "it is new, or changed since; `auto` adds such images to a dataset's store"
                )
                raise DataError(f"image {path} is not in the visual store {self.folder}: {reason}")
        return keys

    def features(self, key: str) -> torch.Tensor:
        """Returns an image's tokens as stored, (tokens, sum of the manifest's `columns`).

        Raises:
            DataError: There is no such image.
        """
        row = self._row(key)
        rows = np.array(self._rows[row["part"]][row["start"] : row["start"] + row["tokens"]])
        return torch.from_numpy(rows).view(DTYPES[self.manifest["dtype"]])

    def mm_inputs(
        self,
        keys: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Returns what goes to `model(...)` and `model.generate(...)` in place of pixel values.

        Args:
            keys: The images of a batch in the order of their slots, from its first sample to its last.
            device: Where the tensors go.
            dtype: Their type; that of the store when None.

        Returns:
            `mm_encoder_outputs`, and `image_grid_thw` where the model takes it; nothing without images.
        """
        if not keys:
            return {}
        distinct = list(dict.fromkeys(keys))
        stored = [self.features(key) for key in distinct]
        moved = torch.cat(stored).to(device, dtype).split([len(rows) for rows in stored])
        read = {
            key: torch.split(rows, self.manifest["columns"], dim=1)
            for key, rows in zip(distinct, moved, strict=True)
        }
        inputs = {
            name: values.to(device) for name, values in self.notes(keys).items() if name in self._model_inputs
        }
        return {"mm_encoder_outputs": {"image": self._encoder_output([read[key] for key in keys])}, **inputs}

    def _row(self, key: str) -> dict[str, Any]:
        if key not in self:
            raise DataError(f"image {key} is not in the visual store {self.folder}")
        return self._index.row(int(np.searchsorted(self._keys, key.encode())), named=True)

    def notes(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns what the processor says of images besides pixels, such as `image_grid_thw`; a row each."""
        notes = [json.loads(self._row(key)["notes"]) for key in keys]
        return {name: torch.tensor([one[name] for one in notes]) for name in (notes[0] if notes else ())}

    def _encoder_output(self, columns: list[tuple[torch.Tensor, ...]]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        projected, *deep = zip(*columns, strict=True)
        if self.manifest["tile"] is not None:
            tiles = torch.cat(projected).reshape(-1, self.manifest["tile"], self.manifest["columns"][0])
            return BaseModelOutputWithPooling(pooler_output=tiles)
        if not deep:
            return BaseModelOutputWithPooling(pooler_output=projected)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=projected, deepstack_features=deep)


def _open_part(folder: Path, identity: dict[str, str]) -> tuple[dict[str, Any], pl.DataFrame, np.ndarray]:
    """Returns a store's manifest, index and rows."""
    manifest = read_json(folder / MANIFEST, "a visual store")
    if manifest.get("kind") != "visual store":
        raise DataError(f"{folder} is no visual store")
    for name, now in identity.items():
        if manifest[name] != now:
            what = {"tower": "another vision tower", "processor": "other image settings (pixel budget?)"}
            raise DataError(f"{folder} was made with {what[name]}; build it again for this model")
    kind, width = BITS[manifest["dtype"]], sum(manifest["columns"])
    path, expected = folder / TOKENS, manifest["tokens"] * width * kind.itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise DataError(f"{path}: {found} bytes where {expected} should be; build the store again")
    try:
        index = pl.read_parquet(folder / INDEX).sort("key")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{folder / INDEX}: not readable ({error}); build the store again") from None
    if index.height != manifest["images"] or index["tokens"].sum() != manifest["tokens"]:
        raise DataError(f"{folder / INDEX} does not fit the manifest; build the store again")
    return manifest, index, np.memmap(path, kind, "r", shape=(manifest["tokens"], width))


def _key_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(maxsize=2**18)
def _hash_file(path: str, _size: int, _changed: int) -> str:
    return _key_of(read_image_bytes(Path(path)))
