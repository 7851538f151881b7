"""Prompts of TRL's trainer to model inputs, by the same code that writes them for `recllm build items`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recllm.mllm.chat import IMAGE_PART
from recllm.mllm.processor import fill, join, prepare
from recllm.mllm.rendering import apply_template, encode_expanded

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel


class PathEncoder:
    """Encodes texts whose images are given as paths; each different image of a batch is decoded once.

    Files are decoded as everywhere in recllm (transparency, rotation, broken and huge files), at the pixel
    budget of the processor.

    Args:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def texts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[Any]]]:
        """Returns chats as the template writes them, and the images (paths) that their parts name."""
        texts, images = [], []
        for prompt in prompts:
            plain, shown = [], []
            for turn in prompt:
                parts = []
                for part in turn["content"]:
                    if part["type"] == "image":
                        shown.append(part["image"])
                        parts.append(dict(IMAGE_PART))
                    else:
                        parts.append(part)
                plain.append({**turn, "content": parts})
            texts.append(apply_template(self._loaded, plain, "prompt"))
            images.append(shown)
        return texts, images

    def encode(self, texts: Sequence[str], images: Sequence[Sequence[Any] | None]) -> dict[str, Any]:
        """Returns model inputs, padded on the left.

        Args:
            texts: Chats as the template writes them, a placeholder an image.
            images: The images of each, as paths or decoded.
        """
        loaded, processor = self._loaded, self._loaded.processor
        ready: dict[Any, Any] = {}
        shown = []
        for each in images:
            for image in each or ():
                key = image if isinstance(image, str) else id(image)
                if key not in ready:
                    ready[key] = prepare(processor, self.decode(image))
                shown.append(ready[key])
        taken = iter(shown)
        expanded = [
            fill(processor, text, [next(taken).text for _ in each or ()])
            for text, each in zip(texts, images, strict=True)
        ]
        pixels = join([picture.tensors for picture in shown], loaded.forward_names)
        return {**encode_expanded(loaded, expanded), **pixels}

    def decode(self, image: Any) -> Any:
        """Returns an image that is given as a path in pixels, and others as they are."""
        return self._loaded.images.load(Path(image)) if isinstance(image, str) else image

    def processor(self) -> Any:
        """Returns the model's processor, which takes images as paths when it is called.

        Raises:
            RuntimeError: It pads on the right: TRL pads prompts on the left, and positions would be shifted.
        """
        whole = self._loaded.processor
        if whole.tokenizer.padding_side != "left":
            raise RuntimeError("the processor pads on the right; GRPO needs left padding")
        encode = self.encode

        class Reading(type(whole)):
            def __call__(self, images: Any = None, text: Any = None, **named: Any) -> Any:
                from transformers import BatchFeature

                if images is None or text is None:
                    return super().__call__(images=images, text=text, **named)
                return BatchFeature(encode(text, images))

        Reading.__name__ = type(whole).__name__  # is saved with checkpoints
        reading = copy.copy(whole)
        reading.__class__ = Reading
        return reading
