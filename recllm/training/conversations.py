"""One instruction row to tokens: prompt and completion as the chat template writes them, never cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recllm.errors import DataError
from recllm.mllm.chat import Request
from recllm.mllm.rendering import apply_template, render_tokens, token_array
from recllm.mllm.scoring.prompts import messages_of
from recllm.mllm.tokens import part_tokenizer
from recllm.mllm.vision.images import ImageError, image_size, resolve_image
from recllm.mllm.vision.slots import ImageSlots

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row in tokens.

    Attributes:
        id: The row's id.
        tokens: The whole conversation, image tokens included.
        start: Where the completion starts.
        end: Behind the token that ends the completion's turn; what the template writes after it is no label.
        images: The files of its images, in order.
    """

    id: str
    tokens: list[int]
    start: int
    end: int
    images: tuple[Path, ...]


class ConversationEncoder:
    """Turns instruction rows into tokens; of each image only the header is read, once.

    Args:
        loaded: The model.
        folder: The dataset folder.
    """

    def __init__(self, loaded: LoadedModel, folder: Path) -> None:
        self._loaded, self._folder = loaded, folder
        self._slots = ImageSlots(loaded)
        self._images: dict[str, tuple[Path, tuple[int, int]]] = {}

    def encode(self, row: Mapping[str, Any]) -> Conversation:
        """Returns an instruction row in tokens.

        The prompt's tokens are exactly those that the model sees when it is asked, and all tokens together
        those of the template's rendering of the whole conversation. Where the template ends an answer without
        a token that ends it (LLaVA-1.5's), the tokenizer's end token replaces the white space behind the
        answer, so that the model learns to end.

        Args:
            row: A row of `instructions/<name>/<part>.parquet`.

        Raises:
            DataError: A text holds special tokens, an image cannot be read, the template writes the prompt in
                another way when an answer follows, or the row is longer than the model's positions.
        """
        loaded, name = self._loaded, row["id"]
        try:
            images = [self._image(path) for path in row["images"]]
        except ImageError as error:
            raise DataError(f"sample {name!r}: {error}") from None
        request = Request(name, messages_of(row), tuple(file for file, _ in images))
        completion = _completion_messages(row)
        _check_plain(loaded, name, completion)
        prompt_text, prompt = render_tokens(loaded, request)
        text = apply_template(loaded, [*request.messages, *completion], name, opened=False)
        if not text.startswith(prompt_text):
            raise DataError(
                f"sample {name!r}: the chat template writes the prompt in another way when an answer "
                "follows, so the model would be trained on a prompt that it is never asked"
            )
        sizes = [size for _, size in images]
        prompt = self._slots.tokens(prompt_text, prompt, sizes)
        tokens = self._slots.tokens(text, token_array(loaded, text), sizes)  # a completion has no images
        if loaded.tokenizer.eos_token_id is not None and not _ends(loaded, tokens[len(prompt) :]):
            text = prompt_text + text[len(prompt_text) :].rstrip()
            tokens = self._slots.tokens(text, token_array(loaded, text), sizes)
            tokens = np.append(tokens, loaded.tokenizer.eos_token_id)
        if not np.array_equal(tokens[: len(prompt)], prompt):
            raise DataError(
                f"sample {name!r}: the first token of the completion swallows the end of the prompt; start "
                "the completion with another character"
            )
        if len(tokens) > loaded.max_positions:
            raise DataError(
                f"sample {name!r}: {len(tokens):,} tokens, but the model takes {loaded.max_positions:,}; "
                "nothing is cut: build the instructions with --max-prompt-tokens, or allow fewer --max-pixels"
            )
        end = _end_of_turn(loaded, tokens, len(prompt))
        return Conversation(name, tokens.tolist(), len(prompt), end, request.images)

    def _image(self, path: str) -> tuple[Path, tuple[int, int]]:
        if path not in self._images:
            file = resolve_image(self._folder, path)
            self._images[path] = file, image_size(file)
        return self._images[path]


def encode_conversation(loaded: LoadedModel, row: Mapping[str, Any], folder: Path) -> Conversation:
    """Returns one instruction row in tokens, see `ConversationEncoder.encode`."""
    return ConversationEncoder(loaded, folder).encode(row)


def _completion_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = [
        {"role": turn["role"], "content": [dict(part) for part in turn["content"]]}
        for turn in row["completion"]
    ]
    plain = len(messages) == 1 and messages[0]["role"] == "assistant"
    if not plain or any(part["type"] != "text" for part in messages[0]["content"]):
        raise DataError(f"sample {row['id']!r}: expected a completion of one assistant turn of text")
    return messages


def _check_plain(loaded: LoadedModel, name: str, messages: Sequence[Mapping[str, Any]]) -> None:
    for turn in messages:
        for part in turn["content"]:
            tokens = part_tokenizer(loaded.tokenizer).ids(part["text"], special=False)
            found = loaded.special_token_ids.intersection(tokens.tolist())
            if found:
                raise DataError(
                    f"sample {name!r}: the completion holds the special token "
                    f"{loaded.tokenizer.decode([min(found)])!r}, which would change the chat's turns; put "
                    "text from data through safe_text"
                )
            if marks := [mark for mark in loaded.turn_marks if mark in f" {part['text']}"]:
                raise DataError(
                    f"sample {name!r}: the completion holds the turn mark {marks[0].strip()!r}, which would "
                    "change the chat's turns; put text from data through safe_text"
                )


def _ends(loaded: LoadedModel, tokens: np.ndarray) -> bool:
    return bool(np.isin(tokens, loaded.stop_token_ids).any())


def _end_of_turn(loaded: LoadedModel, tokens: np.ndarray, start: int) -> int:
    """Returns the place behind the completion's first stop token; behind all tokens where there is none."""
    for place in range(start, len(tokens)):
        if tokens[place] in loaded.stop_token_ids:
            return place + 1
    return len(tokens)
