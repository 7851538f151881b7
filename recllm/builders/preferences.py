"""Texts that builders wrote, read back for others: of items by code, of users by how far they reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    """The summaries of all users, by how far into the history each reaches; held in columns.

    Args:
        table: A row for each summary: `user`, `begin`, `end`, `text`, `prompt_hash`.
        metadata: The file's metadata, of which `window` and `step` are read.
        file_hash: Hash of the file.

    Attributes:
        metadata: The file's metadata.
        sha256: Hash of the file.
    """

    def __init__(self, table: pl.DataFrame, metadata: dict[str, Any], file_hash: str) -> None:
        self.metadata, self.sha256 = metadata, file_hash
        table = table.sort("user", "end", "begin").with_row_index("place")
        full = table.filter(pl.col("end") - pl.col("begin") == metadata["window"])
        before = full.select("user", pl.col("begin") + metadata["step"], previous="place")
        table = table.join(before, on=["user", "begin"], how="left", maintain_order="left")
        self._begins, self._ends = (table[name].cast(pl.Int32).to_numpy() for name in ("begin", "end"))
        self._previous = table["previous"].cast(pl.Int64).fill_null(-1).to_numpy()
        self._texts, self._hashes = table["text"], table["prompt_hash"]
        runs = table["user"].rle().struct.unnest()
        self._offsets = np.concatenate([[0], np.cumsum(runs["len"].to_numpy(), dtype=np.int64)])
        self._users = {user: number for number, user in enumerate(runs["value"])}

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
        return cls(table.select("user", "begin", "end", "text", "prompt_hash"), metadata, sha256(path))

    def ends(self, user: str) -> np.ndarray:
        """Returns where the summaries of a user end, ascending; int32, shape [summaries]."""
        return self._ends[self._rows(user)]

    def before(self, user: str, known: int) -> Summary | None:
        """Returns the last summary that covers nothing beyond the first `known` interactions, or None."""
        rows = self._rows(user)
        place = rows.start + int(np.searchsorted(self._ends[rows], known, side="right")) - 1
        if place < rows.start:
            return None
        previous = self._previous[place]
        return Summary(
            int(self._begins[place]),
            int(self._ends[place]),
            self._texts[place],
            self._texts[int(previous)] if previous >= 0 else "",
            self._hashes[place],
        )

    def _rows(self, user: str) -> slice:
        number = self._users.get(user)
        return slice(0, 0) if number is None else slice(*self._offsets[number : number + 2].tolist())
