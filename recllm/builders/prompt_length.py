"""How long a chat is in tokens, images included, before any pixel is decoded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from recllm.builders.chats import Chat
from recllm.mllm.chat import Request
from recllm.mllm.rendering import count_tokens, expand, render
from recllm.mllm.vision.images import image_size


class PromptLength:
    """Counts the tokens of chats with the processor of a model; no weights are loaded.

    Args:
        name: Hub id, local folder, or `tiny`.
        folder: The dataset folder, which image paths are relative to.
        min_pixels: Least pixels of an image; None for the processor's.
        max_pixels: Most pixels of an image; None for the default of `recllm.mllm.loading.load`.

    Raises:
        DataError: The processor cannot be loaded.
    """

    def __init__(
        self, name: str, folder: Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        from recllm.mllm.loading import load_processor

        self._loaded = load_processor(name, min_pixels=min_pixels, max_pixels=max_pixels)
        self._folder = folder
        self._size = lru_cache(maxsize=65_536)(lambda image: image_size(folder / image))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens of the model."""
        return self._loaded.special_tokens

    def of(self, identifier: str, chat: Chat) -> int:
        """Returns the length of a chat in tokens, the opening of the answer included.

        Args:
            identifier: Names the chat in errors.
            chat: The chat.
        """
        sizes = [self._size(each) for each in chat.images]
        return count_tokens(self._loaded, expand(self._loaded, self.text(identifier, chat), sizes))

    def text(self, identifier: str, chat: Chat) -> str:
        """Returns the chat as the model reads it, a placeholder for each image."""
        images = tuple(self._folder / image for image in chat.images)
        return render(self._loaded, Request(identifier, chat.messages, images))
