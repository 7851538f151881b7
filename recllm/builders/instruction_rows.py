"""The rows of instruction tuples: who is asked about what, and what the prompt may tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.builders.chats import NO, YES, Chat, Composer
from recllm.builders.histories import Histories, History, Target
from recllm.builders.negatives import NegativeSampler
from recllm.builders.options import InstructionOptions
from recllm.builders.preferences import Preferences
from recllm.builders.prompt_length import PromptLength
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.mllm.chat import message
from recllm.mllm.token_budget import BudgetError

_MESSAGES = pl.List(
    pl.Struct({"role": pl.String, "content": pl.List(pl.Struct({"type": pl.String, "text": pl.String}))})
)
SCHEMA = {
    "id": pl.String,
    "user": pl.String,
    "item": pl.String,
    "label": pl.Int8,
    "target": pl.String,
    "target_row": pl.Int64,
    "prompt": _MESSAGES,
    "completion": _MESSAGES,
    "images": pl.List(pl.String),
    "shown": pl.List(pl.Int64),
}


class InstructionBuilder:
    """Makes the rows of one part.

    Args:
        split: The split.
        part: `train`, `valid` or `test`.
        options: What the rows are to hold.
        composer: Writes the chats.
        sampler: Draws negatives where no candidates are given.
        preferences: The summaries made for this part; None to go without.
        length: Counts the tokens of a prompt; None where there is no bound.

    Attributes:
        counts: What was made and what was left out, for the manifest; complete after `rows` has ended.
    """

    def __init__(
        self,
        split: Split,
        part: str,
        options: InstructionOptions,
        composer: Composer,
        sampler: NegativeSampler,
        preferences: Preferences | None,
        length: PromptLength | None,
    ) -> None:
        self.split, self.part, self.options = split, part, options
        self.composer, self.sampler = composer, sampler
        self.preferences, self.length = preferences, length
        self.histories = Histories(split, part)
        users = split.dataset.users
        self._user_ids = users["user"]
        self._profiles = users["profile"] if "profile" in users.columns else None
        self._item_ids = split.dataset.items["item"]
        self._candidates = self._read_candidates()
        self.counts: Counter[str] = Counter()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows, user by user, targets in order of time, each positive before its negatives."""
        for number, user in enumerate(self.histories.users()):
            if number == self.options.limit:
                return
            self.counts["users"] += 1
            history, rng = self.histories.history(user), self.sampler.rng(user)
            touched = np.unique(np.concatenate([history.items, self._held_out_items(user)]))
            for target in self._chosen_targets(user):
                candidates = self._candidates_of(user, target)
                if candidates is None:
                    candidates = self.sampler.draw(rng, target, touched, self.options.negatives)
                    self.counts["negatives_missing"] += self.options.negatives - len(candidates)
                for item in [target.item, *candidates]:
                    yield self._row(user, target, item)

    def _chosen_targets(self, user: int) -> list[Target]:
        targets = self.histories.targets(user)
        if self.part != "train":
            return targets
        if self.preferences is not None:
            ends = set(self.preferences.ends(self._user_ids[user]))
            targets = [target for target in targets if target.known in ends]
            self.counts["users_without_summary"] += not targets
        return targets[-self.options.targets_per_user :] if self.options.targets_per_user else targets

    def _held_out_items(self, user: int) -> np.ndarray:
        """The targets of one held-out part are no negatives of each other; training knows of none."""
        return np.array([target.item for target in self.histories.targets(user)], dtype=np.int64)

    def _row(self, user: int, target: Target, item: int) -> dict[str, Any]:
        name, label = self._user_ids[user], item == target.item
        identifier = f"{name}/{target.row}/{self._item_ids[item]}"
        chat = self._within_budget(user, target, item, identifier)
        if not self.histories.allowed[list(chat.shown)].all() or target.row in chat.shown:
            raise RuntimeError(f"{identifier}: the prompt tells of an interaction that must not be known")
        self.counts["rows"] += 1
        self.counts["positives" if label else "negatives"] += 1
        self.counts["rows_without_image"] += not chat.images
        return {
            "id": identifier,
            "user": name,
            "item": self._item_ids[item],
            "label": int(label),
            "target": self._item_ids[target.item],
            "target_row": target.row,
            "prompt": list(chat.messages),
            "completion": [message("assistant", YES if label else NO)],
            "images": list(chat.images),
            "shown": list(chat.shown),
        }

    def _within_budget(self, user: int, target: Target, item: int, identifier: str) -> Chat:
        """Composes the chat, with the oldest listed items left out, whole, while it is too long."""
        name = self._user_ids[user]
        history = self.histories.history(user)
        known = History(user, history.rows[: target.known], history.items[: target.known])
        summary = self.preferences.before(name, target.known) if self.preferences else None
        profile = (self._profiles[user] or "") if self._profiles is not None else ""
        fits = min(self.options.history, len(known.items))
        for listed in range(fits, -1, -1):
            chat = self.composer.compose(name, profile, known, summary, item, listed)
            if self.length is None or self.options.max_prompt_tokens is None:
                return chat
            tokens = self.length.of(identifier, chat)
            if tokens <= self.options.max_prompt_tokens:
                self.counts["history_items_left_out"] += fits - listed
                self.counts["longest_prompt_tokens"] = max(self.counts["longest_prompt_tokens"], tokens)
                return chat
        raise BudgetError(
            f"{identifier}: the prompt has {tokens:,} tokens without any listed history item, but "
            f"--max-prompt-tokens is {self.options.max_prompt_tokens:,}; allow more, or fewer --max-pixels"
        )

    def _read_candidates(self) -> dict[tuple[str, str], list[int]] | None:
        if self.options.candidates is None or self.part == "train":
            return None
        path = self.split.folder / "candidates" / self.options.candidates / f"{self.part}.parquet"
        if not path.exists():
            raise DataError(
                f"{path} does not exist; make it with `recllm data candidates {self.split.folder}`"
            )
        code_of = {item: code for code, item in enumerate(self._item_ids)}
        lists: dict[tuple[str, str], list[int]] = {}
        table = pl.read_parquet(path, glob=False, columns=["user", "target", "item", "label"])
        for user, target, item, label in table.iter_rows():
            negatives = lists.setdefault((user, target), [])
            if not label:
                negatives.append(code_of[item])
        return lists

    def _candidates_of(self, user: int, target: Target) -> list[int] | None:
        if self._candidates is None:
            return None
        return self._candidates[self._user_ids[user], self._item_ids[target.item]]


def write_rows(path: Path, rows: Iterator[dict[str, Any]], block: int = 2048) -> None:
    """Writes rows as parquet, a block at a time, so that memory stays bounded."""
    import pyarrow.parquet as pq

    schema = pl.DataFrame(schema=SCHEMA).to_arrow().schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        held: list[dict[str, Any]] = []
        for row in rows:
            held.append(row)
            if len(held) == block:
                writer.write_table(pl.DataFrame(held, schema=SCHEMA).to_arrow().cast(schema))
                held.clear()
        writer.write_table(pl.DataFrame(held, schema=SCHEMA).to_arrow().cast(schema))
