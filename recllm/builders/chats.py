"""The chats of instruction tuples: the question alone, or after the three steps before it (four-step CoT)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recllm.builders.catalog import ID_LIMIT, PROFILE_LIMIT, Catalog, numbered
from recllm.builders.histories import History
from recllm.builders.options import InstructionOptions
from recllm.builders.preferences import Summary
from recllm.data.dataset import Dataset
from recllm.data.dislikes import read_ratings
from recllm.data.texts import ItemTexts
from recllm.errors import DataError
from recllm.mllm.chat import Message, hash_of_messages, message
from recllm.prompts.safe_text import IMAGE_MARK
from recllm.prompts.templates import Template

YES, NO = "Yes.", "No."
"""The two completions (MLLM-SRec, table 1)."""
NOTHING_KNOWN = "(nothing is known of it)"
"""What a prompt says about an item without title, text and image."""
_NUMBERED_MARK = re.compile(f"{IMAGE_MARK}([0-9]+){IMAGE_MARK}")


@dataclass(frozen=True)
class Chat:
    """A prompt and what it shows.

    Attributes:
        messages: The turns; the last is the question.
        images: Relative paths, one for each image part.
        shown: Row numbers of the interactions that the prompt may tell of, be it through a summary.
        looked: Whether VIU or IMSG turns are among the messages.
        retrieved: Row numbers of other users' interactions that the prompt tells of.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...]
    shown: tuple[int, ...] = ()
    looked: bool = False
    retrieved: tuple[int, ...] = ()


class Composer:
    """Writes the chats of instruction tuples.

    Args:
        catalog: The items.
        templates: By name.
        options: Form and contents.
        visual: What VIU wrote; needed for `cot`.
        combined: What IMSG wrote; needed for `cot`.
        lines: What histories say of items: what TUBC was given, or what IMSG wrote; None for titles and
            texts.
        has_image: Tells whether an item has an image that can be shown.
        ratings: The rating of each interaction, which histories say; None to leave them out.
    """

    def __init__(
        self,
        catalog: Catalog,
        templates: Mapping[str, Template],
        options: InstructionOptions,
        visual: ItemTexts | None,
        combined: ItemTexts | None,
        lines: ItemTexts | None,
        has_image: Callable[[int], bool],
        ratings: np.ndarray | None = None,
    ) -> None:
        self.catalog, self.options = catalog, options
        self.viu, self.imsg = templates["mllm_srec.viu"], templates["mllm_srec.imsg"]
        self.tubc, self.question = templates["mllm_srec.tubc"], templates["mllm_srec.question"]
        self.templates = (self.viu, self.imsg, self.tubc, self.question)
        self.visual, self.combined = visual, combined
        self._lines: Sequence[str] = lines.texts if lines else ()
        self._has_image = has_image
        self.ratings = ratings

    def about(self, user: str, profile: str, history: History, summary: Summary | None) -> UserChats:
        """Returns what writes the chats of one user and one point in time.

        Args:
            user: The user's id.
            profile: The user's profile; may be empty.
            history: What is known of the user, oldest first.
            summary: The last summary within it.
        """
        return UserChats(self, user, profile, history, summary)

    def image(self, item: int) -> str | None:
        """Returns the path of an item's image, if it can be shown."""
        return self.catalog.image(item) if self._has_image(item) else None

    def told(self, item: int) -> str:
        """Returns what a history says of an item."""
        return self.catalog.told(item, self._lines)

    def look(self, item: int) -> tuple[list[Message], list[str]]:
        """Returns VIU and IMSG of one item with their answers, and the images; less what the item lacks."""
        turns, images = [], []
        visual = self.catalog.safe(self.visual.texts[item]) if self.visual else ""
        if self.visual and visual and (image := self.image(item)):
            images.append(image)
            asked = message("user", IMAGE_MARK + self.viu.fill({}, self.catalog.special_tokens))
            turns += self._answered(asked, visual, self.visual, item)
        if self.combined and (told := self.catalog.safe(self.combined.texts[item])):
            fields = {**self.catalog.fields(item), "visual_summary": visual}
            asked = message("user", self.imsg.fill(fields, self.catalog.special_tokens))
            turns += self._answered(asked, told, self.combined, item)
        return turns, images

    def recall(self, user: str, history: History, summary: Summary) -> list[Message]:
        """Returns TUBC's last window with its answer, as the model that wrote it saw it.

        Raises:
            DataError: The prompt is not the one that the summary answers.
        """
        answer = self.catalog.safe(summary.text)
        if not answer:
            return []
        window = slice(summary.begin, summary.end)
        pairs = zip(history.items[window].tolist(), history.rows[window].tolist(), strict=True)
        lines = [rated(self.told(item), row, self.ratings) for item, row in pairs]
        asked = message("user", window_prompt(self.catalog, self.tubc, lines, summary.previous))
        if hash_of_messages((asked,)) != summary.prompt_hash:
            raise DataError(
                f"user {user!r}: the TUBC summary up to interaction {summary.end} answers another prompt "
                "than templates and item texts give now; run `recllm build users` again"
            )
        return [asked, message("assistant", answer)]

    def _answered(self, asked: Message, answer: str, texts: ItemTexts, item: int) -> list[Message]:
        if hash_of_messages((asked,)) != texts.prompt_hashes[item]:
            raise DataError(
                f"item {self.catalog.ids[item]!r}: its text in {texts.name}.parquet answers another prompt "
                "than templates and item texts give now; run `recllm build items` again"
            )
        return [asked, message("assistant", answer)]


