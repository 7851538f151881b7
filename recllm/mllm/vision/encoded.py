"""Visual tokens of the images of a batch: encoded once each and held for a while, or read from a store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recllm.errors import DataError
from recllm.mllm.processor import Picture, forward_names
from recllm.mllm.vision.images import ImageError
from recllm.mllm.vision.store import image_key
from recllm.mllm.vision.tower import VisionTower

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore

_HELD_BYTES = 512 * 2**20


class UnusableImage(DataError):
    """An image whose damage only decoding showed.

    Attributes:
        key: Its key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class StoredImages:
    """Images whose visual tokens a visual store has."""

    def __init__(self, loaded: LoadedModel, store: VisualStore) -> None:
        self._model, self._store = loaded.base_model, store

    def key(self, path: Path) -> str:
        """Returns an image file's key. Raises a DataError where the store does not have it."""
        return self._store.keys_of([path])[0]

    def ahead(self, paths: Mapping[str, Path]) -> dict[str, Future]:
        """Returns nothing: what the store has needs no decoding."""
        return {}

    def grids(self, keys: Sequence[str], pixels: Mapping[str, Future]) -> dict[str, list[int]]:
        """Returns the (time, height, width) in patches of distinct images, where the model goes by it."""
        return _grids_of(keys, self._store.notes(keys))

    def inputs(self, keys: Sequence[str]) -> dict[str, Any]:
        """Returns what the model takes in place of the pixels of images, in the order of their slots."""
        return self._store.mm_inputs(keys, self._model.device, self._model.dtype)

    def close(self) -> None:
        """Does nothing; the store stays open."""


class EncodedImages:
    """Images that the model's vision tower encodes.

    Each is encoded by itself, so that its tokens do not depend, not even in the last bit, on what else is in
    a batch: what was scored before and after an interruption is then the same to the bit. They are held as
    long as the tower stays the same, the latest used up to half a gibibyte.

    Args:
        loaded: The model.
        workers: Threads that decode.
    """

    def __init__(self, loaded: LoadedModel, workers: int) -> None:
        self._loaded = loaded
        self._tower = VisionTower(loaded.model, loaded.processor)
        self._takes = forward_names(loaded.base_model.base_model)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._held: OrderedDict[str, tuple[torch.Tensor, dict[str, Any]]] = OrderedDict()
        self._layout: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}

    key = staticmethod(image_key)

    def ahead(self, paths: Mapping[str, Path]) -> dict[str, Future]:
        """Begins to decode the images of a batch that are not held.

        Args:
            paths: By key.
        """
        self._paths.update(paths)
        return {key: self._pool.submit(self._pixels, key) for key in paths if key not in self._held}

    def grids(self, keys: Sequence[str], pixels: Mapping[str, Future]) -> dict[str, list[int]]:
        """Encodes distinct images where they are not held.

        Args:
            keys: Of the images.
            pixels: What `ahead` returned for them.

        Returns:
            The (time, height, width) in patches of each, where the model goes by it.

        Raises:
            UnusableImage: An image cannot be decoded.
        """
        self._trim()
        notes = [self._encode(key, pixels)[1] for key in keys]
        return _grids_of(keys, {name: [one[name] for one in notes] for name in (notes[0] if notes else ())})

    def inputs(self, keys: Sequence[str]) -> dict[str, Any]:
        """Returns what the model takes in place of the pixels of images, in the order of their slots.

        Args:
            keys: Of images that the last call of `grids` was given.
        """
        if not keys:
            return {}
        rows = [self._held[key][0] for key in keys]
        notes = [self._held[key][1] for key in keys]
        inputs = {
            name: torch.tensor([one[name] for one in notes], device=rows[0].device)
            for name in notes[0]
            if name in self._takes
        }
        return {"mm_encoder_outputs": {"image": self._encoder_output(rows)}, **inputs}

    def close(self) -> None:
        """Ends the threads and lets go of what is held."""
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()

    def _pixels(self, key: str) -> Picture:
        return self._tower.pixels(self._loaded.images.load(self._paths[key]))

    def _encode(self, key: str, pixels: Mapping[str, Future]) -> tuple[torch.Tensor, dict[str, Any]]:
        if key not in self._held:
            try:
                picture = pixels[key].result() if key in pixels else self._pixels(key)
            except ImageError as error:
                raise UnusableImage(key, str(error)) from None
            encoded = self._tower.encode({key: picture})
            self._layout = encoded["layout"]
            self._held[key] = encoded["rows"][0], encoded["notes"][0]
        self._held.move_to_end(key)
        return self._held[key]

    def _trim(self) -> None:
        size = sum(rows.nbytes for rows, _ in self._held.values())
        while size > _HELD_BYTES and len(self._held) > 1:
            _, (rows, _) = self._held.popitem(last=False)
            size -= rows.nbytes

    def _encoder_output(self, images: list[torch.Tensor]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        columns, tile = self._layout["columns"], self._layout["tile"]
        if tile is not None:
            return BaseModelOutputWithPooling(pooler_output=torch.cat(images).reshape(-1, tile, columns[0]))
        projected, *deep = zip(*(rows.split(columns, dim=1) for rows in images), strict=True)
        if not deep:
            return BaseModelOutputWithPooling(pooler_output=projected)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=projected, deepstack_features=deep)


def _grids_of(keys: Sequence[str], notes: Mapping[str, Any]) -> dict[str, list[int]]:
    if "image_grid_thw" not in notes:
        return {}
    return {key: [int(n) for n in grid] for key, grid in zip(keys, notes["image_grid_thw"], strict=True)}
