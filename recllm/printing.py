"""Text from data on a terminal: control sequences are shown, not sent."""

from __future__ import annotations

_KEPT = "\n\t"


def printable(text: str) -> str:
    """Returns a text in which each character that is not printable is escaped, line ends and tabs excepted.

    A title can then neither color the terminal, nor name its window, nor turn the direction of a line.
    """
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() or mark in _KEPT else mark.encode("unicode_escape").decode()
        for mark in text
    )
