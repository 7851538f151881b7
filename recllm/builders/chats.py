"""The chats of instruction tuples: the question alone, or after the three steps before it (four-step CoT)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recllm.builders.catalog import ID_LIMIT, PROFILE_LIMIT, SUMMARY_LIMIT, Catalog, numbered
from recllm.builders.histories import History
from recllm.builders.options import InstructionOptions
from recllm.builders.preferences import Summary
from recllm.mllm.chat import Message, message
from recllm.prompts.safe_text import IMAGE_MARK, safe_text
from recllm.prompts.templates import Template

YES, NO = "Yes.", "No."
"""The two completions (MLLM-SRec, table 1)."""
_NUMBERED_MARK = re.compile(f"{IMAGE_MARK}([0-9]+){IMAGE_MARK}")


@dataclass(frozen=True)
class Chat:
    """A prompt and what it shows.

    Attributes:
        messages: The turns; the last is the question.
        images: Relative paths, one for each image part.
        shown: Row numbers of the interactions that the prompt tells of, be it through a summary.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...]
    shown: tuple[int, ...]


class Composer:
    """Writes the chat for one user and one candidate.

    Args:
        catalog: The items.
        templates: By name.
        options: Form and contents.
        visual: What VIU wrote, by item code; needed for `cot`.
        summaries: What IMSG wrote, by item code; needed for `cot` and where the history is shown by summary.
        has_image: Tells whether an item has an image that can be shown.
    """

    def __init__(
        self,
        catalog: Catalog,
        templates: Mapping[str, Template],
        options: InstructionOptions,
        visual: Sequence[str],
        summaries: Sequence[str],
        has_image: Callable[[int], bool],
    ) -> None:
        self.catalog, self.options = catalog, options
        self._viu, self._imsg = templates["mllm_srec.viu"], templates["mllm_srec.imsg"]
        self._tubc, self._question = templates["mllm_srec.tubc"], templates["mllm_srec.question"]
        self._visual, self._summaries, self._has_image = visual, summaries, has_image

    def compose(
        self, user: str, profile: str, history: History, summary: Summary | None, item: int, listed: int
    ) -> Chat:
        """Returns the chat. What belongs to the user comes first and the candidate last, so that the
        candidates of a user share a prefix.

        Args:
            user: The user's id.
            profile: The user's profile; may be empty.
            history: What is known of the user, oldest first.
            summary: The last summary within it.
            item: Code of the candidate.
            listed: How many of the latest interactions the question lists.
        """
        images: list[str] = []
        messages: list[Message] = []
        shown = history.rows[: summary.end].tolist() if summary else []
        latest = int(history.items[-1]) if len(history.items) else None
        if self.options.form == "cot":
            if self.options.cot_about == "history" and latest is not None:
                messages += self._look(latest, images)
                shown.append(int(history.rows[-1]))
            if summary is not None:
                messages += self._recall(history, summary)
            if self.options.cot_about == "target":
                messages += self._look(item, images)
        recent = history.latest(listed) if listed else None
        pictures = _Pictures()
        lines = [self._line(int(code), pictures) for code in recent.items] if recent else []
        question = self._question.fill(
            {
                "user": safe_text(user, limit=ID_LIMIT) if self.options.user_id else "",
                "profile": safe_text(profile, limit=PROFILE_LIMIT) if self.options.profile else "",
                "preference": safe_text(summary.text, limit=SUMMARY_LIMIT) if summary else "",
                "history": numbered(lines),
                "target": self._target(item, pictures),
            }
        )
        question, shown_pictures = pictures.in_order(question)
        messages.append(message("user", question))
        if recent is not None:
            shown += recent.rows.tolist()
        return Chat(tuple(messages), (*images, *shown_pictures), tuple(sorted(set(shown))))

    def _look(self, item: int, images: list[str]) -> list[Message]:
        """VIU and IMSG of one item with their answers; without what the item lacks."""
        turns = []
        visual = safe_text(self._visual[item], limit=SUMMARY_LIMIT)
        if visual and (image := self._image(item)):
            images.append(image)
            turns.append(message("user", IMAGE_MARK + self._viu.fill({})))
            turns.append(message("assistant", visual))
        if combined := safe_text(self._summaries[item], limit=SUMMARY_LIMIT):
            fields = {**self.catalog.fields(item), "visual_summary": visual}
            turns.append(message("user", self._imsg.fill(fields)))
            turns.append(message("assistant", combined))
        return turns

    def _recall(self, history: History, summary: Summary) -> list[Message]:
        """TUBC's last window with its answer, as the model that wrote it saw it."""
        window = history.items[summary.begin : summary.end].tolist()
        prompt = window_prompt(self._tubc, [self.told(code) for code in window], summary.previous)
        return [message("user", prompt), message("assistant", safe_text(summary.text, limit=SUMMARY_LIMIT))]

    def told(self, item: int) -> str:
        """Returns an item's summary, or title, categories and text where it has none."""
        return item_line(self.catalog, self._summaries, item)

    def _image(self, item: int) -> str | None:
        return self.catalog.image(item) if self._has_image(item) else None

    def _line(self, item: int, pictures: _Pictures) -> str:
        how = self.options.history_as
        if how == "summary":
            return self.told(item)
        title = self.catalog.title(item)
        if how == "title" or (image := self._image(item)) is None:
            return title
        return pictures.add(image) if how == "image" else f"{pictures.add(image)} {title}"

    def _target(self, item: int, pictures: _Pictures) -> str:
        text = self.catalog.described(item) if self.options.target_text else ""
        if self.options.target_image and (image := self._image(item)) is not None:
            return f"{text} {pictures.add(image)}".lstrip()
        return text or "(nothing is known of it)"


class _Pictures:
    """The pictures of one question, which its template may put in any order."""

    def __init__(self) -> None:
        self._paths: list[str] = []

    def add(self, path: str) -> str:
        """Returns the mark that stands for a picture until its place is known."""
        self._paths.append(path)
        return f"{IMAGE_MARK}{len(self._paths) - 1}{IMAGE_MARK}"

    def in_order(self, text: str) -> tuple[str, list[str]]:
        """Returns the text with plain image marks, and the paths in the order of the marks."""
        found = [self._paths[int(number)] for number in _NUMBERED_MARK.findall(text)]
        return _NUMBERED_MARK.sub(IMAGE_MARK, text), found


def item_line(catalog: Catalog, summaries: Sequence[str], item: int) -> str:
    """Returns what a history says of an item: its summary, or title, categories and text without one."""
    summary = safe_text(summaries[item], limit=SUMMARY_LIMIT) if len(summaries) else ""
    return summary or catalog.described(item)


def window_prompt(template: Template, lines: Sequence[str], previous: str) -> str:
    """Returns the TUBC prompt of one window (p3 of MLLM-SRec): its items, oldest first, after what the window
    before led to."""
    return template.fill({"items": numbered(lines), "previous": safe_text(previous, limit=SUMMARY_LIMIT)})
