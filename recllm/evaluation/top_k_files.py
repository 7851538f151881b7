"""`topk/<system>.parquet`: the best items of each target's list, which a second stage is to rank again.

| column   | meaning                                                                                     |
|----------|---------------------------------------------------------------------------------------------|
| `user`   | the user's id                                                                               |
| `target` | the target's id; a user with several targets has the same items for each of them            |
| `item`   | an item's id                                                                                |
| `score`  | the first stage's score, a finite number                                                    |
| `rank`   | 1 to K, by falling score; may be left out, and is then the order of the rows                |

The parquet metadata has `recllm.protocol` (a full one, such as `loo/full/mask-seen`), `recllm.system`, and
where it is known `recllm.candidates`, the fingerprint of the lists. Any system may bring such a file. A list
must hold the best of all candidates under that protocol: which of several items with the last score are in it
is the system's choice (ours: those that come first in the catalog), and items that the protocol masks are no
candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.data.candidates import FullRanking, full_ranking
from recllm.data.origins import Origin, check_same_origin, made_metadata, read_made
from recllm.data.splits import HeldOut, Split
from recllm.data.tables import describe, read_table, text_ids
from recllm.errors import DataError
from recllm.evaluation.full_ranking import Scores, rank_catalog, top_k
from recllm.evaluation.inputs import stem
from recllm.files import write_file

_KEYS = ("user", "target", "item")


@dataclass(frozen=True, eq=False)
class TopK:
    """A file of top-K lists.

    Attributes:
        path: The file.
        frame: `user, target, item` (text) and `score` (float64), each list by rank, in the file's order.
        k: Items of the longest list.
        protocol: The full protocol of the first stage.
        system: The first stage's name.
        candidates: Fingerprint of the first stage's lists; empty where it is not known.
        made: How the file was made, as far as it says.
    """

    path: Path
    frame: pl.DataFrame
    k: int
    protocol: str
    system: str
    candidates: str
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        """What the lists were made from."""
        return Origin.of_manifest(self.path, self.made, candidates=self.candidates)

    @property
    def reranked_protocol(self) -> str:
        """What scores of these rows were made under, for example `loo/full/mask-seen/top50-popularity`."""
        return f"{self.protocol}/top{self.k}-{self.system}"

    @classmethod
    def read(cls, path: Path) -> TopK:
        """Reads and checks a file.

        Raises:
            DataError: A column or the protocol is missing, the protocol is not a full one, an item stands
                twice in a list, a score is not finite or rises with the rank, or a user's targets have
                different lists. The message names the row.
        """
        frame, metadata = read_table(path)
        frame = text_ids(frame, _KEYS, str(path))
        protocol = metadata.get("recllm.protocol", "")
        if "full" not in protocol.split("/"):
            raise DataError(
                f"{path}: its metadata `recllm.protocol` is {protocol!r}; expected that of a full ranking, "
                "for example loo/full/mask-seen (`recllm score ... --top-k` writes it)"
            )
        if frame.is_empty():
            raise DataError(f"{path} has no rows; expected the best items of each target")
        frame = _by_rank(frame, path)
        _check_lists(frame, path)
        k = int(frame.group_by("user", "target").len()["len"].max())
        system = metadata.get("recllm.system") or stem(path)
        made = read_made(metadata, path)
        return cls(path, frame, k, protocol, system, metadata.get("recllm.candidates", ""), made)

    def lists_for(self, split: Split, part: HeldOut) -> dict[tuple[str, str], list[int]]:
        """Returns the item codes of each (user, target), best first.

        Raises:
            DataError: The file is of another split, part or dataset, names a user, target or item that they
                do not have, lists an item that the protocol masks, or lacks a target.
        """
        ranking = self._ranking_of(split, part)
        item_codes = {item: code for code, item in enumerate(split.dataset.items["item"])}
        place = {user: number for number, user in enumerate(ranking.user_ids)}
        lists: dict[tuple[str, str], list[int]] = {}
        for (user, target), items in self._groups():
            where = f"{self.path}: user {user!r}, target {target!r}"
            if user not in place:
                raise DataError(f"{where}: the user has no target in the {part} part of {split.folder}")
            if unknown := [item for item in (target, *items) if item not in item_codes]:
                raise DataError(f"{where}: no item {unknown[0]!r} in {split.dataset.folder}")
            targets = _row(ranking.positives, ranking.positive_offsets, place[user])
            if item_codes[target] not in targets:
                raise DataError(f"{where}: it is no target of the user in the {part} part of {split.folder}")
            codes = [item_codes[item] for item in items]
            masked = set(codes) & set(_row(ranking.masked, ranking.masked_offsets, place[user]).tolist())
            if masked:
                raise DataError(
                    f"{where}: item {split.dataset.items['item'][min(masked)]!r} is no candidate under "
                    f"{self.protocol!r}, for the user is known to have touched it; list candidates only"
                )
            lists[user, target] = codes
        owners = np.repeat(ranking.user_ids.to_numpy(), np.diff(ranking.positive_offsets))
        targets = ranking.item_ids.gather(ranking.positives)
        if missing := [pair for pair in zip(owners, targets, strict=True) if pair not in lists]:
            user, target = missing[0]
            raise DataError(f"{self.path}: no list for user {user!r} and target {target!r}; make it again")
        return lists

    def _groups(self) -> list[tuple[tuple[str, str], list[str]]]:
        grouped = self.frame.group_by("user", "target", maintain_order=True).agg("item")
        return [((user, target), items) for user, target, items in grouped.iter_rows()]

    def _ranking_of(self, split: Split, part: HeldOut) -> FullRanking:
        for mask in ("seen", "train", "none"):
            ranking = full_ranking(split, part, mask=mask)
            if ranking.protocol != self.protocol:
                continue
            hashes = {**split.origin.hashes, "candidates": ranking.candidates}
            check_same_origin(
                self.origin,
                replace(split.origin, hashes=hashes),
                remedy="make it again with `recllm score ... --top-k`",
            )
            return ranking
        raise DataError(
            f"{self.path} is of the protocol {self.protocol!r}, which is no full ranking of the {part} part "
            f"of {split.folder} ({split.protocol!r}); name the part by --parts, or make the file again"
        )


def write_stage(
    ranking: FullRanking,
    scores: Scores,
    k: int,
    *,
    system: str,
    ranks: Path,
    lists: Path,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Writes what a second stage needs of a first one: its top-K file and its rank records.

    Args:
        ranking: The lists, of `recllm.data.candidates.full_ranking`.
        scores: As `recllm.evaluation.rank_catalog` takes them.
        k: Items a list.
        system: The first stage's name.
        ranks: The file for the rank records.
        lists: The file for the top K.
        made: How the scores were made, which both files keep.

    Raises:
        DataError: `k` is not between 1 and the number of items, or a score is not finite.
    """
    seen = ranking.masked_offsets, ranking.masked
    items, item_scores = top_k(scores, k, len(ranking.users), len(ranking.item_ids), seen=seen)
    targets = np.diff(ranking.positive_offsets)
    of_target = np.repeat(np.arange(len(ranking.users)), targets)
    row, column = np.nonzero(items[of_target] >= 0)
    user = of_target[row]
    frame = pl.DataFrame(
        {
            "user": ranking.user_ids.gather(user).cast(pl.String),
            "target": ranking.item_ids.gather(ranking.positives[row]).cast(pl.String),
            "item": ranking.item_ids.gather(items[user, column]).cast(pl.String),
            "score": item_scores[user, column],
            "rank": (column + 1).astype(np.int32),
        }
    )
    metadata = {
        "recllm.protocol": ranking.protocol,
        "recllm.system": system,
        "recllm.candidates": ranking.candidates,
        **made_metadata(made or {}),
    }
    records = rank_catalog(ranking, scores, system=system, made=made)
    write_file(lists, lambda temporary: frame.write_parquet(temporary, metadata=metadata))
    records.save(ranks)


