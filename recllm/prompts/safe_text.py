"""Text from data is hostile: `safe_text` makes it text that opens no turn, closes none, shows no image."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

ELLIPSIS = "…"
IMAGE_MARK = "\ufffc"
"""Stands in a filled template where an image goes; Unicode's own sign for an embedded object. `safe_text`
removes it, so that no text from data can add an image."""

# What reads as a special token to one of the model families that recllm loads, whichever of them is in use:
# prompts are also written for models whose tokenizer is not at hand (a server's), and kept on disk for
# others.
_LIKE_SPECIAL = re.compile(
    r"<[|｜][^<>]{0,64}[|｜]>"  # <|im_end|>, <|image_pad|>, <|begin_of_text|>
    r"|</?[A-Za-z][A-Za-z0-9_\-]{0,31}>"  # <s>, </s>, <image>, <start_of_turn>, <IMG_CONTEXT>, HTML tags too
    r"|<<\s*/?\s*SYS\s*>>"
    r"|\[/?[a-z]?[A-Z][A-Z0-9_]{1,31}\]"  # [INST], [PAD], [gMASK], [TOOL_CALLS], [UNUSED_TOKEN_141]
)
_SPACE = re.compile(r"\s+")
_KEPT_FORMAT = "\u200c\u200d"  # joiners: Persian, Indic scripts and emoji are misspelled without them


def safe_text(text: str | None, *, special_tokens: Iterable[str] = (), limit: int = 2000) -> str:
    """Returns text from data as one line of ordinary text.

    Composes accents (Unicode NFC, as tokenizers do), drops control, bidirectional-override, private and
    unassigned characters, makes each run of white space one space, cuts at `limit` characters, and puts a
    space into whatever reads as a special token. Ours.

    Args:
        text: A title, review, profile, or what a model wrote; None counts as empty.
        special_tokens: Special tokens of the tokenizer in use, beyond the usual forms, which are always
            looked for.
        limit: Characters kept; a longer text ends in an ellipsis.

    Returns:
        The text. Applying the function to it again changes nothing.
    """
    if not text:
        return ""
    text = unicodedata.normalize("NFC", text[: 4 * limit + 64])
    if not text.isprintable() or IMAGE_MARK in text:  # what is printable is kept, but for the mark
        text = "".join(" " if _is_dropped(character) else character for character in text)
    text = unicodedata.normalize("NFC", _SPACE.sub(" ", text).strip())
    text = neutralize(text, special_tokens)
    if len(text) > limit:
        text = neutralize(text[: max(limit - 1, 0)].rstrip() + ELLIPSIS, special_tokens)
    return text


def _is_dropped(character: str) -> bool:
    if character == IMAGE_MARK:
        return True
    return unicodedata.category(character)[0] == "C" and character not in _KEPT_FORMAT


def neutralize(text: str, special_tokens: Iterable[str] = ()) -> str:
    """Puts a space behind the first character of whatever reads as a special token, until nothing does.

    Args:
        text: Any text.
        special_tokens: Further tokens, found by their exact spelling.
    """
    tokens = sorted({token for token in special_tokens if token.strip()}, key=len, reverse=True)
    while True:
        before = text
        text = _LIKE_SPECIAL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        for token in tokens:
            if token in text:
                spaced = f"{token[0]} {token[1:]}"
                text = text.replace(token, "" if token in spaced else spaced)
        if text == before:
            return text
