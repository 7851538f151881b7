"""The chats of MMSRARec's instruction rows (arXiv 2512.20916, stage 3).

    prompt = K_u       keywords of the user's last n items
             K_N(u)    keywords of the next items of similar users, from the neighbors' file
             candidate id, text and image

The score of a candidate is that of yes against no; the other tasks' answers are in `recllm.builders.tasks`.
What belongs to the user comes first and the candidate last, so that candidates share a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from recllm.builders.catalog import ID_LIMIT, Catalog, numbered
from recllm.builders.chats import NOTHING_KNOWN, Chat, rated
from recllm.builders.histories import History
from recllm.builders.options import InstructionOptions
from recllm.builders.tasks import CHOOSE, NEXT_KEYWORDS, SUMMARIZE, recurring
from recllm.data.keywords import ItemKeywords
from recllm.data.neighbors import Neighbors
from recllm.mllm.chat import message
from recllm.prompts.safe_text import IMAGE_MARK
from recllm.prompts.templates import Template


class KeywordComposer:
    """Writes the chats of MMSRARec.

    Args:
        catalog: The items.
        templates: By name.
        options: What the rows are to hold.
        keywords: Those of the items; None: titles take their place.
        neighbors: Similar users of the targets; None to go without.
        has_image: Tells whether an item has an image that can be shown.
        item_codes: The item of each interaction; shape [interactions].
        ratings: The rating of each interaction, which histories say; None to leave them out.
    """

    def __init__(
        self,
        catalog: Catalog,
        templates: Mapping[str, Template],
        options: InstructionOptions,
        keywords: ItemKeywords | None,
        neighbors: Neighbors | None,
        has_image: Callable[[int], bool],
        item_codes: np.ndarray,
        ratings: np.ndarray | None = None,
    ) -> None:
        self.catalog, self.options = catalog, options
        self.question = templates["mmsrarec.question"]
        self.of_task = {task: templates[f"mmsrarec.{task}"] for task in (NEXT_KEYWORDS, CHOOSE, SUMMARIZE)}
        self.templates = (self.question, *self.of_task.values())
        self.keywords, self.neighbors, self.ratings = keywords, neighbors, ratings
        self.item_codes = item_codes
        self._has_image = has_image

    def about(self, history: History, retrieved: Sequence[np.ndarray]) -> KeywordChats:
        """Returns what writes the chats of one user and one point in time.

        Args:
            history: What is known of the user, oldest first.
            retrieved: Row numbers of the next items of each similar user, the most similar first.
        """
        return KeywordChats(self, history, retrieved)

    def image(self, item: int) -> str | None:
        """Returns the path of an item's image, if it can be shown."""
        return self.catalog.image(item) if self._has_image(item) else None

    def words(self, item: int) -> list[str]:
        """Returns an item's keywords as prompts may show them; none if titles take their place."""
        if self.keywords is None:
            return []
        safe = (self.catalog.safe(word, ID_LIMIT) for word in self.keywords.words[item])
        return list(dict.fromkeys(word for word in safe if word))

    def phrase(self, item: int) -> str:
        """Returns an item's keywords, or its title, or what else is known of an item without either."""
        catalog = self.catalog
        return ", ".join(self.words(item)) or catalog.title(item) or catalog.described(item) or NOTHING_KNOWN

    def answer(self, item: int) -> str:
        """Returns what `next_keywords` is to answer: keywords, or the title in their place; may be empty."""
        return ", ".join(self.words(item)) if self.keywords is not None else self.catalog.title(item)


class KeywordChats:
    """The chats of one user at one point in time; see `KeywordComposer.about`."""

    def __init__(self, composer: KeywordComposer, history: History, retrieved: Sequence[np.ndarray]) -> None:
        self._composer, self._history = composer, history
        self.most_listed = min(composer.options.history or 0, len(history.items))
        recent = slice(len(history.items) - self.most_listed, None)
        pairs = zip(history.items[recent].tolist(), history.rows[recent].tolist(), strict=True)
        self._recent = [rated(composer.phrase(item), row, composer.ratings) for item, row in pairs]
        codes = composer.item_codes
        self._neighbors = ["; ".join(map(composer.phrase, codes[rows].tolist())) for rows in retrieved]
        self._retrieved = tuple(sorted({row for rows in retrieved for row in rows.tolist()}))

    def chat(self, item: int, listed: int) -> Chat:
        """Returns the yes/no question about one candidate.

        Args:
            item: Its code.
            listed: How many of the latest interactions are listed, at most `most_listed`.
        """
        composer = self._composer
        image = composer.image(item) if composer.options.target_image else None
        target = f"{self._target(item)} {IMAGE_MARK if image else ''}".strip()
        return self._filled(composer.question, listed, image, target=target)

    def next_keywords(self, listed: int) -> Chat:
        """Returns the question for the next item's keywords."""
        keywords = self._composer.keywords is not None
        answer = "its keywords alone, separated by commas" if keywords else "its title alone"
        return self._filled(self._composer.of_task[NEXT_KEYWORDS], listed, answer=answer)

    def choose(self, items: Sequence[int], listed: int) -> Chat:
        """Returns the question which of some candidates comes next; it shows no images."""
        lines = numbered([self._candidate(item) for item in items])
        return self._filled(self._composer.of_task[CHOOSE], listed, candidates=lines)

    def summarize(self, listed: int) -> Chat:
        """Returns the question for the user's preference."""
        composer = self._composer
        values = {"history": numbered(self._recent[len(self._recent) - listed :])}
        return self._asked(composer.of_task[SUMMARIZE].fill(values, composer.catalog.special_tokens), listed)

    def preference(self) -> str:
        """Returns the answer to `summarize`, of all that is known of the user; empty if nothing recurs."""
        return ", ".join(recurring([self._composer.words(item) for item in self._history.items.tolist()]))

    def _filled(self, template: Template, listed: int, image: str | None = None, **values: str) -> Chat:
        composer = self._composer
        filled = {
            "what": "titles" if composer.keywords is None else "keywords",
            "history": numbered(self._recent[len(self._recent) - listed :]),
            "neighbors": numbered(self._neighbors),
            **values,
        }
        text = template.fill(filled, composer.catalog.special_tokens)
        images = (image,) * text.count(IMAGE_MARK) if image else ()
        return self._asked(text, listed, images, self._retrieved)

    def _asked(
        self, text: str, listed: int, images: tuple[str, ...] = (), retrieved: tuple[int, ...] = ()
    ) -> Chat:
        rows = self._history.rows
        shown = tuple(sorted(rows[len(rows) - listed :].tolist()))
        return Chat((message("user", text),), images, shown, retrieved=retrieved)

    def _target(self, item: int) -> str:
        composer = self._composer
        options, catalog = composer.options, composer.catalog
        name = f"{catalog.safe(catalog.ids[item], ID_LIMIT)}." if options.target_id else ""
        text = catalog.described(item, options.text_limit) if options.target_text else ""
        known = text or ("" if options.target_image and composer.image(item) else NOTHING_KNOWN)
        return f"{name} {known}".strip()

    def _candidate(self, item: int) -> str:
        catalog, words = self._composer.catalog, self._composer.words(item)
        parts = [part for part in (catalog.title(item), ", ".join(words)) if part]
        return ": ".join(parts) or self._composer.phrase(item)