def _by_rank(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    score = frame["score"] if "score" in frame.columns else None
    if score is None or not score.dtype.is_numeric():
        raise DataError(f"{path}: no numeric column 'score'; found {', '.join(frame.columns)}")
    frame = frame.with_columns(pl.col("score").cast(pl.Float64) + 0.0)
    if (broken := ~frame["score"].is_finite().fill_null(False)).any():
        row = broken.arg_max()
        raise DataError(
            f"{path}: row {row} ({describe(frame.row(row, named=True))}): score {score[row]} is not finite"
        )
    if "rank" not in frame.columns:
        return frame.select(*_KEYS, "score")
    if not frame["rank"].dtype.is_integer() or frame["rank"].null_count():
        raise DataError(f"{path}: column 'rank' must hold integers without gaps")
    first_row = pl.int_range(pl.len()).alias("first_row")
    frame = frame.with_columns(first_row).with_columns(pl.col("first_row").min().over("user", "target"))
    return frame.sort("first_row", "rank", maintain_order=True).select(*_KEYS, "score")


def _check_lists(frame: pl.DataFrame, path: Path) -> None:
    if (twice := frame.select(_KEYS).is_duplicated()).any():
        raise DataError(
            f"{path}: {describe(frame.row(twice.arg_max(), named=True))} stands twice in one list"
        )
    rises = frame.select(
        (pl.col("score") > pl.col("score").shift(1).over("user", "target")).fill_null(False)
    )["score"]
    if rises.any():
        named = describe(frame.row(rises.arg_max(), named=True))
        raise DataError(f"{path}: {named} has a higher score than the item before it; rank by falling score")
    lists = frame.group_by("user", "target", maintain_order=True).agg(pl.col("item").sort())
    shared = lists.select("user", same=pl.col("item").first().over("user") == pl.col("item"))
    if not shared["same"].all():
        user = shared.filter(~pl.col("same"))["user"][0]
        raise DataError(
            f"{path}: user {user!r} has different lists for several targets; a user's must be one"
        )


def _row(values: np.ndarray, offsets: np.ndarray, number: int) -> np.ndarray:
    return values[offsets[number] : offsets[number + 1]]
