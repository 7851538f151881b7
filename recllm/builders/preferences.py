"""Texts that builders wrote, read back for others: of items by code, of users by how far they reach."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.mllm.texts import read_texts


@dataclass(frozen=True)
class Summary:
    """What TUBC wrote of a user after one window.

    Attributes:
        begin: First interaction of the window, counted from 0 in the user's history.
        end: How many interactions the summary covers: those before `end`.
        text: The summary.
        previous: The summary before it; empty for the first.
    """

    begin: int
    end: int
    text: str
    previous: str


class Preferences:
    """The summaries of all users, by how far into the history each reaches."""

    def __init__(self, summaries: Mapping[str, Sequence[Summary]]) -> None:
        self._summaries = summaries
        self._ends = {user: [summary.end for summary in each] for user, each in summaries.items()}

    @classmethod
    def open(cls, path: Path, split: Split, part: str) -> Preferences:
        """Reads texts/tubc-PART.

        Raises:
            DataError: The file was made from another split, another state of it, or for another part: its
                summaries may tell what must not be known.
        """
        table, _ = read_user_texts(path, split, part)
        summaries: dict[str, list[Summary]] = {}
        for user, begin, end, text in table.select("user", "begin", "end", "text").iter_rows():
            known = summaries.setdefault(user, [])
            known.append(Summary(begin, end, text, known[-1].text if known else ""))
        return cls(summaries)

    def ends(self, user: str) -> list[int]:
        """Returns where the summaries of a user end, ascending."""
        return self._ends.get(user, [])

    def before(self, user: str, known: int) -> Summary | None:
        """Returns the last summary that tells nothing beyond the first `known` interactions; None if there is
        none."""
        place = bisect_right(self.ends(user), known)
        return self._summaries[user][place - 1] if place else None


def read_user_texts(path: Path, split: Split, part: str) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Reads texts about users, and refuses those that may know too much for `part`.

    Raises:
        DataError: The file is of another split or part, or was made with a leak on purpose.
    """
    table, metadata = read_texts(path)
    made_for = (metadata.get("split_hash"), metadata.get("part"))
    if metadata.get("split_hash") != split.split_hash:
        raise DataError(f"{path} was made from another split than {split.folder}; make it again")
    if metadata.get("part") != part or metadata.get("leak"):
        raise DataError(
            f"{path} was made for the part {made_for[1]!r}, not for {part!r}; nothing may read it"
        )
    return table, metadata


def read_item_texts(path: Path, dataset: Dataset) -> list[str]:
    """Reads texts about items: one for each item code, empty where the file has none.

    Raises:
        DataError: The file is missing, or was made from another state of the dataset.
    """
    table, metadata = read_texts(path)
    if metadata.get("data_hash") != dataset.data_hash:
        raise DataError(f"{path} was made from another state of {dataset.folder}; make it again")
    texts = dataset.items.select("item").join(
        table.select(item="id", text="text"), on="item", how="left", maintain_order="left"
    )
    return texts["text"].fill_null("").to_list()
