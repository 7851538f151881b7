"""From rows of instructions to tokens, and from tokens to groups of prompts that share their beginning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recllm.data.image_hashes import ImageHashes
from recllm.data.prompt_files import FILE_ROW, image_paths
from recllm.errors import DataError
from recllm.mllm.chat import IMAGE_PART, Message, Request, text_part
from recllm.mllm.prefix.groups import Prompt, contents_of
from recllm.mllm.rendering import refuse_open_reasoning, render_tokens
from recllm.mllm.vision.images import ImageError, image_size, map_in_threads, resolve_image
from recllm.mllm.vision.slots import ImageSlots

if TYPE_CHECKING:
    import polars as pl

    from recllm.mllm.loading import LoadedModel

COLUMNS = ("id", "user", "target", "item", "label", "prompt", "images")
"""What is read of instruction rows; `target_row`, where there is one, tells targets of one item apart."""
UNIT = 32
"""Groups whose batches are formed together, and which one rank scores."""
_NAMED = 5


def group_rows(rows: pl.DataFrame, *, prompts_on_disk: bool = False) -> list[list[int]]:
    """Returns the row numbers of each (user, target), groups in the order of their first rows.

    Args:
        rows: Rows of instructions.
        prompts_on_disk: The table has no prompts, but the numbers of its rows in a file that has them.

    Raises:
        DataError: A column is missing.
    """
    import polars as pl

    needed = [FILE_ROW if name == "prompt" and prompts_on_disk else name for name in COLUMNS]
    if missing := [name for name in needed if name not in rows.columns]:
        raise DataError(
            f"the table to score has no column {missing[0]!r}; expected rows of instructions, as "
            "`recllm build instructions` writes them"
        )
    keys = [name for name in ("user", "target_row", "target") if name in rows.columns]
    numbered = rows.select(keys).with_row_index("row")
    return numbered.group_by(keys, maintain_order=True).agg(pl.col("row"))["row"].to_list()


def units_of(groups: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    """Yields `UNIT` groups at a time: what is batched together, whoever scores it and however often."""
    for start in range(0, len(groups), UNIT):
        yield [list(group) for group in groups[start : start + UNIT]]


def image_sizes(rows: pl.DataFrame, folder: Path, workers: int = 2) -> dict[str, tuple[int, int]]:
    """Returns the (width, height) of every image of the rows, by its relative path; only headers are read.

    Raises:
        DataError: Some cannot be read; they are named, with the first sample that shows each.
    """
    shown = rows.select("id", "images").explode("images", empty_as_null=True).drop_nulls("images")
    first = shown.unique("images", keep="first", maintain_order=True)

    def size_of(path: str) -> tuple[int, int] | ImageError:
        try:
            return image_size(resolve_image(folder, path))
        except ImageError as error:
            return error

    found = dict(map_in_threads(size_of, first["images"].to_list(), workers))
    if unreadable := [
        f"sample {name!r}: {found[path]}"
        for name, path in first.select("id", "images").iter_rows()
        if isinstance(found[path], ImageError)
    ]:
        raise DataError(
            f"{len(unreadable)} images cannot be read: {'; '.join(unreadable[:_NAMED])}. Mend the files, or "
            "build the instructions again, which leaves unusable images out."
        )
    return found


def digest_of_images(rows: pl.DataFrame, folder: Path, workers: int = 2) -> str:
    """Returns a hash of the contents of all images of the rows; what is no file counts as such."""

    hashes = ImageHashes(folder)

    def content(path: str) -> str:
        file = resolve_image(folder, path)
        return f"{path} {hashes(file) if file.is_file() else None}"

    shown = image_paths(rows).sort()
    lines = (line for _, line in map_in_threads(content, shown, workers))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    hashes.save()
    return digest


class PromptReader:
    """Makes prompts of rows.

    Args:
        loaded: The model.
        folder: The dataset folder, which image paths are relative to.
        sizes: What `image_sizes` returned.
        key_of: Returns an image file's key, equal for equal contents.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        folder: Path,
        sizes: Mapping[str, tuple[int, int]],
        key_of: Callable[[Path], str],
    ) -> None:
        self._loaded, self._folder, self._sizes, self._key_of = loaded, folder, sizes, key_of
        self._known: dict[str, tuple[str, int]] = {}  # image path -> its key, and the number of its content
        self._numbers: dict[str, int] = {}
        self._slots = ImageSlots(loaded)
        self.paths: dict[str, Path] = {}
        """A file of each image key met so far."""

    def read(self, row: int, content: Mapping[str, Any]) -> Prompt:
        """Returns the prompt of a row.

        Raises:
            DataError: A text forges special tokens, or the prompt is longer than the model's context.
        """
        loaded = self._loaded
        images = content["images"]
        known = [self._image(path) for path in images]
        request = Request(content["id"], messages_of(content), tuple(self.paths[key] for key, _ in known))
        text, tokens = render_tokens(loaded, request)
        refuse_open_reasoning(text, request.id)
        sizes = [self._sizes[path] for path in images]
        tokens = self._slots.tokens(text, tokens, sizes)
        if len(tokens) > loaded.max_positions:
            raise DataError(
                f"sample {request.id!r}: its prompt has {len(tokens):,} tokens, but the model takes "
                f"{loaded.max_positions:,}; build the instructions with --max-prompt-tokens"
            )
        numbers, counts = [number for _, number in known], [self._slots.features(size) for size in sizes]
        contents, ends = contents_of(tokens, loaded.image_token_id, numbers, counts)
        return Prompt(row, request.id, tokens, contents, tuple(key for key, _ in known), ends)

    def _image(self, path: str) -> tuple[str, int]:
        if path not in self._known:
            file = resolve_image(self._folder, path)
            key = self._key_of(file)
            self.paths.setdefault(key, file)
            self._known[path] = key, self._numbers.setdefault(key, len(self._numbers))
        return self._known[path]


def messages_of(content: Mapping[str, Any]) -> tuple[Message, ...]:
    """Returns the chat of a row that was read from disk, where text parts and image parts have one form."""
    return tuple(
        {
            "role": turn["role"],
            "content": [
                dict(IMAGE_PART) if part["type"] == "image" else text_part(part["text"])
                for part in turn["content"]
            ],
        }
        for turn in content["prompt"]
    )
