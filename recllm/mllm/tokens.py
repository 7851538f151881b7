"""Exact tokens of texts that share most of their parts: each part between special tokens is tokenized once.

Candidates of one user share a history, and images are runs of one token. A tokenizer of the `tokenizers`
library first takes added tokens out of a text, then handles the parts between them one by one. The tokens of
a text are therefore those of its parts, whatever these hold: nothing is merged across an added token. A text
is divided only at added tokens for which this always holds, see `_dividers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

_NOTHING = np.empty(0, np.int64)
_HELD = 16 * 2**20
"""Characters of parts whose tokens are held; when there are more, all are dropped."""


class PartTokenizer:
    """Returns the same tokens as a tokenizer's own call, but tokenizes each part of a text once.

    Args:
        tokenizer: A transformers tokenizer. One without the `tokenizers` library behind it gets whole texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.size = len(tokenizer)
        self._known: dict[tuple[str, bool], np.ndarray] = {}
        self._held = 0
        self._repeats: dict[tuple[int, int], np.ndarray] = {}
        self._dividers: dict[str, tuple[int, re.Pattern[str]]] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return
        # A copy, because calls of the tokenizer change padding and truncation of its backend.
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        added = self._backend.get_added_tokens_decoder()
        own = self._backend.encode("", add_special_tokens=True).ids
        if getattr(tokenizer, "split_special_tokens", False) or not (found := _dividers(added)).keys() - {
            token.content for number, token in added.items() if number in own
        }:
            return
        self._dividers = found
        # A normalized token is looked for later, within the parts.
        self._finder = re.compile(_any_of(t.content for t in added.values() if not t.normalized))
        self._ends = self._own_ends(next(text for text in found if found[text][0] not in own))

    def ids(self, text: str, special: bool) -> np.ndarray:
        """Returns the tokens of a text: (tokens,) int64.

        Args:
            text: Any text.
            special: Add what the tokenizer puts at the beginning and at the end, as its `add_special_tokens`.
        """
        if not self._dividers:
            return np.array(self._tokenizer(text, add_special_tokens=special).input_ids, np.int64)
        before, after = self._ends if special else (_NOTHING, _NOTHING)
        parts = [before]
        start = place = 0
        while found := self._finder.search(text, place):
            place = found.end()
            if (divider := self._dividers.get(found.group())) is None:
                continue  # a token that may act on the text beside it: left within its part
            token, run = divider
            if start < found.start():
                parts.append(self._part(text[start : found.start()], start == 0))
            start = place = run.match(text, found.start()).end()
            parts.append(self._repeated(token, (start - found.start()) // len(found.group())))
        if start < len(text):
            parts.append(self._part(text[start:], start == 0))
        return np.concatenate([*parts, after], dtype=np.int64)

    def alone(self, text: str) -> np.ndarray | None:
        """Returns the tokens that a text has within any other; None where its neighbors may change them."""
        found = list(self._finder.finditer(text)) if self._dividers else []
        if not found or (found[0].start(), found[-1].end()) != (0, len(text)):
            return None
        if not {found[0].group(), found[-1].group()} <= self._dividers.keys():
            return None
        return self.ids(text, special=False)

    def _part(self, part: str, first: bool) -> np.ndarray:
        """Returns the tokens of a part that follows a divider, or with which a text begins."""
        key = (part, first)
        if key not in self._known:
            if self._held > _HELD:
                self._known, self._held = {}, 0
            self._held += len(part)
            # Some tokenizers treat the beginning of a text in their own way, so other parts get a divider.
            divider = "" if first else next(iter(self._dividers))
            ids = self._backend.encode(divider + part, add_special_tokens=False).ids  # takes no thread
            self._known[key] = np.array(ids if first else ids[1:], np.int64)
        return self._known[key]

    def _repeated(self, token: int, count: int) -> np.ndarray:
        if (token, count) not in self._repeats:
            self._repeats[token, count] = np.full(count, token, np.int64)
        return self._repeats[token, count]

    def _own_ends(self, divider: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the tokenizer adds before and after a text."""
        around = np.array(self._backend.encode(divider, add_special_tokens=True).ids, np.int64)
        (place,) = np.flatnonzero(around == self._dividers[divider][0])
        return around[:place], around[place + 1 :]


def part_tokenizer(tokenizer: Any) -> PartTokenizer:
    """Returns the part tokenizer of a tokenizer: one for each, made again when tokens have been added."""
    known = _OF_TOKENIZER.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _OF_TOKENIZER[tokenizer] = PartTokenizer(tokenizer)
    return known


def forget() -> None:
    """Drops all tokens that are held; for benchmarks."""
    _OF_TOKENIZER.clear()


_OF_TOKENIZER: WeakKeyDictionary[Any, PartTokenizer] = WeakKeyDictionary()


def _dividers(added: Mapping[int, Any]) -> dict[str, tuple[int, re.Pattern[str]]]:
    """Returns the added tokens that always divide a text: their ids, and patterns of their repetitions.

    They neither act on the text beside them nor depend on it, no other added token begins with one of them,
    and none can be stripped with the white space beside another.
    """
    texts = [token.content for token in added.values() if not token.normalized]
    return {
        token.content: (number, re.compile(f"(?:{re.escape(token.content)})+"))
        for number, token in added.items()
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and token.content == token.content.strip() != ""
        and sum(text.startswith(token.content) for text in texts) == 1
    }


def _any_of(texts: Iterable[str]) -> str:
    """Returns a pattern that finds the longest of some texts at the leftmost place, of thousands, too."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        ways = [re.escape(character) + pattern(below) for character, below in node.items() if character]
        if not ways:
            return ""
        return f"(?:{'|'.join(ways)})" + ("?" if "" in node else "")

    return pattern(tree)
