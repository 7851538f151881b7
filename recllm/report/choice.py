"""Which users a report shows, by a rule, and what was known of them and asked about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.instructions import rows_of_task
from recllm.data.splits import Split
from recllm.data.user_histories import UserHistories
from recllm.evaluation.ranks import RankRecords

Turn = tuple[str, str]
"""Role and text of one message; an image stands as `[image]`."""


@dataclass(frozen=True)
class Chosen:
    """One list to show: `why` it was chosen, its user, and its target (None where a list has several)."""

    why: str
    user: str
    target: str | None
    rank: float
    """The expected rank of its best positive."""
    candidates: int


def choose(records: RankRecords, count: int, seed: int) -> list[Chosen]:
    """Chooses lists by the expected rank of their best positive: a third best, a third in the middle, a third
    worst; among equals at random. Ours.

    Args:
        records: Of the system that the report is about.
        count: Lists to choose; all where there are fewer.
        seed: Of the order among equals.
    """
    frame = pl.DataFrame(
        {
            "user": records.user.cast(pl.String),
            "item": records.item.cast(pl.String),
            "rank": records.above + (records.tied + 1) / 2,
            "n": records.n,
        }
    )
    if records.lists == "user":
        best = frame.group_by("user", maintain_order=True).agg(pl.col("rank").min(), pl.col("n").first())
        frame = best.with_columns(item=pl.lit(None, pl.String))
    lists = frame.height
    order = np.lexsort((np.random.default_rng(seed).permutation(lists), frame["rank"].to_numpy()))
    count = min(count, lists)
    best, middle, worst = (count + 2) // 3, count // 3, (count + 1) // 3
    start = max(best, min((lists - middle) // 2, lists - worst - middle))
    groups = (
        ("Best", order[:best]),
        ("Middle", order[start : start + middle]),
        ("Worst", order[lists - worst :]),
    )
    return [
        Chosen(why, row["user"], row["item"], row["rank"], row["n"])
        for why, places in groups
        for row in frame[places].iter_rows(named=True)
    ]


def histories(split: Split, part: str, chosen: Sequence[Chosen]) -> list[list[int]]:
    """Returns the item codes that were known of the user of each list before its target, oldest first; where
    a list has several targets, before the first of them."""
    dataset, of = split.dataset, UserHistories.of(split, part)
    first = of.before_first_target()
    user_codes = {user: code for code, user in enumerate(dataset.users["user"])}
    item_codes = {item: code for code, item in enumerate(dataset.items["item"])}
    known = []
    for one in chosen:
        user = user_codes[one.user]
        count = first[user]
        if one.target is not None:
            (count,) = of.before(np.array([user]), np.array([item_codes[one.target]]))
        begin = of.offsets[user]
        known.append(dataset.item_codes[of.rows[begin : begin + count]].tolist())
    return known


def item_texts(
    dataset: Dataset, items: Sequence[str]
) -> tuple[dict[str, dict[str, str]], list[Path], list[str]]:
    """Returns what models wrote about items: from each file of texts that answers prompts about items.

    Returns:
        Texts by file name and item; the files; and the names of those that were written for another state of
        the dataset and are left out.
    """
    texts: dict[str, dict[str, str]] = {}
    files, stale = [], []
    for path in sorted((dataset.folder / "texts").glob("*.parquet")):
        columns = pl.read_parquet_schema(path)
        if not {"id", "text", "prompt_hash"} <= set(columns) or "user" in columns:
            continue
        facts = json.loads(pl.read_parquet_metadata(path).get("recllm.texts", "{}"))
        if facts.get("data_hash") != dataset.data_hash:
            stale.append(path.name)
            continue
        found = pl.scan_parquet(path, glob=False).filter(pl.col("id").is_in(list(items)))
        texts[path.stem] = dict(found.select("id", "text").collect().iter_rows())
        files.append(path)
    return texts, files, stale


def prompts(path: Path, chosen: Chosen) -> dict[str, list[Turn]]:
    """Returns the turns of the prompt about each candidate of a list, by item; those that there are."""
    rows = rows_of_task(pl.scan_parquet(path, glob=False)).filter(pl.col("user") == chosen.user)
    if chosen.target is not None:
        rows = rows.filter(pl.col("target") == chosen.target)
    table = rows.select("item", "prompt").collect()
    return {
        item: [(turn["role"], _text(turn["content"])) for turn in turns] for item, turns in table.iter_rows()
    }


def shared(chats: Sequence[Sequence[Turn]]) -> list[Turn]:
    """Returns how all chats of a list begin: whole turns, and whole lines of the turn in which they part."""
    alike: list[Turn] = []
    for turns in zip(*chats, strict=False):
        roles, texts = {turn[0] for turn in turns}, [turn[1].split("\n") for turn in turns]
        lines = list(_alike(texts))
        if len(roles) == 1 and lines:
            alike.append((turns[0][0], "\n".join(lines)))
        if len(set(turns)) > 1:
            break
    return alike


def rest_of(chat: Sequence[Turn], beginning: Sequence[Turn]) -> list[Turn]:
    """Returns what a chat says after the part that it shares with others."""
    rest = []
    for place, (role, text) in enumerate(chat):
        known = beginning[place][1] if place < len(beginning) else ""
        left = text[len(known) :].strip()
        if left:
            rest.append((role, left))
    return rest


def _alike(texts: Sequence[Sequence[str]]) -> Iterator[str]:
    for lines in zip(*texts, strict=False):
        if len(set(lines)) > 1:
            return
        yield lines[0]


def _text(content: list[dict[str, Any]]) -> str:
    return "".join("[image]" if part["type"] == "image" else part["text"] or "" for part in content)
