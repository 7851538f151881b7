"""What the embedded model is taught: chats about toy-world pictures and words, in the builders' wordings.

A lesson is a chat with its answer. Prompts are the default templates, filled as the builders fill them;
answers are plain sentences that the toy world's words and a picture decide, all of one form for each prompt.
Makers, categories and looks are drawn independently, so that nothing but the picture tells a look. All
answers are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from recllm.data.toyworld import words
from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES, render
from recllm.mllm.chat import Message, message
from recllm.prompts import mllm_srec, mllmrec, mmsrarec, vlm4rec
from recllm.prompts.safe_text import IMAGE_MARK


class Look(NamedTuple):
    """What a picture shows."""

    color: str
    pattern: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color}, {self.pattern} {self.shape}"


ATTRIBUTES = (COLORS, PATTERNS, SHAPES)
LOOKS: tuple[Look, ...] = tuple(Look(c, p, s) for c in COLORS for p in PATTERNS for s in SHAPES)


@dataclass(frozen=True, slots=True)
class Lesson:
    """A chat that ends with the assistant's answer; the loss is on what the assistant says.

    Attributes:
        messages: The chat.
        looks: What its image parts show, in order.
        compared: For a comparison, what its target shares with the items that it lists; see `shared`.
    """

    messages: tuple[Message, ...]
    looks: tuple[Look, ...] = ()
    compared: tuple[int, ...] | None = None

    @property
    def answer(self) -> str:
        """What the assistant says at the end."""
        return self.messages[-1]["content"][0]["text"]


def seen(look: Look) -> str:
    """The answer to `mllm_srec.viu`."""
    return f"The image shows a {look}."


def summarized(title: str, look: Look | None) -> str:
    """The answer to `mllm_srec.imsg`; a look that no picture told is left out."""
    return f"{title}." if look is None else f"{title} with a {look}."


def tracked(looks: Sequence[Look | None], previous: str) -> str:
    """The answer to `mllm_srec.tubc`: the last look, what of it recurs in the window, the last look before.

    Args:
        looks: The looks of the window's items, oldest first; None where no picture was seen.
        previous: The answer for the window before; empty in the first.
    """
    known = [look for look in looks if look is not None]
    answer = f"Last: {known[-1] if known else 'unknown'}. Lately: {_recurring(known)}."
    if previous:
        answer += f" Before: {previous.removeprefix('Last: ').partition('.')[0]}."
    return answer


def shared(target: Look, known: Sequence[Look]) -> tuple[int, ...]:
    """What a target shares with looks that were known before it, oldest first.

    Returns:
        Three times three numbers, for color, pattern and shape each: of the target's value where the last
        look has it too, and else the number of values; then the same for any, and for two, of the last three.
    """
    told = []
    for recent, least in ((known[-1:], 1), (known[-3:], 1), (known[-3:], 2)):
        for number, values in enumerate(ATTRIBUTES):
            same = sum(look[number] == target[number] for look in recent) >= least
            told.append(values.index(target[number]) if same else len(values))
    return tuple(told)


def described(look: Look) -> str:
    """The answer to `mllmrec.description`."""
    return f"The product shows a {look}, for everyday use."


def preferred(looks: Sequence[Look]) -> str:
    """The answer to `mllmrec.preference`: the last look, and what of it recurs among the items."""
    return f"The user last chose a {looks[-1]} and likes {_recurring(looks)}."


def _recurring(looks: Sequence[Look]) -> str:
    """Color, pattern and shape of the last look, where an earlier one shares them."""
    told = []
    for number, attribute in enumerate(("color", "pattern", "shape")):
        values = [look[number] for look in looks]
        told.append(values[-1] if values and values[-1] in values[:-1] else f"any {attribute}")
    return ", ".join(told)


@dataclass(frozen=True, slots=True)
class _Item:
    maker: str
    category: str
    look: Look

    @property
    def title(self) -> str:
        return words.title_of(self.maker, self.category)

    @property
    def text(self) -> str:
        return words.text_of(self.maker, self.category)

    @property
    def plural(self) -> str:
        return words.PLURALS[self.category]


Kind: TypeAlias = Callable[["Teacher"], Lesson]


class Teacher:
    """Draws lessons; the same generator gives the same lessons.

    Args:
        rng: Decides everything.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._kinds = tuple(SHARES)
        self._bounds = np.cumsum(list(SHARES.values())) / sum(SHARES.values())

    def lessons(self, count: int, kind: Kind | None = None) -> Iterator[Lesson]:
        """Yields `count` lessons, of one kind where one is given."""
        for _ in range(count):
            number = int(np.searchsorted(self._bounds[:-1], self._rng.random(), side="right"))
            yield (self._kinds[number] if kind is None else kind)(self)

    # drawing ------------------------------------------------------------------------------------------------

    def _chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def _one(self, options: tuple) -> object:
        return options[int(self._rng.integers(len(options)))]

    def _item(self) -> _Item:
        return _Item(self._one(words.MAKERS), self._one(words.CATEGORIES), self._one(LOOKS))

    def _items(self, least: int, most: int) -> list[_Item]:
        return [self._item() for _ in range(int(self._rng.integers(least, most + 1)))]

    def _history(self, most: int) -> list[_Item]:
        """Items of a user; in most histories two attributes recur, as in a taste."""
        items, taste = self._items(1, most), self._one(LOOKS)
        if self._chance(0.3):
            return items
        free = int(self._rng.integers(3))
        return [
            item if self._chance(0.1) else replace(item, look=_drawn_to(taste, item.look, free))
            for item in items
        ]

    def _window(self) -> tuple[str, list[Look | None]]:
        """A window's lines as in a prompt, and their looks."""
        items = self._history(4)
        looks = [None if self._chance(0.06) else item.look for item in items]
        return _lines([summarized(i.title, look) for i, look in zip(items, looks, strict=True)]), looks

    # one method a prompt ------------------------------------------------------------------------------------

    def viu(self) -> Lesson:
        """Picture to its three attributes."""
        look = self._one(LOOKS)
        return _lesson(IMAGE_MARK + mllm_srec.VIU.fill({}), seen(look), look)

    def imsg(self) -> Lesson:
        """Visual summary and text to one line."""
        item = self._item()
        look = None if self._chance(0.15) else item.look
        return _lesson(self._imsg_prompt(item, look), summarized(item.title, look))

    def _imsg_prompt(self, item: _Item, look: Look | None) -> str:
        return mllm_srec.IMSG.fill(
            {
                "visual_summary": "" if look is None else seen(look),
                "title": item.title,
                "categories": "" if self._chance(0.1) else item.plural,
                "text": "" if self._chance(0.4) else item.text,
            }
        )

    def tubc(self) -> Lesson:
        """A window of items, and what was before, to the recent taste."""
        (lines, looks), previous = self._window(), self._previous()
        return _lesson(_tubc_prompt(lines, previous), tracked(looks, previous))

    def _previous(self) -> str:
        if self._chance(0.35):
            return ""
        older = tracked(self._window()[1], "") if self._chance(0.6) else ""
        return tracked(self._window()[1], older)

    def grounding(self) -> Lesson:
        """Picture to description, title out."""
        look = self._one(LOOKS)
        answer = f"A product with a {look}, for everyday use."
        return _lesson(IMAGE_MARK + vlm4rec.GROUNDING.fill({}), answer, look)

    def grounding_with_title(self) -> Lesson:
        """Picture and title to description."""
        item = self._item()
        prompt = IMAGE_MARK + vlm4rec.GROUNDING_WITH_TITLE.fill({"title": item.title})
        return _lesson(prompt, f"{item.title} with a {item.look}, for everyday use.", item.look)

    def description(self) -> Lesson:
        """Picture to description, in MLLMRec's words."""
        look = self._one(LOOKS)
        prompt = mllmrec.DESCRIPTION.fill({"dataset_name": self._one(_DATASETS)})
        return _lesson(IMAGE_MARK + prompt, described(look), look)

    def preference(self) -> Lesson:
        """A list of items to what the user likes."""
        items = self._history(8 if self._chance(0.3) else 4)
        brief = self._chance(0.6)
        entries = [
            f"{item.title}. {'' if brief else item.text + ' '}{described(item.look)}" for item in items
        ]
        prompt = mllmrec.PREFERENCE.fill({"items": "; ".join(entries)})
        return _lesson(prompt, preferred([item.look for item in items]))

    def image_keywords(self) -> Lesson:
        """Picture to keywords."""
        look = self._one(LOOKS)
        answer = f"{look.color}, {look.pattern}, {look.shape}"
        return _lesson(IMAGE_MARK + mmsrarec.IMAGE_KEYWORDS.fill({}), answer, look)

    def text_keywords(self) -> Lesson:
        """Title, categories and text to keywords."""
        item = self._item()
        prompt = mmsrarec.TEXT_KEYWORDS.fill(
            {
                "title": item.title,
                "categories": "" if self._chance(0.1) else item.plural,
                "text": "" if self._chance(0.4) else item.text,
            }
        )
        return _lesson(prompt, f"{item.maker}, {item.category}")

    def question(self) -> Lesson:
        """A question about a target, answered at random: the form, and no knowledge of what users like."""
        return self._question(())

    def comparison(self) -> Lesson:
        """The same question with what the target shares with the listed items; its answer is as random."""
        recent = self._history(4)
        target = self._item()
        if self._chance(0.75):
            values = (
                of if self._chance(0.5) else own for of, own in zip(recent[-1].look, target.look, strict=True)
            )
            target = replace(target, look=Look(*values))
        lines = [summarized(item.title, item.look) for item in recent]
        chat = self._asked(target, lines)
        return Lesson(chat, (target.look,), shared(target.look, [item.look for item in recent]))

    def chain(self) -> Lesson:
        """The four steps of one item in one chat: VIU, IMSG, TUBC, question."""
        item, previous = self._item(), self._previous()
        lines, looks = self._window()
        steps = (
            message("user", IMAGE_MARK + mllm_srec.VIU.fill({})),
            message("assistant", seen(item.look)),
            message("user", self._imsg_prompt(item, item.look)),
            message("assistant", summarized(item.title, item.look)),
            message("user", _tubc_prompt(lines, previous)),
            message("assistant", tracked(looks, previous)),
        )
        return self._question(steps, (item.look,))

    def _question(self, before: tuple[Message, ...], looks: tuple[Look, ...] = ()) -> Lesson:
        target, recent = self._item(), self._items(0, 4)
        form = int(self._rng.integers(3))
        history = [
            (item.title, summarized(item.title, item.look), f"{IMAGE_MARK} {item.title}")[form]
            for item in recent
        ]
        if form == 2:
            looks += tuple(item.look for item in recent)
        return Lesson((*before, *self._asked(target, history)), (*looks, target.look))

    def _asked(self, target: _Item, history: Sequence[str]) -> tuple[Message, Message]:
        """The question, and yes or no at random."""
        prompt = mllm_srec.QUESTION.fill(
            {
                "user": f"u{int(self._rng.integers(1000)):06d}" if self._chance(0.2) else "",
                "profile": words.profile_of(
                    self._one(words.CATEGORIES), int(self._rng.integers(words.PROFILE_KINDS))
                ),
                "preference": self._previous(),
                "history": _lines(history),
                "target": f"{target.title}. {target.plural}. {target.text} {IMAGE_MARK}",
            }
        )
        return message("user", prompt), message("assistant", self._one(("Yes.", "No.")))


