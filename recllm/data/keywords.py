"""The contract of `texts/<keywords>.parquet`: lists of keywords about items (MMSRARec, stage 1).

| column     | meaning                                                                                       |
|------------|-----------------------------------------------------------------------------------------------|
| `id`       | the item's id; an item without keywords has no row                                            |
| `keywords` | its keywords, in order, each once                                                             |

Further columns may say where they are from (`image_keywords`, `text_keywords`). The parquet metadata
`recllm.keywords` is JSON with `data_hash`, and `special_tokens` of the model that wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.origins import Origin, check_same_origin
from recllm.data.tables import read_table
from recllm.data.texts import near_texts, text_path
from recllm.errors import DataError
from recllm.files import sha256, write_file

KEYWORDS_KEY = "recllm.keywords"


@dataclass(frozen=True)
class ItemKeywords:
    """The keywords of the items of a dataset.

    Attributes:
        name: The file's name without its suffix.
        sha256: Hash of the file.
        words: A list for each item code, empty if the file has none. They come from a model: what is shown
            of them must go through `safe_text`.
        special_tokens: Those of the model that wrote them.
    """

    name: str
    sha256: str
    words: Sequence[Sequence[str]]
    special_tokens: tuple[str, ...] = ()

    @classmethod
    def open(cls, dataset: Dataset, name: str) -> ItemKeywords:
        """Reads DATASET/texts/<name>.parquet.

        Raises:
            DataError: The file is missing, is not one of keywords, was made from another state of the
                dataset, or has an item twice.
        """
        path = text_path(dataset.folder, name)
        if not path.is_file():
            raise DataError(
                f"{path} does not exist{near_texts(path)}; write it first: recllm build items "
                f"{dataset.folder} --system mmsrarec --model NAME"
            )
        frame, metadata = read_table(path)
        if frame.schema.get("id") != pl.String or frame.schema.get("keywords") != pl.List(pl.String):
            raise DataError(
                f"{path} is not a file of keywords: expected the columns `id` (text) and `keywords` (lists "
                "of text), as `recllm build items --system mmsrarec` writes them"
            )
        try:
            facts = orjson.loads(metadata.get(KEYWORDS_KEY, "{}"))
        except orjson.JSONDecodeError as error:
            raise DataError(
                f"{path}: metadata `{KEYWORDS_KEY}` is not JSON ({error}); make it again"
            ) from None
        made_from = Origin.of_manifest(path, facts)
        check_same_origin(made_from, dataset.origin, remedy="make it again", required=("dataset",))
        if (twice := frame["id"].is_duplicated()).any():
            raise DataError(f"{path}: the item {frame['id'][twice.arg_max()]!r} has two lists; keep one")
        lists = dataset.items.select("item").join(
            frame.select("keywords", item="id"), on="item", how="left", maintain_order="left"
        )["keywords"]
        words = [[word for word in each if word] if each is not None else [] for each in lists.to_list()]
        if not any(words):
            raise DataError(
                f"{path}: none of its ids is an item with keywords (the first is {frame['id'].first()!r})"
            )
        return cls(name, sha256(path), words, tuple(facts.get("special_tokens", ())))

    def tell_missing(self) -> None:
        """Prints how many items have no keywords; title, categories and text take their place."""
        if missing := sum(not words for words in self.words):
            print(
                f"{self.name}: {missing:,} of {len(self.words):,} items have no keywords; their title, or "
                "what else is known of them, is used"
            )


def write_keywords(path: Path, table: pl.DataFrame, **facts: Any) -> None:
    """Writes a file of keywords, in one step.

    Args:
        path: The file.
        table: The columns `id` and `keywords`, and further ones.
        **facts: JSON types: `data_hash`, `special_tokens`, and others.
    """
    metadata = {KEYWORDS_KEY: orjson.dumps(facts).decode()}
    write_file(path, lambda temporary: table.write_parquet(temporary, metadata=metadata))
