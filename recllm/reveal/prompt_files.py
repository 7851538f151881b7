"""Files of image prompts, one an item: `id, text` and what else a version of them has.

`recllm build image-prompts` writes the first version (texts/reveal-prompts.parquet), `recllm build
image-rewrites` the later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.origins import Origin, check_same_origin
from recllm.data.tables import read_table, text_ids
from recllm.data.texts import check_unique
from recllm.errors import DataError
from recllm.files import sha256

METADATA_KEY = "recllm.prompts"
"""The parquet metadata key of what a file of prompts was made from."""


@dataclass(frozen=True, eq=False)
class ImagePrompts:
    """The prompts of a file.

    Attributes:
        path: The file.
        frame: `id` and `text` (text), and the file's other columns.
        made: What the file says of how it was made; empty for a file that recllm did not write.
    """

    path: Path
    frame: pl.DataFrame
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, dataset: Dataset) -> ImagePrompts:
        """Reads a file of prompts.

        Args:
            path: The file; where it does not exist, it is looked for in the dataset's folder.
            dataset: The dataset whose items the prompts are for.

        Raises:
            DataError: The file is missing, has no `id` and `text`, an id twice, or was made from another
                state of the dataset.
        """
        given, path = path, path if path.exists() else dataset.folder / path
        if not path.exists():
            raise DataError(
                f"--prompts {given}: no such file, here or in {dataset.folder}; `recllm build image-prompts "
                f"{dataset.folder}` writes texts/reveal-prompts.parquet"
            )
        frame, metadata = read_table(path)
        if missing := [name for name in ("id", "text") if name not in frame.columns]:
            raise DataError(f"{path}: no column {missing[0]!r}; prompts have `id` (of the item) and `text`")
        if frame["text"].dtype != pl.String:
            raise DataError(f"{path}: the column 'text' is {frame['text'].dtype}; expected text")
        frame = text_ids(frame, ("id",), str(path))
        check_unique(frame["id"].to_list(), path)
        try:
            made = orjson.loads(metadata.get(METADATA_KEY, "{}"))
        except orjson.JSONDecodeError as error:
            raise DataError(
                f"{path}: metadata `{METADATA_KEY}` is not JSON ({error}); make it again"
            ) from None
        check_same_origin(Origin.of_manifest(path, made), dataset.origin, remedy="make it again")
        return cls(path, frame.with_columns(pl.col("text").fill_null("")), made)

    @property
    def sha256(self) -> str:
        """A hash of the file."""
        return sha256(self.path)

    def by_item(self) -> dict[str, str]:
        """Returns the prompts by item id."""
        return dict(self.frame.select("id", "text").iter_rows())
