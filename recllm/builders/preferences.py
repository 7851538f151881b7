"""Texts that builders wrote, read back for others: of items by code, of users by how far they reach."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data.origins import Origin, check_same_origin
from recllm.data.splits import Split
from recllm.data.texts import near_texts, read_texts
from recllm.errors import DataError
from recllm.files import sha256


@dataclass(frozen=True)
class Summary:
    """What TUBC wrote of a user after one window.

    Attributes:
        begin: First interaction of the window, counted from 0 in the user's history.
        end: How many interactions the summary covers: those before `end`.
        text: The summary.
        previous: The summary of the full window before it; empty for the first.
        prompt_hash: The prompt that it answers.
    """

    begin: int
    end: int
    text: str
    previous: str
    prompt_hash: str


class Preferences:
    """The summaries of all users, by how far into the history each reaches.

    Attributes:
        metadata: What the file says of itself.
        sha256: Hash of the file.
    """

    def __init__(
        self, summaries: Mapping[str, Sequence[Summary]], metadata: dict[str, Any], file_hash: str
    ) -> None:
        self.metadata, self.sha256 = metadata, file_hash
        self._summaries = summaries
        self._ends = {user: [summary.end for summary in each] for user, each in summaries.items()}

    @classmethod
    def open(cls, path: Path, split: Split, part: str) -> Preferences:
        """Reads texts/tubc-PART.

        Raises:
            DataError: The file is missing, or was made from another split, another state of it, or for
                another part: its summaries may tell what must not be known.
        """
        if not path.exists():
            command = f"recllm build users {split.dataset.folder} --split {split.folder.name} --parts {part}"
            raise DataError(
                f"{path} does not exist{near_texts(path)}; write it first: {command} --model NAME"
            )
        table, metadata = read_texts(path)
        made_from = Origin.of_manifest(path, metadata)
        check_same_origin(made_from, split.origin, remedy="make it again", required=("dataset", "split"))
        if metadata.get("part") != part or not {"begin", "end"} <= set(table.columns):
            raise DataError(
                f"{path} is not what TUBC wrote for the part {part!r} (it says {metadata.get('part')!r}); "
                "another part's summaries may tell what must not be known"
            )
        summaries: dict[str, list[Summary]] = {}
        full = table.filter(pl.col("end") - pl.col("begin") == metadata["window"])
        before = full.select("user", pl.col("begin") + metadata["step"], previous="text")
        columns = table.join(before, on=["user", "begin"], how="left").sort("user", "end", "begin")
        columns = columns.select(
            "user", "begin", "end", "text", pl.col("previous").fill_null(""), "prompt_hash"
        )
        for user, *summary in columns.iter_rows():
            summaries.setdefault(user, []).append(Summary(*summary))
        return cls(summaries, metadata, sha256(path))

    def ends(self, user: str) -> list[int]:
        """Returns where the summaries of a user end, ascending."""
        return self._ends.get(user, [])

    def before(self, user: str, known: int) -> Summary | None:
        """Returns the last summary that tells nothing beyond the first `known` interactions, or None."""
        place = bisect_right(self.ends(user), known)
        return self._summaries[user][place - 1] if place else None
