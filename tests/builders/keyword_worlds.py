"""Keywords of items and neighbors of targets, written by hand for MMSRARec's instruction rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.keywords import write_keywords
from recllm.data.neighbors import SCHEMA, neighbors_path, write_neighbors
from recllm.data.ordering import places_in_time
from recllm.data.splits import Split
from recllm.data.texts import text_path
from recllm.data.user_histories import UserHistories

PARTS = ("train", "valid", "test")


def words_of_item(item: str) -> list[str]:
    """An item's own word, and two that it shares with others."""
    number = sum(map(ord, item))
    return [f"word {item}", f"kind {number % 3}", f"maker {number % 2}"]


def add_keywords(
    dataset: Dataset, words: Callable[[str], list[str]] = words_of_item, name: str = "keywords"
) -> None:
    """Writes keywords of all items."""
    items = dataset.items["item"].to_list()
    table = pl.DataFrame({"id": items, "keywords": [words(item) for item in items]})
    write_keywords(text_path(dataset.folder, name), table, data_hash=dataset.data_hash)


def add_neighbors(
    split: Split, k: int = 2, name: str = "sasrec", time: str = "known", next_items: int = 1
) -> None:
    """Writes as neighbors of each target the latest training interactions of others that precede it."""
    dataset = split.dataset
    users, items = dataset.users["user"], dataset.items["item"]
    places = places_in_time(dataset.timestamps, len(dataset.user_codes))
    training = split.rows("train")
    training = training[np.argsort(places[training])]
    rows = []
    for part in PARTS:
        for target in UserHistories.of(split, part).target_rows.tolist():
            user = dataset.user_codes[target]
            others = training[dataset.user_codes[training] != user]
            if time == "known":
                others = others[places[others] < places[target]]
            for rank in range(1, k + 1):
                mine = others[dataset.user_codes[others] != user]
                if not len(mine):
                    break
                neighbor = dataset.user_codes[mine[-1]]
                of_neighbor = mine[dataset.user_codes[mine] == neighbor][-next_items:]
                others = mine[dataset.user_codes[mine] != neighbor]
                rows.append(
                    {
                        "part": part,
                        "user": users[int(user)],
                        "target": items[int(dataset.item_codes[target])],
                        "target_row": target,
                        "rank": rank,
                        "similarity": 1 - rank / 10,
                        "neighbor": users[int(neighbor)],
                        "known": 1,
                        "next": items.gather(dataset.item_codes[of_neighbor]).to_list(),
                        "next_rows": of_neighbor.tolist(),
                    }
                )
    write_neighbors(
        neighbors_path(dataset.folder, name),
        pl.DataFrame(rows, schema=SCHEMA),
        split,
        **{"ranker": "by hand", "top_k": k, "base": "prefixes", "time": time, "next_items": next_items},
        targets_per_user=0,
        parts={part: {} for part in PARTS},
        weights=[],
    )
