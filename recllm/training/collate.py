"""Rows in tokens to a training batch, padded or packed: labels on completions alone, images decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from recllm.errors import DataError
from recllm.mllm.processor import Picture, count_tokens, join, prepare, token_kinds
from recllm.mllm.rendering import encode_expanded, expand
from recllm.mllm.vision.images import ImageError
from recllm.training.packing import BLANK, IGNORED, group_alone, groups_of, pack

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore

IMAGE_KEYS = "image_keys"
"""Where a batch names its images in the visual store; the trainer puts their stored tokens in its place."""
_BLANK = Image.new("RGB", (56, 56))


class Collator:
    """Makes batches of rows of `recllm.training.rows.training_rows`.

    Args:
        loaded: The model; its processor prepares the images.
        visual_store: Name images by their key in this store instead of decoding them.
        blank_image: Where a batch has no image, run a blank one through the tower, its tokens in padding that
            no other token attends to: it changes no value, and keeps all ranks in step. ZeRO-3 gathers the
            tower's weights from all ranks whenever one of them runs it, and DDP waits for a gradient of each
            trained weight; on a rank that passes the tower by, both would wait for ever. Ours.
        share_prefixes: Pack a batch into one row, where neighbors of one `group` share what their prompts
            begin with; see `recllm.mllm.prefix.attention`. Ours.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        visual_store: VisualStore | None = None,
        blank_image: bool = False,
        share_prefixes: bool = False,
    ):
        self._loaded, self._store, self._shares = loaded, visual_store, share_prefixes
        self._pad = loaded.tokenizer.pad_token_id
        self._blank_tokens = _tokens_of_blank(loaded) if blank_image and visual_store is None else []

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a batch: input_ids, attention_mask and labels, each (rows, longest), token kinds and pixels
        where the model takes them, or `IMAGE_KEYS` with a visual store. Packed: input_ids and labels (1,
        tokens), position_ids (axes, 1, tokens), layout, and images as before, shared ones once.

        Raises:
            DataError: An image cannot be read, or the sample has not as many image tokens as it has features.
        """
        if self._shares:
            return self._packed(rows)
        tokens = [list(row["input_ids"]) for row in rows]
        attended = [len(each) for each in tokens]
        pixels = self._images(rows)
        if self._blank_tokens and not pixels:
            shortest = min(range(len(tokens)), key=lambda place: attended[place])
            tokens[shortest] += self._blank_tokens
            pixels = self._joined([prepare(self._loaded.processor, _BLANK)])
        shape = len(rows), max(map(len, tokens))
        batch = {
            "input_ids": torch.full(shape, self._pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for place, (row, each) in enumerate(zip(rows, tokens, strict=True)):
            batch["input_ids"][place, : len(each)] = torch.tensor(each)
            batch["attention_mask"][place, : attended[place]] = 1
            labeled = slice(row["start"], row["end"])
            batch["labels"][place, labeled] = batch["input_ids"][place, labeled]
        return batch | token_kinds(self._loaded.processor, batch["input_ids"]) | pixels

    def _packed(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shown, grids, features = self._distinct_images(rows)
        groups = groups_of(rows, self._loaded.image_token_id, features)
        if self._blank_tokens and not shown:
            shown[BLANK] = prepare(self._loaded.processor, _BLANK)
            grids |= _grid_of(BLANK, shown[BLANK].tensors)
            groups.append(group_alone(self._blank_tokens, self._loaded.image_token_id))
        batch, images = pack(self._loaded, rows, groups, grids)
        if self._store is not None:
            return batch | {IMAGE_KEYS: self._store.keys_of(map(Path, images))}
        return batch | self._joined([shown[image] for image in images])

    def _distinct_images(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
        """Returns by path each prepared image (its key, with a visual store), its grid where there are grids,
        and how many visual features it has."""
        shown, grids, features = {}, {}, {}
        for row in rows:
            for path in row["images"]:
                if path in shown:
                    continue
                if self._store is not None:
                    key = shown[path] = self._store.keys_of([Path(path)])[0]
                    grids |= _grid_of(path, self._store.notes([key]))
                    features[path] = len(self._store.features(key))
                else:
                    shown[path] = self._prepared(row["id"], Path(path))
                    grids |= _grid_of(path, shown[path].tensors)
                    features[path] = self._features(shown[path])
            self._check_count(row, sum(features[path] for path in row["images"]))
        return shown, grids, features

    def _images(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self._store is not None:
            keys = [self._store.keys_of(map(Path, row["images"])) for row in rows]
            for row, each in zip(rows, keys, strict=True):
                self._check_count(row, sum(len(self._store.features(key)) for key in each))
            return {IMAGE_KEYS: [key for each in keys for key in each]}
        pictures = []
        for row in rows:
            shown = [self._prepared(row["id"], Path(path)) for path in row["images"]]
            self._check_count(row, sum(self._features(one) for one in shown))
            pictures += shown
        return self._joined(pictures)

    def _prepared(self, name: str, path: Path) -> Picture:
        try:
            return prepare(self._loaded.processor, self._loaded.images.load(path))
        except ImageError as error:
            raise DataError(f"sample {name!r}: {error}") from None

    def _features(self, picture: Picture) -> int:
        return count_tokens(self._loaded.processor, picture.text, self._loaded.image_token_id)

    def _joined(self, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        return join([picture.tensors for picture in pictures], self._loaded.forward_names)

    def _check_count(self, row: Mapping[str, Any], features: int) -> None:
        tokens = sum(token == self._loaded.image_token_id for token in row["input_ids"])
        if tokens != features:
            raise DataError(
                f"sample {row['id']!r}: {tokens} image tokens for {features} visual features; an image was "
                f"changed since the rows were read ({', '.join(row['images'])}): start the run again with "
                "--overwrite"
            )


def _tokens_of_blank(loaded: LoadedModel) -> list[int]:
    text = expand(loaded, loaded.processor.image_token, [_BLANK.size])
    return encode_expanded(loaded, [text])["input_ids"][0].tolist()


def _grid_of(path: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    return {path: notes["image_grid_thw"][0].tolist()} if "image_grid_thw" in notes else {}
