"""Chain of thought in the model's own words: earlier answers of a prompt are generated, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from recllm.data.image_hashes import ImageHashes
from recllm.errors import DataError
from recllm.mllm.chat import Decoding, Message, Request, text_part
from recllm.mllm.generation.run import generate
from recllm.mllm.scoring.prompts import messages_of
from recllm.mllm.vision.images import resolve_image
from recllm.prompts.safe_text import safe_text

if TYPE_CHECKING:
    from recllm.mllm.generation.in_process import InProcessBackend
    from recllm.mllm.store import GenerationStore


def with_generated_steps(
    rows: pl.DataFrame,
    folder: Path,
    backend: InProcessBackend,
    store: GenerationStore,
    max_new_tokens: int,
) -> pl.DataFrame:
    """Returns the rows with the assistant's turns of each prompt as the model answers them, greedily.

    The first answer is generated from what stands before it, the second from what stands before it with the
    first answer in its place, and so on (VIU, IMSG, TUBC). Only answers change: a user's turn stays as it was
    built, also where it quotes an answer (IMSG quotes what VIU wrote when the texts were made). A beginning
    that several prompts share is continued once. Answers go through `safe_text`. Ours.

    Args:
        rows: As in `instructions/<name>/<part>.parquet`.
        folder: The dataset folder.
        backend: Generates with the model that is to be scored.
        store: Keeps the answers by content, so that a run that is repeated generates nothing again.
        max_new_tokens: The longest answer.

    Raises:
        DataError: An answer cannot be generated; the sample is named.
    """
    chats = [list(messages_of(row)) for row in rows.select("prompt").iter_rows(named=True)]
    images = rows["images"].to_list()
    hashes = ImageHashes(folder)
    step = 0
    while waiting := [
        (row, turn) for row, chat in enumerate(chats) if (turn := _answer(chat, step)) is not None
    ]:
        requests: dict[tuple[str, tuple[str, ...]], Request] = {}
        keys = []
        for row, turn in waiting:
            request = _request(
                f"{rows['id'][row]}, answer {step + 1}", chats[row][:turn], images[row], folder
            )
            key = request.prompt_hash, tuple(map(str, request.images))
            keys.append(key)
            requests.setdefault(key, request)
        generated = generate(
            list(requests.values()),
            backend,
            store,
            Decoding(max_new_tokens),
            progress=f"step {step + 1}",
            image_hashes=hashes,
        )
        texts = {}
        for key, (name, result) in zip(requests, generated.results(), strict=True):
            if result.error is not None:
                raise DataError(f"sample {name}: cannot be generated: {result.error}")
            texts[key] = safe_text(result.text, special_tokens=backend.special_tokens)
        for (row, turn), key in zip(waiting, keys, strict=True):
            chats[row][turn] = {"role": "assistant", "content": [text_part(texts[key])]}
        step += 1
    prompts: list[Any] = [
        [{**turn, "content": [{"text": None, **part} for part in turn["content"]]} for turn in chat]
        for chat in chats
    ]
    return rows.with_columns(pl.Series("prompt", prompts, dtype=rows.schema["prompt"]))


def _answer(chat: Sequence[Message], step: int) -> int | None:
    turns = [place for place, turn in enumerate(chat) if turn["role"] == "assistant"]
    return turns[step] if step < len(turns) else None


def _request(name: str, messages: Sequence[Message], images: Sequence[str], folder: Path) -> Request:
    shown = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    return Request(name, tuple(messages), tuple(resolve_image(folder, path) for path in images[:shown]))
