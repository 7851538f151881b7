"""What prompts say of items and users: every text from data has gone through `safe_text`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import polars as pl

from recllm.data.dataset import Dataset
from recllm.errors import DataError
from recllm.mllm.vision.images import ImageError, load_image
from recllm.prompts.safe_text import safe_text

TITLE_LIMIT, TEXT_LIMIT, CATEGORIES_LIMIT, PROFILE_LIMIT, ID_LIMIT = 300, 2000, 300, 1000, 100
"""Characters of each kind of text that a prompt keeps; ours."""
SUMMARY_LIMIT = 2000
"""Characters kept of a model's own text where it enters another prompt."""
_SMALL = 4096  # pixels: the file is read to its end, but little is made of it
_HELD = 65_536  # items whose text is kept ready


class Catalog:
    """The items of a dataset as prompts show them, by code (row number in the items table).

    Args:
        dataset: The dataset.
        special_tokens: Special tokens of the models in use, which no text may spell.

    Attributes:
        folder: The dataset folder.
        ids: The items' ids.
        special_tokens: As given.
    """

    def __init__(self, dataset: Dataset, special_tokens: Iterable[str] = ()) -> None:
        items = dataset.items
        self.folder = dataset.folder
        self.ids: list[str] = items["item"].to_list()
        self.special_tokens = tuple(special_tokens)
        self._titles, self._texts = items["title"], items["text"]
        self._categories, self._images = items["categories"], items["images"]
        self._brands = items["brand"] if items.schema.get("brand") == pl.String else None
        self.described = lru_cache(_HELD)(self._described)
        self.metadata = lru_cache(_HELD)(self._metadata)

    def __len__(self) -> int:
        return len(self.ids)

    def safe(self, text: str | None, limit: int = SUMMARY_LIMIT) -> str:
        """Returns text from data, or from a model, as prompts may show it."""
        return safe_text(text, special_tokens=self.special_tokens, limit=limit)

    def title(self, code: int) -> str:
        """Returns an item's title."""
        return self.safe(self._titles[code], TITLE_LIMIT)

    def text(self, code: int, limit: int = TEXT_LIMIT) -> str:
        """Returns at most so many characters of an item's description."""
        return self.safe(self._texts[code], limit) if limit else ""

    def categories(self, code: int) -> str:
        """Returns an item's categories, separated by commas, the widest first."""
        return self.safe(", ".join(self._names(code)), CATEGORIES_LIMIT)

    def brand(self, code: int) -> str:
        """Returns an item's brand; empty where it, or the column `brand`, has none."""
        return "" if self._brands is None else self.safe(self._brands[code], TITLE_LIMIT)

    def _metadata(self, code: int) -> str:
        """Title, brand, categories and text as sentences in one line: D^t of MLLMRec eq. 2."""
        values = (self.title(code), self.brand(code), self.categories(code), self.text(code))
        return " ".join(_sentence(value) for value in values if value)

    def narrowest_category(self, code: int) -> str:
        """Returns the last of an item's categories; empty where it has none."""
        names = self._names(code)
        return self.safe(names[-1], CATEGORIES_LIMIT) if names else ""

    def fields(self, code: int, text_limit: int = TEXT_LIMIT) -> dict[str, str]:
        """Returns title, categories and text, as templates take them."""
        text = self.text(code, text_limit)
        return {"title": self.title(code), "categories": self.categories(code), "text": text}

    def told(self, code: int, summaries: Sequence[str]) -> str:
        """Returns an item's summary, or title, categories and text where it has none."""
        return (self.safe(summaries[code]) if len(summaries) else "") or self.described(code)

    def image(self, code: int) -> str | None:
        """Returns the path of an item's first image, relative to the dataset folder; None without images."""
        images = self._images[code]
        return images[0] if len(images) else None

    def image_path(self, code: int) -> Path | None:
        """Returns where an item's first image lies."""
        image = self.image(code)
        return None if image is None else self.folder / image

    def _described(self, code: int, text_limit: int = TEXT_LIMIT) -> str:
        """Title, categories and text as sentences in one line; what is empty is left out."""
        return " ".join(_sentence(value) for value in self.fields(code, text_limit).values() if value)

    def _names(self, code: int) -> list[str]:
        return [name for name in self._categories[code].to_list() if name and name.strip()]


class ImageCheck:
    """Tells whether an item has an image that a model can be shown; each file is decoded once.

    Attributes:
        catalog: The items.
        unusable: Why an item's image cannot be shown, by item id, for those that were asked about.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.unusable: dict[str, str] = {}
        self._known: dict[int, bool] = {}

    def __call__(self, code: int) -> bool:
        """Returns whether the item's first image can be shown."""
        if code not in self._known:
            self._known[code] = self._decodes(code)
        return self._known[code]

    def _decodes(self, code: int) -> bool:
        path = self.catalog.image_path(code)
        if path is None:
            return False
        try:
            load_image(path, max_pixels=_SMALL)
        except ImageError as error:
            self.unusable[self.catalog.ids[code]] = str(error)
            return False
        return True


def profiles_of(dataset: Dataset) -> pl.Series | None:
    """Returns the users' profiles as text, by user code; None where users.parquet has no such column.

    Raises:
        DataError: The column is neither text nor numbers.
    """
    if "profile" not in dataset.users.columns:
        return None
    profiles = dataset.users["profile"]
    if not (profiles.dtype == pl.String or profiles.dtype.is_numeric()):
        raise DataError(
            f"{dataset.folder / 'users.parquet'}: the column 'profile' is {profiles.dtype}; expected text"
        )
    return profiles.cast(pl.String).fill_null("")


def numbered(lines: Sequence[str]) -> str:
    """Returns the lines numbered from 1, each after a line break; empty where there are none."""
    return "".join(f"\n{number}. {line}" for number, line in enumerate(lines, 1))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."
