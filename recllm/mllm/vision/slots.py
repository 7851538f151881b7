"""From tokens with one placeholder for each image to tokens with as many as its size takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recllm.mllm.processor import count_tokens, fill
from recllm.mllm.rendering import expand, token_array
from recllm.mllm.tokens import part_tokenizer

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel


class ImageSlots:
    """Does what `recllm.mllm.rendering.expand` does, but asks the processor once for each size.

    Args:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._mark = loaded.processor.image_token
        self._texts: dict[tuple[int, int], str] = {}
        self._features: dict[tuple[int, int], int] = {}
        self._tokens: dict[tuple[int, int], np.ndarray | None] = {}
        alone = part_tokenizer(loaded.tokenizer).alone(self._mark)
        self._mark_id = int(alone[0]) if alone is not None and len(alone) == 1 else None

    def text(self, text: str, sizes: Sequence[tuple[int, int]]) -> str:
        """Returns a rendered chat with each placeholder replaced by its image's tokens, as text."""
        return fill(self._loaded.processor, text, [self._text(size) for size in sizes])

    def tokens(self, text: str, tokens: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Returns the tokens of `self.text(text, sizes)`: (tokens,) int64.

        Args:
            text: A rendered chat, or a beginning of one.
            tokens: Its tokens.
            sizes: (width, height) of each image of the text.
        """
        slots = [self._slot(size) for size in sizes]
        if self._mark_id is None or any(slot is None for slot in slots):
            return token_array(self._loaded, self.text(text, sizes))
        parts, start = [], 0
        for place, slot in zip(np.flatnonzero(tokens == self._mark_id).tolist(), slots, strict=True):
            parts += [tokens[start:place], slot]
            start = place + 1
        return np.concatenate([*parts, tokens[start:]])

    def features(self, size: tuple[int, int]) -> int:
        """Returns how many visual features an image of this size has room for."""
        if size not in self._features:
            loaded = self._loaded
            self._features[size] = count_tokens(loaded.processor, self._text(size), loaded.image_token_id)
        return self._features[size]

    def _slot(self, size: tuple[int, int]) -> np.ndarray | None:
        """Returns the tokens of an image of this size; None where they depend on the text beside them."""
        if size not in self._tokens:
            self._tokens[size] = part_tokenizer(self._loaded.tokenizer).alone(self._text(size))
        return self._tokens[size]

    def _text(self, size: tuple[int, int]) -> str:
        if size not in self._texts:
            self._texts[size] = expand(self._loaded, self._mark, [size])
        return self._texts[size]
