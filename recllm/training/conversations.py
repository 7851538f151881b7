"""One instruction row to tokens: prompt and completion as the chat template writes them, never cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recllm.builders.instruction_rows import request_of
from recllm.errors import DataError
from recllm.mllm.images import ImageError, image_size
from recllm.mllm.rendering import expand, render, token_ids

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


def encode_conversation(loaded: LoadedModel, row: Mapping[str, Any], folder: Path) -> Conversation:
    """Returns an instruction row in tokens; of its images only the headers are read.

    The prompt's tokens are exactly those that the model sees when it is asked, and all tokens together those
    of the template's rendering of the whole conversation. Where the template ends an answer without a token
    that ends it (LLaVA-1.5's), the tokenizer's end token replaces the white space behind the answer, so that
    the model learns to end.

    Args:
        loaded: The model.
        row: A row of `instructions/<name>/<part>.parquet`.
        folder: The dataset folder.

    Raises:
        DataError: A text holds special tokens, an image cannot be read, the template writes the prompt in
            another way when an answer follows, or the row is longer than the model's positions.
    """
    request = request_of(row, folder)
    completion = _completion_messages(row)
    _check_plain(loaded, request.id, completion)
    prompt_text = render(loaded, request)
    text = loaded.processor.apply_chat_template([*request.messages, *completion], tokenize=False)
    if not text.startswith(prompt_text):
        raise DataError(
            f"sample {request.id!r}: the chat template writes the prompt in another way when an answer "
            "follows, so the model would be trained on a prompt that it is never asked"
        )
    try:
        sizes = [image_size(path) for path in request.images]
    except ImageError as error:
        raise DataError(f"sample {request.id!r}: {error}") from None
    expanded = expand(loaded, prompt_text, sizes)
    prompt = token_ids(loaded, expanded)
    answer = text[len(prompt_text) :]  # which has no images
    tokens = token_ids(loaded, expanded + answer)
    if loaded.tokenizer.eos_token_id is not None and not _ends(loaded, tokens[len(prompt) :]):
        tokens = [*token_ids(loaded, expanded + answer.rstrip()), loaded.tokenizer.eos_token_id]
    if tokens[: len(prompt)] != prompt:
        raise DataError(
            f"sample {request.id!r}: the first token of the completion swallows the end of the prompt; start "
            "the completion with another character"
        )
    if len(tokens) > loaded.max_positions:
        raise DataError(
            f"sample {request.id!r}: {len(tokens):,} tokens, but the model takes {loaded.max_positions:,}; "
            "nothing is cut: build the instructions with --max-prompt-tokens, or allow fewer --max-pixels"
        )
    end = _end_of_turn(loaded, tokens, len(prompt))
    return Conversation(request.id, tokens, len(prompt), end, request.images)


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
            tokens = loaded.tokenizer(part["text"], add_special_tokens=False).input_ids
            found = loaded.special_token_ids.intersection(tokens)
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


def _ends(loaded: LoadedModel, tokens: Sequence[int]) -> bool:
    return any(token in loaded.stop_token_ids for token in tokens)


def _end_of_turn(loaded: LoadedModel, tokens: list[int], start: int) -> int:
    """Returns the place behind the completion's first stop token; behind all tokens where there is none."""
    for place in range(start, len(tokens)):
        if tokens[place] in loaded.stop_token_ids:
            return place + 1
    return len(tokens)
