"""What prompts say of items and users: every text from data has gone through `safe_text`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recllm.data.dataset import Dataset
from recllm.mllm.images import ImageError, load_image
from recllm.prompts.safe_text import safe_text

TITLE_LIMIT, TEXT_LIMIT, CATEGORIES_LIMIT, PROFILE_LIMIT, ID_LIMIT = 300, 2000, 300, 1000, 100
"""Characters of each kind of text that a prompt keeps; ours."""
SUMMARY_LIMIT = 2000
"""Characters kept of a model's own text where it enters another prompt."""


_SMALL = 4096  # pixels: the file is read to its end, but little is made of it


class Catalog:
    """The items of a dataset as prompts show them, by code (row number in the items table)."""

    def __init__(self, dataset: Dataset, special_tokens: Sequence[str] = ()) -> None:
        items = dataset.items
        self.folder = dataset.folder
        self.ids: list[str] = items["item"].to_list()
        self._titles, self._texts = items["title"], items["text"]
        self._categories, self._images = items["categories"], items["images"]
        self._special_tokens = special_tokens

    def __len__(self) -> int:
        return len(self.ids)

    def title(self, code: int) -> str:
        """Returns an item's title."""
        return self._safe(self._titles[code], TITLE_LIMIT)

    def text(self, code: int) -> str:
        """Returns an item's description."""
        return self._safe(self._texts[code], TEXT_LIMIT)

    def categories(self, code: int) -> str:
        """Returns an item's categories, separated by commas, the widest first."""
        return self._safe(", ".join(self._names(code)), CATEGORIES_LIMIT)

    def narrowest_category(self, code: int) -> str:
        """Returns the last of an item's categories; empty where it has none."""
        names = self._names(code)
        return self._safe(names[-1], CATEGORIES_LIMIT) if names else ""

    def fields(self, code: int) -> dict[str, str]:
        """Returns title, categories and text, as templates take them."""
        return {"title": self.title(code), "categories": self.categories(code), "text": self.text(code)}

    def described(self, code: int) -> str:
        """Returns title, categories and text as sentences in one line; what is empty is left out."""
        return " ".join(_sentence(value) for value in self.fields(code).values() if value)

    def image(self, code: int) -> str | None:
        """Returns the path of an item's first image, relative to the dataset folder; None without images."""
        images = self._images[code]
        return images[0] if len(images) else None

    def image_path(self, code: int) -> Path | None:
        """Returns where an item's first image lies."""
        image = self.image(code)
        return None if image is None else self.folder / image

    def _names(self, code: int) -> list[str]:
        return [name for name in self._categories[code].to_list() if name and name.strip()]

    def _safe(self, text: str | None, limit: int) -> str:
        return safe_text(text, special_tokens=self._special_tokens, limit=limit)


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


def numbered(lines: Sequence[str]) -> str:
    """Returns the lines numbered from 1, each after a line break; empty where there are none."""
    return "".join(f"\n{number}. {line}" for number, line in enumerate(lines, 1))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."
