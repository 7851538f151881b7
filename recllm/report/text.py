"""Text from data on its way into HTML and SVG: one line, bounded, unable to forge markup or reorder it."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence

REPLACEMENT = "\ufffd"
ELLIPSIS = "…"
LONG, SHORT = 300, 60
"""Characters kept of a text and of a name."""
_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji are misspelled without them
_MARKS = 4  # combining marks in a row; more would paint over the lines above and below


def clean(text: object, limit: int = LONG) -> str:
    """Returns any text as one line of at most `limit` characters.

    Control, bidirectional-override, private, unassigned and surrogate characters become U+FFFD, white space
    becomes single spaces, and of a run of combining marks the first four are kept. Ours.
    """
    characters = []
    marks = 0
    for character in str(text)[: 4 * limit + 64]:
        kind = unicodedata.category(character)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        if marks > _MARKS:
            continue
        if character.isspace() or kind[0] == "Z":
            characters.append(" ")
        elif kind[0] == "C" and character not in _JOINERS:
            characters.append(REPLACEMENT)
        else:
            characters.append(character)
    line = " ".join("".join(characters).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + ELLIPSIS


def escape(text: object, limit: int = LONG) -> str:
    """Returns cleaned text for an attribute, or for an element that holds nothing else."""
    return html.escape(clean(text, limit), quote=True)


def inline(text: object, limit: int = LONG) -> str:
    """Returns cleaned text as an element of its own, so that right-to-left script stays within it."""
    return f"<bdi>{escape(text, limit)}</bdi>"


def names(texts: Sequence[object], limit: int = SHORT) -> list[str]:
    """Returns short names for people, different where the texts are, each once."""
    given = [clean(text, limit) for text in texts]
    taken = set(given) if len(set(given)) == len(given) else set()
    short: list[str] = []
    for name in given:
        number, unique = 1, name
        while not taken and unique in short:
            number += 1
            unique = f"{name[: limit - len(str(number)) - 3]} ({number})"
        short.append(unique)
    return short


def shown_names(systems: Sequence[str]) -> dict[str, str]:
    """Maps systems to names that people can read, different for each."""
    return dict(zip(systems, names(systems), strict=True))


def describe(title: str, said: Mapping[str, str]) -> str:
    """Returns what a figure shows as plain text, for those who cannot see it."""
    return clean(f"{title}. " + "; ".join(f"{name}: {value}" for name, value in said.items()), 600)


def plural(count: int, noun: str) -> str:
    """Returns `1 user`, `2 users`, `1,000 users`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
