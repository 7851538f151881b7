"""What goes to a model and what comes back: chats with images as paths, decoding settings, results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from recllm.errors import DataError
from recllm.prompts.safe_text import IMAGE_MARK

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": [part, ...]}`, as chat templates take it.

A part is `{"type": "text", "text": ...}` or `{"type": "image"}`; the n-th image part of a chat shows the n-th
path in the images beside it. TRL's rows have the same form.
"""


def text_part(text: str) -> dict[str, str]:
    """Returns a text part of a message."""
    return {"type": "text", "text": text}


IMAGE_PART = {"type": "image"}


def message(role: str, text: str) -> Message:
    """Returns a message with the given text, and an image part wherever `IMAGE_MARK` stands in it.

    Args:
        role: `system`, `user` or `assistant`.
        text: A filled template; what came from data has gone through `safe_text`.
    """
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append(dict(IMAGE_PART))
        if piece.strip():
            parts.append(text_part(piece))
    return {"role": role, "content": parts}


def hash_of_messages(messages: Sequence[Message]) -> str:
    """Returns a hash of messages without their images: 16 hex digits."""
    return hashlib.sha256(orjson.dumps(messages)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Request:
    """One chat that a model is to continue.

    Attributes:
        id: Names the sample in results and errors, for example an item id.
        messages: The chat; its last message is the user's.
        images: One file for each image part, in order.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "user":
            raise DataError(f"request {self.id!r}: the last message must be the user's")
        slots = sum(part["type"] == "image" for turn in self.messages for part in turn["content"])
        if slots != len(self.images):
            raise DataError(f"request {self.id!r}: {slots} image parts, but {len(self.images)} image files")

    @property
    def prompt_hash(self) -> str:
        """A hash of the messages alone, without the images: 16 hex digits."""
        return hash_of_messages(self.messages)


@dataclass(frozen=True)
class Decoding:
    """How text is decoded: greedily, or by seeded sampling where `temperature` is above zero."""

    max_new_tokens: int = 128
    """The longest text, in tokens."""
    temperature: float = 0.0
    """0 is greedy; above, the usual temperature of sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that has this probability."""
    seed: int = 0
    """Seed of sampling; a text depends on it and on its request, not on what else is in the batch."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens {self.max_new_tokens}: expected 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise DataError(f"temperature {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p {self.top_p}: expected above 0 and at most 1")

    def as_dict(self) -> dict[str, Any]:
        """Returns what decides the text: greedy decoding has no seed and no top_p."""
        return asdict(self) if self.temperature > 0 else {"max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True, slots=True)
class Result:
    """What a model answered to one request.

    Attributes:
        key: The key of the request, see `recllm.mllm.store.request_key`.
        text: The answer without special tokens; empty where there is an error.
        prompt_tokens: Tokens of the prompt, image tokens included.
        completion_tokens: Tokens of the answer, the one that ends it included.
        finish: `stop` (the model ended its turn), `length` (cut at `max_new_tokens`) or `error`.
        error: Why there is no answer: `image: ...` where an image cannot be read, `server: ...` where the
            server refused for good, `budget: ...` where the prompt is longer than the model's context,
            `empty: ...` where the model wrote nothing, or only reasoning; else None.
    """

    key: bytes
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str
    error: str | None = None

    @classmethod
    def failed(cls, key: bytes, error: str) -> Result:
        """Returns the result of a request that got no answer."""
        return cls(key, "", 0, 0, "error", error)


class Backend(Protocol):
    """Something that answers requests: see `recllm.mllm.generation` for the three that there are.

    Attributes:
        identity: What decides an answer besides request and decoding: model, revision or fingerprint of its
            files, adapter, number type, pixel budget. JSON types only; becomes part of each key.
        special_tokens: The special tokens of the tokenizer in use, where it is known; for `safe_text`.
    """

    identity: dict[str, Any]
    special_tokens: tuple[str, ...]

    def generate(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> Iterator[list[Result]]:
        """Answers (key, request) pairs; yields results as they finish, in any order, one a pair."""
        ...

    def show(self, request: Request) -> str:
        """Returns a prompt as the model gets it, for people to read; images as placeholders."""
        ...

    def count_tokens(self, request: Request) -> int | None:
        """Returns a prompt's exact length in tokens, image tokens included; None where it is not known."""
        ...
