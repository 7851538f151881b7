"""A backend that answers by rule and remembers what it was asked, and small datasets for builders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image

from recllm.data.dataset import Dataset, write_dataset
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.mllm.chat import Decoding, Request, Result


class RuleBackend:
    """Answers `<n>:` and the last words of the prompt, and keeps every request that it was given."""

    special_tokens = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"model": "rule"}
        self.asked: list[Request] = []

    def generate(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> Iterator[list[Result]]:
        for key, request in requests:
            self.asked.append(request)
            for path in request.images:
                path.read_bytes()
            words = words_of(request.messages).split()
            answer = f"{len(words)} words, then {' '.join(words[-6:])}"
            yield [Result(key, answer, len(words), 8, "stop")]

    def count_tokens(self, request: Request) -> int | None:
        return len(words_of(request.messages).split())

    def show(self, request: Request) -> str:
        return words_of(request.messages)


def words_of(messages: Sequence[dict[str, Any]]) -> str:
    """All text of a chat, turn by turn."""
    parts = [part.get("text") or "[image]" for message in messages for part in message["content"]]
    return "\n".join(parts)


def write_world(
    out: Path,
    *,
    users: int = 12,
    length: int = 9,
    mark: dict[str, str] | None = None,
    title: str = "Thing",
) -> Dataset:
    """Writes a log in which every user's last two items are hers alone, so that no training part has them.

    Args:
        out: The dataset folder.
        users: How many.
        length: Interactions of a user.
        mark: Words for what belongs to `valid` (the last but one) and `test` (the last): they stand in the
            item's id, title, text, category, picture's name, and in the review.
        title: Beginning of each title.
    """
    mark = {"train": "common", "valid": "later", "test": "latest", **(mark or {})}
    items, log = [], []
    shared = [f"common{number}" for number in range(3 * length)]
    for number, item in enumerate(shared):
        items.append(
            (item, f"{title} {number}", "Made to last.", ["all", f"kind{number % 3}"], [f"images/{item}.png"])
        )
    for user in range(users):
        history = [shared[(user * 5 + 2 * place) % len(shared)] for place in range(length - 2)]
        for part in ("valid", "test"):
            item = f"{mark[part]}-of-{user}"
            items.append(
                (item, f"{mark[part]} title", f"{mark[part]} text", [mark[part]], [f"images/{item}.png"])
            )
            history.append(item)
        parts = ["train"] * (length - 2) + ["valid", "test"]
        for place, (item, part) in enumerate(zip(history, parts, strict=True)):
            log.append((f"user{user}", item, 1_600_000_000 + 1000 * user + place, 5.0, f"{mark[part]} strap"))

    def stage(folder: Path) -> None:
        (folder / "images").mkdir()
        for number, row in enumerate(items):
            color = (number % 256, 90, 150)
            Image.new("RGB", (56, 56), color).save(folder / row[4][0])

    return write_dataset(
        out,
        items=pl.DataFrame(items, schema=["item", "title", "text", "categories", "images"], orient="row"),
        interactions=pl.DataFrame(
            log, schema=["user", "item", "timestamp", "rating", "review"], orient="row"
        ),
        users=pl.DataFrame(
            {
                "user": [f"user{n}" for n in range(users)],
                "profile": [f"Reads {n} books." for n in range(users)],
            }
        ),
        source={"made": "by a test"},
        stage=stage,
    )


def split_of(dataset: Dataset, method: str = "loo", **options: Any) -> Split:
    """Splits a dataset under the method's name."""
    return make_split(dataset, SplitOptions(dataset.folder, method, name=method, **options))
