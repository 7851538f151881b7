"""Rank records: for one positive, how many candidates scored higher, how many as high, and how many there
were.

Every metric, test and table of recllm is computed from these three integers, so that no system can be
measured differently from another, and ties are never broken by where a row happens to be stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recllm.data.candidate_files import check_candidates
from recllm.data.origins import Origin, check_same_origin, made_metadata, read_made
from recllm.data.tables import describe, read_table, text_ids
from recllm.errors import DataError
from recllm.evaluation.frames import COLUMNS, check_ranks, check_scores
from recllm.files import write_file


@dataclass(frozen=True, eq=False)
class RankRecords:
    """The ranks of R positives under one protocol; row i of every column is one positive.

    With `lists="user"` the rows of one user are one list with several positives, and `above`, `tied` and `n`
    count the other positives too. With `lists="target"` every row is a list of its own with one positive.
    """

    user: pl.Series
    """[R] string or integer."""
    item: pl.Series
    """[R] string or integer: the positive."""
    above: np.ndarray
    """[R] integer: candidates of its list that scored strictly higher."""
    tied: np.ndarray
    """[R] integer: candidates with an equal score, the positive included."""
    n: np.ndarray
    """[R] integer: candidates in its list, the positive included."""
    lists: Literal["user", "target"]
    protocol: str = "unspecified"
    system: str = "unnamed"
    candidates: str = ""
    """A fingerprint of the candidate lists, which tells two apart whose protocols have one name; empty where
    it is not known."""
    ignored: int = 0
    """Score rows that belonged to no candidate; known where the records are made, not stored in the file."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """What the records, or the scores behind them, were made from and how: `recllm.data.origins.made`."""

    def __len__(self) -> int:
        return len(self.above)

    @property
    def all_tied(self) -> bool:
        """Whether each list of two or more candidates has one score for all of them; False if none is so
        long."""
        several = np.asarray(self.n) > 1
        return bool(several.any() and (np.asarray(self.tied) == self.n)[several].all())

    def save(self, path: Path) -> None:
        """Writes the records as parquet, ids as text, atomically.

        Raises:
            DataError: All scores tie (see `refuse_all_tied`).
        """
        refuse_all_tied(self, f"{path} was not written")
        frame = pl.DataFrame(
            {
                "user": self.user.cast(pl.String),
                "item": self.item.cast(pl.String),
                "above": np.asarray(self.above, np.int64),
                "tied": np.asarray(self.tied, np.int64),
                "n": np.asarray(self.n, np.int64),
            }
        )
        metadata = {
            f"recllm.{key}": getattr(self, key) for key in ("protocol", "system", "lists", "candidates")
        }
        metadata |= made_metadata(self.made)
        write_file(path, lambda temporary: frame.write_parquet(temporary, metadata=metadata))

    @property
    def origin(self) -> Origin:
        """The hashes of dataset and split, as far as they are known."""
        return Origin.of_manifest(self.system, self.made)

    @classmethod
    def load(cls, path: Path) -> RankRecords:
        """Reads and checks a file of rank records.

        Raises:
            DataError: A column or metadata key is missing or of the wrong type, or a row cannot be a rank;
                the message names the file and the row.
        """
        frame, metadata = read_table(path)
        if missing := [name for name in COLUMNS if name not in frame.columns]:
            raise DataError(f"{path}: no column {missing[0]!r}; rank records have {', '.join(COLUMNS)}")
        if missing := [key for key in ("protocol", "system", "lists") if f"recllm.{key}" not in metadata]:
            raise DataError(
                f"{path}: no parquet metadata `recllm.{missing[0]}`; write it by RankRecords.save"
            )
        if (lists := metadata["recllm.lists"]) not in ("user", "target"):
            raise DataError(f"{path}: `recllm.lists` is {lists!r}; expected 'user' or 'target'")
        frame = text_ids(frame, ("user", "item"), str(path))
        for name in COLUMNS[2:]:
            if not frame[name].dtype.is_integer() or frame[name].null_count():
                raise DataError(f"{path}: column {name!r} must hold integers without gaps")
        check_ranks(frame, lists, str(path))
        above, tied, n = (frame[name].cast(pl.Int64).to_numpy() for name in COLUMNS[2:])
        names = metadata["recllm.protocol"], metadata["recllm.system"], metadata.get("recllm.candidates", "")
        made = read_made(metadata, path)
        return cls(frame["user"], frame["item"], above, tied, n, lists, *names, made=made)


def refuse_all_tied(records: RankRecords, where: str) -> None:
    """Raises a `DataError` if no list of two or more candidates has two different scores.

    Such a result is that of chance, with an AUC of exactly 0.5: something did not work. Lists of one
    candidate say nothing and are passed over.
    """
    if records.all_tied:
        raise DataError(
            f"{where}: {records.system!r} scores all candidates alike in each of {len(records):,} lists, so "
            "it ranks nothing; it may know none of these users or items, or its training may have collapsed"
        )


def refuse_equal_scores(candidates: pl.DataFrame, scores: pl.DataFrame, system: str, path: Path) -> None:
    """Raises a `DataError` before scores that all tie are written to `path` (see `refuse_all_tied`)."""
    refuse_all_tied(rank_candidates(candidates, scores, system=system), f"{path} was not written")


def rank_candidates(
    candidates: pl.DataFrame,
    scores: pl.DataFrame,
    *,
    protocol: str = "unspecified",
    system: str = "unnamed",
    fingerprint: str = "",
    made: Mapping[str, Any] | None = None,
) -> RankRecords:
    """Ranks every positive among the candidates of its list.

    Ids are compared as text, so integer ids of one table match text ids of the other. Scores are compared as
    float64, so integers beyond 2^53 tie where they round to one number.

    Args:
        candidates: `user`, `item`, `label` (1 or 0) and perhaps `target`. With `target` one list is one
            (user, target), whose only positive is the target; without it one list is one user.
        scores: `user`, `item`, `score` and perhaps `target`, which is then matched as well. Rows that are no
            candidate are left out and counted in `ignored`.
        fingerprint: What the records keep as `candidates`; `Candidates.read` computes it.
        made: How the scores were made, which the records keep.

    Returns:
        One record per positive, in the order of `candidates`.

    Raises:
        DataError: A candidate has no score, two scores, or one that is NaN or infinite; a candidate stands
            twice in its list; a list has no positive. The message names the user.
    """
    candidates = check_candidates(candidates)
    has_target = "target" in candidates.columns
    keys = ["user", "target", "item"] if has_target and "target" in scores.columns else ["user", "item"]
    scores = check_scores(scores, keys)
    joined = candidates.join(scores, on=keys, how="left", maintain_order="left")
    if joined.height != candidates.height:
        matched = scores.join(candidates, on=keys, how="semi")
        pair = matched.filter(matched.select(keys).is_duplicated()).row(0, named=True)
        raise DataError(f"scores: {describe(pair)} has more than one score; keep one row for each")
    missing = joined.filter(pl.col("score").is_null())
    if missing.height:
        raise DataError(
            f"scores: {missing.height} of {joined.height} candidates have no score, the first is "
            f"{describe(missing.row(0, named=True))}; score every row of the candidate file"
        )
    broken = joined.filter(~pl.col("score").is_finite())
    if broken.height:
        row = broken.row(0, named=True)
        raise DataError(
            f"scores: {broken.height} are NaN or infinite, the first is {row['score']} for {describe(row)}"
        )
    one_list = ["user", "target"] if has_target else ["user"]
    ranked = joined.select(
        "user",
        "item",
        "label",
        above=pl.col("score").rank("min", descending=True).over(one_list).cast(pl.Int64) - 1,
        tied=pl.len().over(*one_list, "score").cast(pl.Int64),
        n=pl.len().over(one_list).cast(pl.Int64),
    ).filter(pl.col("label") == 1)
    return RankRecords(
        *(ranked["user"], ranked["item"]),
        *(ranked[name].to_numpy() for name in ("above", "tied", "n")),
        lists="target" if has_target else "user",
        protocol=protocol,
        system=system,
        candidates=fingerprint,
        ignored=scores.join(candidates, on=keys, how="anti").height,
        made=made or {},
    )


def rank_score_matrix(
    scores: np.ndarray,
    positives: np.ndarray,
    *,
    users: Sequence | pl.Series | None = None,
    items: Any = None,
    protocol: str = "unspecified",
    system: str = "unnamed",
) -> RankRecords:
    """Ranks the positives of Q dense lists of C candidates.

    Args:
        scores: [Q, C] numbers; row q holds the scores of list q. Integers of 64 bits and extended precision
            are compared as float64.
        positives: [Q, C] of 0 and 1 (or bool), or [Q] the index of the one positive of each list.
        users: [Q] the user of each list; 0 to Q - 1 when None. A user may have several lists where every list
            has one positive.
        items: [Q, C] the id of each candidate; its column when None.

    Raises:
        DataError: A list without a positive, a score that is NaN or infinite, ids that are neither text nor
            integers, or shapes that do not fit.
    """
    scores, positives = as_scores(scores), np.asarray(positives)
    if scores.ndim != 2 or positives.shape not in (scores.shape, scores.shape[:1]):
        raise DataError(
            f"scores {scores.shape} and positives {positives.shape}: expected [Q, C] and [Q, C] or [Q]"
        )
    queries, width = scores.shape
    users = pl.Series("user", np.arange(queries) if users is None else users)
    if len(users) != queries:
        raise DataError(f"users: {len(users)} ids for {queries} lists")
    check_ids(users, "users")
    if items is not None and (items := _as_array(items, "items")).shape != scores.shape:
        raise DataError(f"items {items.shape} and scores {scores.shape}: expected one id each [Q, C]")
    check_finite(scores, users)
    if positives.ndim == 1:
        if not np.issubdtype(positives.dtype, np.integer) or ((positives < 0) | (positives >= width)).any():
            raise DataError(f"positives: expected indices from 0 to {width - 1}")
        rows, columns = np.arange(queries), positives
    else:
        cells = np.flatnonzero(positives != 0)
        if not (positives.reshape(-1)[cells] == 1).all():
            raise DataError("positives: labels must be 0 or 1")
        rows, columns = np.divmod(cells, width)
        if (bare := np.bincount(rows, minlength=queries) == 0).any():
            raise DataError(f"user {users[int(bare.argmax())]!r}: a list without a positive cannot be ranked")
    lists = "user"
    if users.n_unique() < queries:
        if len(rows) > queries:
            raise DataError("users: an id repeats; lists with several positives need one id each")
        lists = "target"
    above, tied = np.empty((2, len(rows)), np.int64)
    step = max(1, 2**20 // max(width, 1))  # the comparisons of one step stay in the cache
    every_row_once = len(rows) == queries
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        block = scores[part] if every_row_once else scores[rows[part]]
        positive = scores[rows[part], columns[part]][:, None]
        above[part] = count_true(block > positive)
        tied[part] = count_true(block == positive)
    names = pl.Series("item", columns if items is None else items[rows, columns])
    check_ids(names, "items")
    n = np.full(len(rows), width)
    return RankRecords(users[rows].rename("user"), names, above, tied, n, lists, protocol, system)


def check_one_setting(named: Sequence[tuple[str, RankRecords]]) -> None:
    """Raises a `DataError` unless all were measured under one protocol and, as far as known, on one set of
    candidates.

    Args:
        named: Each with the name (a system's or a file's) by which the message is to call it.
    """
    name, first = named[0]
    for other_name, other in named[1:]:
        if (other.protocol, other.lists) != (first.protocol, first.lists):
            pools = [("/covered-" in (each.protocol or "")) for each in (first, other)]
            raise DataError(
                f"{name} was measured under {first.protocol!r} ({first.lists} lists) and {other_name} under "
                f"{other.protocol!r} ({other.lists} lists); systems can be compared under one protocol only"
                + ("; score both with the same --pool" if any(pools) else "")
            )
    origins = [replace(records.origin, what=name) for name, records in named]
    for one, other in itertools.combinations(origins, 2):
        check_same_origin(other, one, remedy="systems can be compared on one split only")
    known = [(name, records.candidates) for name, records in named if records.candidates]
    for other_name, candidates in known[1:]:
        if candidates != known[0][1]:
            raise DataError(
                f"{known[0][0]} and {other_name} were both measured under {first.protocol!r}, but their "
                f"candidates differ (fingerprints {known[0][1]} and {candidates}), as those of another "
                "catalog or split do; rank both on the same candidates"
            )


def as_scores(scores: Any) -> np.ndarray:
    """Scores as numpy compares them: 64-bit integers and extended precision as float64, the rest as it is.

    Raises:
        DataError: They are not real numbers.
    """
    scores = _as_array(scores, "scores")
    if scores.dtype.kind not in "fiub":
        raise DataError(f"scores are {scores.dtype}; expected real numbers")
    exact = scores.dtype.itemsize < 8 or scores.dtype == np.float64
    return scores if exact else scores.astype(np.float64)


def check_ids(ids: pl.Series, what: str) -> None:
    """Raises a `DataError` unless all ids are text or integers, and none is missing."""
    if len(ids) and ids.null_count():
        raise DataError(f"{what}: the id of number {ids.is_null().arg_max()} is missing")
    if len(ids) and not (ids.dtype.is_integer() or ids.dtype in (pl.String, pl.Categorical, pl.Enum)):
        raise DataError(f"{what}: ids are {ids.dtype}; expected one text or integer each")


def count_true(mask: Any) -> Any:
    """Counts the true entries of each row of a [B, C] numpy or torch mask."""
    if isinstance(mask, np.ndarray):
        return np.bitwise_count(np.packbits(mask, axis=1)).sum(1, dtype=np.uint32)  # 5 times mask.sum(1)
    return mask.sum(1)


def _as_array(values: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"{what}: no array can be made of them ({error})") from None


def check_finite(scores: Any, users: pl.Series) -> None:
    """Raises a `DataError` naming the first of `users` with a NaN or infinite entry in `scores` [B, C]."""
    if isinstance(scores, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(scores.sum()):  # one pass; NaN and infinities survive a sum
                return
        bad = ~np.isfinite(scores).all(1)
    else:
        bad = ~scores.isfinite().all(1).cpu().numpy()
    if bad.any():
        raise DataError(f"user {users[int(bad.argmax())]!r}: a score is NaN or infinite")
