"""The contract of `DATASET/neighbors/<name>.parquet`: users similar to a target's user, and their next items.

One row for each neighbor of a target:

| column       | meaning                                                                                     |
|--------------|---------------------------------------------------------------------------------------------|
| `part`       | `train`, `valid` or `test`: the part of the target                                          |
| `user`       | the target's user                                                                           |
| `target`     | the target's item                                                                           |
| `target_row` | its row number in `interactions.parquet`                                                    |
| `rank`       | 1 to k, by falling similarity                                                               |
| `similarity` | the cosine of the two users' states, float32                                                |
| `neighbor`   | the similar user, never `user`                                                              |
| `known`      | how many of the neighbor's training interactions, from the first, made up the state         |
| `next`       | the items that the neighbor interacted with after these, in order                           |
| `next_rows`  | their row numbers in `interactions.parquet`; training interactions only                     |

A target without a neighbor has no row. The parquet metadata `recllm.made` has the hashes of dataset and
split, and how the neighbors were found (see `Neighbors`). Any program may write such a file: `Neighbors.open`
checks each row against the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recllm.data.coding import codes_of
from recllm.data.ordering import places_in_time
from recllm.data.origins import Origin, check_same_origin, made, made_metadata, read_made
from recllm.data.splits import Split
from recllm.data.tables import read_table
from recllm.errors import DataError
from recllm.files import sha256, write_file

SCHEMA = {
    "part": pl.String,
    "user": pl.String,
    "target": pl.String,
    "target_row": pl.Int64,
    "rank": pl.Int32,
    "similarity": pl.Float32,
    "neighbor": pl.String,
    "known": pl.Int64,
    "next": pl.List(pl.String),
    "next_rows": pl.List(pl.Int64),
}
Time = Literal["known", "any"]
_REMEDY = "find the neighbors again with `recllm retrieve neighbors`"


def neighbors_path(folder: Path, name: str) -> Path:
    """Returns where neighbors of a name are stored in a dataset folder."""
    return folder / "neighbors" / f"{name}.parquet"


@dataclass(frozen=True)
class Neighbors:
    """The neighbors of targets.

    Attributes:
        path: The file.
        sha256: Its hash.
        facts: How they were found: `ranker`, `top_k`, `base`, `time`, `next_items`, `targets_per_user`,
            `parts`, `weights`.
        rows: Row numbers of all next items, target by target and neighbor by neighbor; shape [n].
    """

    path: Path
    sha256: str
    facts: Mapping[str, Any]
    rows: np.ndarray
    _targets: np.ndarray
    _offsets: np.ndarray
    _neighbor_offsets: np.ndarray

    @property
    def time(self) -> Time:
        """`known`: all next items precede the target in time; `any`: they are any training interactions."""
        return self.facts["time"]

    @classmethod
    def open(cls, path: Path, split: Split, parts: Sequence[str]) -> Neighbors:
        """Reads a file and checks what it says about some parts.

        Args:
            path: The file.
            split: The split. Its test part is opened only if `parts` has `test`.
            parts: The parts whose targets are asked about; rows of others are left out.

        Raises:
            DataError: The file is missing, was made from another dataset or split, lacks one of the parts, or
                has a row that may not be shown for its target: the user's own, not a training interaction,
                or one that does not precede the target.
        """
        if not path.is_file():
            found = ", ".join(sorted(each.stem for each in path.parent.glob("*.parquet"))) or "none"
            raise DataError(
                f"{path} does not exist (neighbors found so far: {found}); write it first: recllm retrieve "
                "neighbors --run RUN, with the run of a sequence ranker"
            )
        frame, metadata = read_table(path)
        facts = read_made(metadata, path)
        absent = [name for name, kind in SCHEMA.items() if frame.schema.get(name) != kind]
        if absent or facts.get("time") not in ("known", "any") or not isinstance(facts.get("parts"), dict):
            what = f"a column {absent[0]!r} of type {SCHEMA[absent[0]]}" if absent else "its metadata"
            raise DataError(f"{path} is not a file of neighbors: it lacks {what}; {_REMEDY}")
        made_from = Origin.of_manifest(path, facts)
        check_same_origin(made_from, split.origin, remedy=_REMEDY, required=("dataset", "split"))
        if missing := [part for part in parts if part not in facts["parts"]]:
            raise DataError(
                f"{path} has no neighbors of the targets of {', '.join(missing)}; write it again with "
                f"--parts {' '.join(dict.fromkeys([*facts['parts'], *missing]))} --overwrite"
            )
        frame = frame.filter(pl.col("part").is_in(list(parts))).sort("target_row", "rank")
        _check(path, frame, split, facts["time"])
        lists = frame["next_rows"]
        counts = lists.list.len().cast(pl.Int64).to_numpy()
        targets, first = np.unique(frame["target_row"].to_numpy(), return_index=True)
        return cls(
            path,
            sha256(path),
            facts,
            lists.explode().drop_nulls().to_numpy(),
            targets,
            np.append(first, len(frame)),
            np.concatenate(([0], np.cumsum(counts))),
        )

    def next_rows(self, target_row: int) -> list[np.ndarray]:
        """Returns the row numbers of the next items of each neighbor of a target, the most similar first."""
        place = int(np.searchsorted(self._targets, target_row))
        if place == len(self._targets) or self._targets[place] != target_row:
            return []
        bounds = self._neighbor_offsets[self._offsets[place] : self._offsets[place + 1] + 1].tolist()
        return [self.rows[begin:end] for begin, end in pairwise(bounds)]


def write_neighbors(path: Path, frame: pl.DataFrame, split: Split, **facts: Any) -> None:
    """Writes a file of neighbors, in one step.

    Args:
        path: The file.
        frame: Rows of `SCHEMA`.
        split: The split that they were found in.
        **facts: As `Neighbors.facts`.
    """
    hashes = {"data_hash": split.dataset.data_hash, "split_hash": split.split_hash}
    metadata = made_metadata(made(**hashes, **facts))
    table = frame.select(*SCHEMA).cast(SCHEMA)  # type: ignore[arg-type]
    write_file(path, lambda temporary: table.write_parquet(temporary, metadata=metadata))


def _check(path: Path, frame: pl.DataFrame, split: Split, time: Time) -> None:
    """Checks each row against the split."""
    dataset = split.dataset
    log = len(dataset.user_codes)

    def refuse(wrong: np.ndarray, rows: np.ndarray, why: str) -> None:
        if wrong.any():
            row = frame.row(int(rows[wrong.argmax()]), named=True)
            raise DataError(
                f"{path}: user {row['user']!r}, target {row['target']!r}, neighbor {row['neighbor']!r} "
                f"(rank {row['rank']}): {why}; {_REMEDY}"
            )

    every = np.arange(len(frame))
    if empty := [name for name in SCHEMA if frame[name].null_count()]:
        raise DataError(f"{path}: the column {empty[0]!r} has a gap; {_REMEDY}")
    targets = frame["target_row"].to_numpy()
    user = codes_of(frame["user"], dataset.users["user"], "user", of="neighbors")
    neighbor = codes_of(frame["neighbor"], dataset.users["user"], "user", of="neighbors")
    item = codes_of(frame["target"], dataset.items["item"], "item", of="neighbors")
    refuse((targets < 0) | (targets >= log), every, "its target_row is not a row of the log")
    wrong = (dataset.user_codes[targets] != user) | (dataset.item_codes[targets] != item)
    refuse(wrong, every, "its target_row is another interaction")
    for part in frame["part"].unique():
        here = (frame["part"] == part).to_numpy()
        held = np.isin(targets, split.rows(part, targets=True))
        refuse(here & ~held, every, f"its target_row is not a target of {part}")
    refuse(neighbor == user, every, "the neighbor is the user")
    place = frame.select(place=pl.int_range(1, pl.len() + 1).over("target_row"))["place"].to_numpy()
    refuse(frame["rank"].to_numpy() != place, every, "the ranks of the target's neighbors are not 1, 2, ...")
    counts = frame["next_rows"].list.len().cast(pl.Int64).to_numpy()
    refuse(counts == 0, every, "next_rows is empty")
    refuse(counts != frame["next"].list.len().to_numpy(), every, "next and next_rows differ in length")
    missing = frame.select(pl.col("next", "next_rows").list.eval(pl.element().is_null()).list.any())
    refuse((missing["next"] | missing["next_rows"]).to_numpy(), every, "next or next_rows has a gap")
    of = np.repeat(every, counts)
    rows = frame["next_rows"].explode().drop_nulls().to_numpy()
    refuse((rows < 0) | (rows >= log), of, "next_rows has a number that is not a row of the log")
    training = np.zeros(log, dtype=bool)
    training[split.rows("train")] = True
    refuse(~training[rows], of, "next_rows has an interaction that is not a training interaction")
    refuse(dataset.user_codes[rows] != neighbor[of], of, "next_rows has an interaction of another user")
    named = codes_of(frame["next"].explode().drop_nulls(), dataset.items["item"], "item", of="neighbors")
    refuse(dataset.item_codes[rows] != named, of, "next and next_rows differ")
    if time == "known":
        places = places_in_time(dataset.timestamps, log)
        late = places[rows] >= places[targets[of]]
        refuse(late, of, "next_rows has an interaction that does not precede the target")
