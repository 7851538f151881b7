"""Rows in tokens to a training batch, padded or packed: labels on completions alone, images decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from recllm.errors import DataError
from recllm.mllm.images import ImageError
from recllm.mllm.rendering import encode_expanded, expand
from recllm.training.packing import BLANK, IGNORED, group_alone, groups_of, pack

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.visual_store import VisualStore

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
            begin with; see `recllm.mllm.scoring.attention`. Ours.
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
        self._kinds = _name_of_kinds(loaded.processor)
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
            pixels = self._joined([self._pixels(_BLANK)])
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
        if self._kinds is not None:
            kinds = self._loaded.processor.create_mm_token_type_ids(batch["input_ids"].tolist())
            batch[self._kinds] = torch.tensor(kinds)
        return batch | pixels

    def _packed(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shown, grids = self._distinct_images(rows)
        groups = groups_of(rows, self._loaded.image_token_id)
        if self._blank_tokens and not shown:
            shown[BLANK] = self._pixels(_BLANK)
            grids[BLANK] = shown[BLANK]["image_grid_thw"][0].tolist()
            groups.append(group_alone(self._blank_tokens, self._loaded.image_token_id))
        batch, images = pack(self._loaded, rows, groups, grids)
        if self._store is not None:
            return batch | {IMAGE_KEYS: self._store.keys_of(map(Path, images))}
        return batch | self._joined([shown[image] for image in images])

    def _distinct_images(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns each image's tensors (its key, with a visual store), and its grid where there are grids."""
        shown, grids = {}, {}
        for row in rows:
            for path in row["images"]:
                if path in shown:
                    continue
                if self._store is not None:
                    key = shown[path] = self._store.keys_of([Path(path)])[0]
                    notes = self._store.notes([key])
                else:
                    notes = shown[path] = self._pixels(self._decode(row["id"], Path(path)))
                if "image_grid_thw" in notes:
                    grids[path] = notes["image_grid_thw"][0].tolist()
            if self._store is not None:
                counts = [len(self._store.features(shown[path])) for path in row["images"]]
            else:
                counts = [self._features(shown[path]) for path in row["images"]]
            self._check_count(row, sum(counts))
        return shown, grids

    def _images(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self._store is not None:
            keys = [self._store.keys_of(map(Path, row["images"])) for row in rows]
            for row, each in zip(rows, keys, strict=True):
                self._check_count(row, sum(len(self._store.features(key)) for key in each))
            return {IMAGE_KEYS: [key for each in keys for key in each]}
        tensors = []
        for row in rows:
            shown = [self._pixels(self._decode(row["id"], Path(path))) for path in row["images"]]
            self._check_count(row, sum(self._features(one) for one in shown))
            tensors += shown
        return self._joined(tensors)

    def _decode(self, name: str, path: Path) -> Image.Image:
        try:
            return self._loaded.images.load(path)
        except ImageError as error:
            raise DataError(f"sample {name!r}: {error}") from None

    def _pixels(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Returns the processor's tensors of one image."""
        processor = self._loaded.processor
        settings = processor._merge_kwargs(
            tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt"
        )["images_kwargs"]
        tensors, _ = processor._process_images([image], **settings)
        return {name: torch.as_tensor(value) for name, value in tensors.items()}

    def _features(self, pixels: Mapping[str, torch.Tensor]) -> int:
        """Returns how many visual features the tower makes of one image."""
        processor = self._loaded.processor
        if "image_grid_thw" in pixels:
            return int(pixels["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
        return len(pixels["pixel_values"]) * processor.image_seq_length

    def _joined(self, tensors: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if not tensors:
            return {}
        unused = self._loaded.processor.unused_input_names
        return {name: torch.cat([one[name] for one in tensors]) for name in tensors[0] if name not in unused}

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


def _name_of_kinds(processor: Any) -> str | None:
    """Returns under which name the model takes which tokens stand for images; None where it does not."""
    if not getattr(processor, "return_mm_token_type_ids", False):
        return None
    return "mm_token_type_ids" if "mm_token_type_ids" in processor.model_input_names else "token_type_ids"
