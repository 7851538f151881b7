"""MMSRARec's keyword prompts (arXiv 2512.20916, stage 1).

The paper asks for image and text to be summarized separately, so that text does not drown the image; its
prompts are pictures of tables that cannot be recovered, so the words are ours, and so is `parse_keywords`.
"""

from __future__ import annotations

import re

from recllm.prompts.templates import Template

IMAGE_KEYWORDS = Template(
    "mmsrarec.image_keywords",
    "List three to six keywords for what the image shows, separated by commas. Keywords only.",
    {},
    source="separate summary of the image, stage 1; the words are ours",
)
"""Keywords of the image, which stands before the text."""

TEXT_KEYWORDS = Template(
    "mmsrarec.text_keywords",
    "List three to six keywords for this item, separated by commas. Keywords only.\n"
    "Title: {title}\n"
    "Categories: {categories}\n"
    "Text: {text}",
    {"title": "the item's title", "text": "its description", "categories": "its categories"},
    source="separate summary of the text, stage 1; the words are ours",
)
"""Keywords of title, categories and description."""

TEMPLATES = (IMAGE_KEYWORDS, TEXT_KEYWORDS)

_SEPARATORS = re.compile(r"[,;\n、，；•|]|(?<=\s)[/-](?=\s)")
_LIST_MARK = re.compile(r"^\s*(?:[-*•–]\s*|\(?\d{1,2}[.)](?:\s+|$))")
_LABEL = re.compile(r"^[^,;:\n]{0,60}?\b(?:keywords?|tags?|image|text)\s*:\s*", re.IGNORECASE)
_EDGES = " \t\"'`*_.[](){}<>“”‘’«»:/-"


def parse_keywords(text: str, *, most: int = 12, longest: int = 60) -> list[str]:
    """Returns the keywords in a model's answer: split, without numbering, quotes, labels and repetitions.

    Args:
        text: The answer: separated by commas, or a bulleted or numbered list.
        most: Keywords kept.
        longest: Characters that a keyword may have; what is longer is a sentence and is dropped.

    Returns:
        Keywords in the order of the answer, each once whatever its case; an empty list where there are none.
    """
    keywords: dict[str, str] = {}
    for piece in _SEPARATORS.split(_LABEL.sub("", text)):
        word = _bare(piece)
        if any(character.isalnum() for character in word) and len(word) <= longest:
            keywords.setdefault(word.casefold(), word)
    return list(keywords.values())[:most]


def _bare(piece: str) -> str:
    """Takes away labels, list marks and quotes, also where one hides another."""
    word = " ".join(piece.split())
    while (rest := _LIST_MARK.sub("", _LABEL.sub("", word)).strip(_EDGES)) != word:
        word = rest
    return word
