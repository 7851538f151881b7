"""`recllm build image-feedback`: what validation lists say of each item, and which prompts to rewrite first.

Only validation lists are read ("Repaired": the release collects its feedback from the test run), and of them
only those of the users that are named, so that the other users can choose epochs and cycles.

Of an item, with K the length of the lists:

    targets        validation targets that it is
    hits           of these, those whose list has it
    rank_when_hit  mean rank in these lists, from 1
    top10, top20   share of the hits with a rank up to 10 and up to 20
    mean_rank      mean rank over all its targets, ties as expected values (from the rank records)
    wrong          lists that have it in their top 10 though it is no target of the user
    wrong_rank     mean rank in these lists
    exposures      lists that have it

Its priority is the release's:

    pos      = ln(1 + hits) (rank_when_hit / max rank_when_hit + (1 - top10) / 2 + (1 - top20) / 2), 0 without hits
    neg      = ln(1 + wrong) (danger / 2 + 1 / 2),  danger = (11 - wrong_rank) / 10 in [0, 1]
    priority = ln(1 + exposures) (pos / max pos + neg / max neg)

It ignores the items that are never retrieved, which are the hardest. Ours, as an option: they count as hit once
for each target at the worst rank, pos = 2 ln(1 + targets), with at least as many exposures as targets.
"""  # noqa: E501

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import polars as pl
from tyro.conf import Positional, arg

from recllm.data.dataset import Dataset
from recllm.data.origins import Origin, check_same_origin, made
from recllm.data.splits import Split
from recllm.data.tables import read_table, read_users
from recllm.errors import DataError
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.score_files import check_absent
from recllm.evaluation.top_k_files import TopK
from recllm.files import sha256, write_file

METADATA_KEY = "recllm.feedback"
LEAST_K = 20
"""Items that a list must have, where the catalog has as many: the statistics read the first 20."""
_TOP = 10
_NAMED = 3
_KEYS = ("user", "item")


@dataclass
class ImageFeedbackOptions:
    """Writes per-item feedback from a ranker's validation lists, for `recllm build image-rewrites`."""

    split: Positional[Annotated[Path, arg(metavar="SPLIT")]]
    """DATASET/splits/NAME."""
    lists: Annotated[Path, arg(metavar="FILE")]
    """Top-K lists of the validation part: topk/NAME-valid.parquet, of `recllm score ranker RUN --part valid
    --top-k 40`. Lists of test targets are refused."""
    ranks: Annotated[Path, arg(metavar="FILE")]
    """Rank records of the same run: ranks/NAME-valid.parquet."""
    out: Annotated[Path, arg(metavar="FILE")]
    """The file to write."""
    users: Annotated[Path | None, arg(metavar="FILE")] = None
    """A table with a column `user`: only their lists are read; by default those of all users."""
    never_retrieved: bool = False
    """Items that no list of theirs has get a priority too (ours); the release ignores them."""
    overwrite: bool = False
    """Replace the file where it exists."""