class UserChats:
    """The chats of one user at one point in time.

    What belongs to the user is written once and comes first, the candidate last, so that all candidates share
    a prefix.
    """

    def __init__(
        self, composer: Composer, user: str, profile: str, history: History, summary: Summary | None
    ) -> None:
        self._composer, self._history, self._summary = composer, history, summary
        catalog, options = composer.catalog, composer.options
        self._values = {
            "user": catalog.safe(user, ID_LIMIT) if options.user_id else "",
            "profile": catalog.safe(profile, PROFILE_LIMIT) if options.profile else "",
            "preference": catalog.safe(summary.text) if summary else "",
        }
        self._looked = False
        self._earlier: list[Message] = []
        self._images: list[str] = []
        self._shown: set[int] = set(history.rows[: summary.end].tolist()) if summary else set()
        if options.form == "cot":
            if options.cot_about == "history" and len(history.items):
                self._earlier, self._images = composer.look(int(history.items[-1]))
                self._looked = bool(self._earlier)
                self._shown.add(int(history.rows[-1]))
            if summary is not None:
                self._earlier += composer.recall(user, history, summary)
        self.most_listed = min(options.history or 0, len(history.items))
        recent = slice(len(history.items) - self.most_listed, None)
        pairs = zip(history.items[recent].tolist(), history.rows[recent].tolist(), strict=True)
        lines = ((*self._line(item), row) for item, row in pairs)
        self._recent = [(image, rated(text, row, composer.ratings)) for image, text, row in lines]

    def chat(self, item: int, listed: int) -> Chat:
        """Returns the chat about one candidate.

        Args:
            item: Its code.
            listed: How many of the latest interactions the question lists, at most `most_listed`.
        """
        composer = self._composer
        earlier, images, looked = list(self._earlier), list(self._images), self._looked
        if composer.options.form == "cot" and composer.options.cot_about == "target":
            turns, looked_at = composer.look(item)
            earlier += turns
            images += looked_at
            looked = bool(turns)
        recent = self._recent[len(self._recent) - listed :]
        pictures = _Pictures()
        values = {
            **self._values,
            "history": numbered([f"{pictures.add(image)}{text}".rstrip() for image, text in recent]),
            "target": self._target(item, pictures),
        }
        text, in_order = pictures.in_order(composer.question.fill(values, composer.catalog.special_tokens))
        rows = self._history.rows
        shown = self._shown | set(rows[len(rows) - listed :].tolist())
        messages = (*earlier, message("user", text))
        return Chat(messages, (*images, *in_order), tuple(sorted(shown)), looked)

    def _line(self, item: int) -> tuple[str | None, str]:
        """A history item's image, if it is to be shown, and what is said of it."""
        how, composer = self._composer.options.history_as, self._composer
        if how == "summary":
            return None, composer.told(item)
        title = composer.catalog.title(item)
        image = composer.image(item) if how != "title" else None
        if image is None:
            return None, title or composer.told(item)
        return image, "" if how == "image" else f" {title}"

    def _target(self, item: int, pictures: _Pictures) -> str:
        composer = self._composer
        options = composer.options
        text = composer.catalog.described(item, options.text_limit) if options.target_text else ""
        image = composer.image(item) if options.target_image else None
        if image is not None:
            return f"{text} {pictures.add(image)}".lstrip()
        return text or NOTHING_KNOWN


class _Pictures:
    """The pictures of one question, which its template may put in any order."""

    def __init__(self) -> None:
        self._paths: list[str] = []

    def add(self, path: str | None) -> str:
        """Returns the mark that stands for a picture until its place is known; nothing for no picture."""
        if path is None:
            return ""
        self._paths.append(path)
        return f"{IMAGE_MARK}{len(self._paths) - 1}{IMAGE_MARK}"

    def in_order(self, text: str) -> tuple[str, list[str]]:
        """Returns the text with plain image marks, and the paths in the order of the marks."""
        found = [self._paths[int(number)] for number in _NUMBERED_MARK.findall(text)]
        return _NUMBERED_MARK.sub(IMAGE_MARK, text), found


def told_ratings(dataset: Dataset, *, tell: bool) -> np.ndarray | None:
    """Returns the rating of each interaction, shape [interactions], where histories are to say them.

    Raises:
        DataError: The dataset has no ratings.
    """
    return read_ratings(dataset, "--tell-ratings") if tell else None


def rated(text: str, row: int, ratings: np.ndarray | None) -> str:
    """Returns what a history says of an interaction, with its rating where there is one."""
    if ratings is None or np.isnan(ratings[row]):
        return text
    return f"{text} (rated {ratings[row]:g})"


def window_prompt(catalog: Catalog, template: Template, lines: Sequence[str], previous: str) -> str:
    """Returns the TUBC prompt of one window (p3 of MLLM-SRec): its items, oldest first, after what the window
    before led to."""
    values = {"items": numbered(lines), "previous": catalog.safe(previous)}
    return template.fill(values, catalog.special_tokens)
