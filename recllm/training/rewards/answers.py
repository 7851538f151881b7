"""What a reward judges: an answer, what it was asked about, and what can be read from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from recllm.mllm.chat import Message
from recllm.prompts.keywords import Keywords, read_keywords
from recllm.prompts.safe_text import safe_text

LONGEST_TEXT = 2000
_NUMBERS = re.compile(r"[\s,.>]*[0-9]{1,4}(?:[\s,.>]+[0-9]{1,4})*[\s,.>]*")
_INTEGER = re.compile("[0-9]+")
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


@dataclass(frozen=True, eq=False)
class Source:
    """What an answer is about: one prompt about one item.

    Attributes:
        id: `<item>/<kind>`.
        item: The item's id.
        kind: `image` or `text`: what the prompt shows.
        messages: The prompt.
        images: Its images, relative to the dataset folder.
        shown: The text that the prompt shows; what could be copied.
        reference: The text that information and reconstruction compare with; empty where there is none.
        form: `keywords`: a list is asked for. `summary`: prose. `choice`: numbers of candidates, best first.
        right: For a choice, the number of the right candidate, from 1.
        candidates: For a choice, how many there are.
        picks: For a choice, how many an answer may name.
    """

    id: str
    item: str
    kind: Literal["image", "text"]
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    shown: str = ""
    reference: str = ""
    form: Literal["keywords", "summary", "choice"] = "keywords"
    right: int = 0
    candidates: int = 0
    picks: int = 1


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model wrote.

    Attributes:
        source: What it was asked.
        text: The answer, without special tokens.
        finished: The model ended it; False where it was cut off at the longest length.
    """

    source: Source
    text: str
    finished: bool = True

    @cached_property
    def keywords(self) -> Keywords:
        """The keywords, each once, and what was left out; as `recllm build items` reads them."""
        return read_keywords(self.text, cut_off=not self.finished)

    @cached_property
    def content(self) -> str:
        """What is judged: the distinct keywords, joined by commas, or the summary in one line."""
        text = ", ".join(self.keywords.words) if self.source.form == "keywords" else self.text
        return safe_text(text, limit=LONGEST_TEXT)

    @cached_property
    def ranking(self) -> list[int]:
        """The numbers of a choice, best first; empty where the answer is anything but numbers.

        Numbers may be separated by commas, white space, full stops or `>`; what stands before a `</think>`
        is not read.
        """
        text = self.text.rpartition("</think>")[2]
        return [int(number) for number in _INTEGER.findall(text)] if _NUMBERS.fullmatch(text) else []

    @cached_property
    def distinct(self) -> int:
        """The number of distinct keywords; of a summary, its words."""
        return len(self.keywords.words) if self.source.form == "keywords" else len(words_of(self.text))

    @cached_property
    def count(self) -> int:
        """The number of keywords, with repeated ones and those over the limit; of a summary, its words."""
        if self.source.form == "choice":
            return len(self.ranking)
        if self.source.form == "summary":
            return self.distinct
        dropped = self.keywords.dropped
        return self.distinct + dropped["repetitions"] + dropped["over the limit"]

    @property
    def usable(self) -> bool:
        """Whether there is something to judge: not empty, and with at least one keyword."""
        return bool(words_of(self.content))

    def as_row(self) -> dict[str, Any]:
        """Returns id, item and text, as completion tables keep them."""
        return {
            "id": self.source.id,
            "item": self.source.item,
            "text": self.text,
            "keywords": self.keywords.words if self.source.form == "keywords" else None,
            "finished": self.finished,
        }


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return [word.casefold() for word in _WORD.findall(text)]