def build_feedback(options: ImageFeedbackOptions) -> Path:
    """Writes the feedback, a row for each item of the dataset, and returns the file.

    Raises:
        DataError: Lists or ranks are missing, of another split, part or system, or shorter than they must be;
            a user is unknown; or the file exists.
    """
    check_absent(options.out, overwrite=options.overwrite)
    split = Split.open(options.split)
    lists, records = TopK.read(options.lists), RankRecords.load(options.ranks)
    lists.lists_for(split, "valid")  # refuses lists of another part, split or dataset
    items = split.dataset.items["item"]
    if lists.k < min(LEAST_K, len(items)):
        raise DataError(
            f"{lists.path}: lists of {lists.k} items; expected {LEAST_K} or more: score with --top-k 40"
        )
    _check_one_run(lists, records, options.ranks)
    targets = pl.DataFrame(
        {
            "user": records.user,
            "target": records.item,
            "expected": np.asarray(records.above) + (np.asarray(records.tied) + 1) / 2,
        }
    )
    frame, users = lists.frame, None
    if options.users is not None:
        users = read_users(options.users)
        if unknown := sorted(set(users) - set(targets["user"])):
            raise DataError(
                f"{options.users}: user {unknown[0]!r} has no validation target in {split.folder}"
            )
        chosen = pl.Series(users).implode()
        frame, targets = (each.filter(pl.col("user").is_in(chosen)) for each in (frame, targets))
    table = statistics(items, frame.select("user", "target", "item"), targets)
    table = table.with_columns(priorities(table, never_retrieved=options.never_retrieved))
    facts = made(
        data_hash=split.dataset.data_hash,
        split_hash=split.split_hash,
        part="valid",
        protocol=lists.protocol,
        system=lists.system,
        lists=lists.k,
        users=targets["user"].n_unique(),
        users_sha256=None if options.users is None else sha256(options.users),
        lists_sha256=sha256(lists.path),
        never_retrieved=options.never_retrieved,
    )
    metadata = {METADATA_KEY: orjson.dumps(facts).decode()}
    write_file(options.out, lambda temporary: table.write_parquet(temporary, metadata=metadata))
    hit, wanted, first = (int((table[name] > 0).sum()) for name in ("hits", "targets", "priority"))
    print(
        f"{options.out}: {facts['users']:,} users' validation lists; of {wanted:,} items that are targets "
        f"{hit:,} were retrieved; {first:,} items have a priority"
    )
    return options.out


@dataclass(frozen=True, eq=False)
class Feedback:
    """A file of feedback.

    Attributes:
        path: The file.
        frame: A row for each item, in the order of the dataset.
        made: How it was made: `lists` is K.
    """

    path: Path
    frame: pl.DataFrame
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, dataset: Dataset) -> Feedback:
        """Reads a file of feedback.

        Raises:
            DataError: It is missing, was not written by `recllm build image-feedback`, or was made from
                another state of the dataset.
        """
        frame, metadata = read_table(path)
        if METADATA_KEY not in metadata:
            raise DataError(f"{path} is no file of feedback; `recllm build image-feedback` writes one")
        facts = orjson.loads(metadata[METADATA_KEY])
        origin = Origin.of_manifest(path, facts)
        check_same_origin(origin, dataset.origin, remedy="make it again", required=("dataset",))
        return cls(path, frame, facts)


def statistics(items: pl.Series, lists: pl.DataFrame, targets: pl.DataFrame) -> pl.DataFrame:
    """Returns the statistics of each item.

    Args:
        items: All item ids, in the order of the result.
        lists: `user, target, item`: each (user, target)'s list, best first. A user's lists are equal.
        targets: `user, target, expected`: all targets, with the rank among all candidates.

    Returns:
        `id`, the columns of this module's docstring (null means over nothing), and `rivals` and `wanted`: the
        items most often ranked above it where it is the target, and the targets of the users to whom it was
        recommended wrongly; three at most, the most frequent first, then by id.
    """
    order = lists.with_columns(
        rank=pl.int_range(1, pl.len() + 1).over("user", "target", mapping_strategy="group_to_rows")
    )
    one_each = order.filter(pl.col("target") == pl.col("target").first().over("user"))
    owned = targets.select("user", item="target")
    rank = pl.col("rank")
    hits = order.filter(pl.col("item") == pl.col("target"))
    wrong = one_each.filter(rank <= _TOP).join(owned, on=_KEYS, how="anti")
    place = hits.select("user", "target", at="rank")
    above = (
        order.join(place, on=["user", "target"], how="left")
        .filter((rank <= _TOP) & (pl.col("at").is_null() | (rank < pl.col("at"))))
        .join(owned, on=_KEYS, how="anti")
    )
    chosen = wrong.select("user", "item").join(targets.select("user", "target"), on="user")
    parts = (
        targets.group_by("target").agg(targets=pl.len(), mean_rank=pl.col("expected").mean()),
        hits.group_by("target").agg(
            hits=pl.len(),
            rank_when_hit=rank.mean(),
            top10=(rank <= _TOP).mean(),
            top20=(rank <= 2 * _TOP).mean(),
        ),
        wrong.group_by(target="item").agg(wrong=pl.len(), wrong_rank=rank.mean()),
        one_each.group_by(target="item").agg(exposures=pl.len()),
        _most_frequent(above, "target", "item", "rivals"),
        _most_frequent(chosen.rename({"target": "other"}), "item", "other", "wanted").rename(
            {"item": "target"}
        ),
    )
    table = pl.DataFrame({"id": items.cast(pl.String)})
    for part in parts:
        table = table.join(part, left_on="id", right_on="target", how="left", maintain_order="left")
    counts = ("targets", "hits", "wrong", "exposures")
    named = pl.col("rivals", "wanted").fill_null(pl.lit([], pl.List(pl.String)))
    return table.with_columns(pl.col(counts).fill_null(0).cast(pl.Int64), named).select(
        "id", "targets", "hits", "rank_when_hit", "top10", "top20", "mean_rank", "wrong", "wrong_rank",
        "exposures", "rivals", "wanted",
    )  # fmt: skip