_DATASETS = ("toy world", "Amazon Baby", "Amazon Sports", "Amazon Clothing", "MovieLens", "MicroLens")

SHARES: dict[Kind, float] = {
    Teacher.viu: 11,
    Teacher.imsg: 8,
    Teacher.tubc: 32,
    Teacher.grounding: 5,
    Teacher.grounding_with_title: 6,
    Teacher.description: 5,
    Teacher.preference: 12,
    Teacher.image_keywords: 6,
    Teacher.text_keywords: 5,
    Teacher.question: 5,
    Teacher.chain: 4,
}
"""How often each kind of lesson is drawn."""


def _drawn_to(taste: Look, look: Look, free: int) -> Look:
    """The taste's look, but for one attribute that it does not look at."""
    color, pattern, shape = ((look if number == free else taste)[number] for number in range(3))
    return Look(color, pattern, shape)


def _lines(entries: Sequence[str]) -> str:
    return "".join(f"\n{number}. {entry}" for number, entry in enumerate(entries, 1))


def _tubc_prompt(lines: str, previous: str) -> str:
    return mllm_srec.TUBC.fill({"previous": previous, "items": lines})


def _lesson(prompt: str, answer: str, *looks: Look) -> Lesson:
    return Lesson((message("user", prompt), message("assistant", answer)), looks)


class PictureBook:
    """Pictures rendered once and shown again, some of them mirrored; none of them is one that a world draws.

    Args:
        rng: Decides the pictures; worlds draw theirs from `numpy.random.SeedSequence` keys of their own.
        each: Pictures of each look.
    """

    def __init__(self, rng: np.random.Generator, each: int) -> None:
        self._rng = rng
        self._pictures = {look: [render(*look, rng) for _ in range(each)] for look in LOOKS}

    def looks(self, count: int) -> list[Look]:
        """Returns looks drawn at random."""
        return [LOOKS[number] for number in self._rng.integers(len(LOOKS), size=count)]

    def show(self, look: Look) -> Image.Image:
        """Returns one of the pictures with this look: all shapes are symmetric, so a mirror keeps them."""
        pictures = self._pictures[look]
        picture = pictures[int(self._rng.integers(len(pictures)))]
        return ImageOps.mirror(picture) if self._rng.random() < 0.5 else picture