def priorities(table: pl.DataFrame, *, never_retrieved: bool = False) -> list[pl.Series]:
    """Returns `pos`, `neg`, `priority` and `kind` of each item, see this module's docstring.

    Args:
        table: What `statistics` returned.
        never_retrieved: Items with targets and without hits have a `pos`, too (ours).

    Returns:
        `kind` is `pos` where pos >= neg, else `neg`.
    """

    def column(name: str) -> np.ndarray:
        return table[name].fill_null(0).to_numpy().astype(np.float64)

    hits, rank, exposures = column("hits"), column("rank_when_hit"), column("exposures")
    worst = rank.max(initial=0.0) or 1.0
    pos = np.log1p(hits) * (rank / worst + (1 - column("top10")) / 2 + (1 - column("top20")) / 2)
    pos[hits == 0] = 0
    if never_retrieved:
        missed = (hits == 0) & (column("targets") > 0)
        pos = np.where(missed, 2 * np.log1p(column("targets")), pos)
        exposures = np.where(missed, np.maximum(exposures, column("targets")), exposures)
    danger = np.clip((11 - column("wrong_rank")) / 10, 0, 1)
    neg = np.where(column("wrong") > 0, np.log1p(column("wrong")) * (danger / 2 + 0.5), 0.0)
    priority = np.log1p(exposures) * (pos / (pos.max(initial=0.0) or 1) + neg / (neg.max(initial=0.0) or 1))
    kind = np.where(pos >= neg, "pos", "neg")
    values = {"pos": pos, "neg": neg, "priority": priority, "kind": kind}
    return [pl.Series(name, value) for name, value in values.items()]


def divide_users(users: pl.Series, seed: int) -> tuple[pl.Series, pl.Series]:
    """Divides users into two halves by a seeded hash of their ids, whatever their order.

    Args:
        users: Ids, each once; two or more.
        seed: Another seed divides them otherwise.

    Returns:
        The users whose lists feed the critic, and those whose lists choose epochs and cycles; the second half
        has one more where the number is odd.

    Raises:
        DataError: There are fewer than two.
    """
    if len(users) < 2:
        raise DataError(f"{len(users)} users with validation targets; expected 2 or more, to divide them")

    def place(user: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{user}".encode(), digest_size=16).digest()

    ordered = sorted(users.cast(pl.String), key=place)
    half = len(ordered) // 2
    return tuple(pl.Series("user", sorted(each)) for each in (ordered[:half], ordered[half:]))  # type: ignore[return-value]


def _most_frequent(pairs: pl.DataFrame, of: str, what: str, name: str) -> pl.DataFrame:
    counted = pairs.group_by(of, what).len().sort(of, "len", what, descending=[False, True, False])
    return counted.group_by(of, maintain_order=True).agg(pl.col(what).head(_NAMED).alias(name))


def _check_one_run(lists: TopK, records: RankRecords, path: Path) -> None:
    """Raises a `DataError` unless rank records and lists are of one system under one protocol."""
    for name in ("protocol", "system", "candidates"):
        ours, theirs = getattr(lists, name), getattr(records, name)
        if ours != theirs:
            raise DataError(
                f"{lists.path} has the {name} {ours!r} and {path} has {theirs!r}; give both files of one "
                "`recllm score ranker RUN --part valid --top-k 40`"
            )
