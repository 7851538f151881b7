"""Two-stage ranking of the whole catalog: a first stage's top K in the order of a second stage's scores.

The combined ranking of a user puts the K items of the list first, by the second stage, and all other
candidates after them, by the first stage. Its rank records follow exactly from the K new scores and the first
stage's records, of which each says how many candidates scored above the positive and how many tied with it:

* A positive in the list has above it those of the list with a higher new score, and ties with those that
  have an equal one.
* A positive outside has all K above it. Each of the K scored at least as high in the first stage. If `above`
  is K or more, they are counted there already (an item of the list that tied with the positive would leave
  room above it for at most the other K - 1), and the record stands. Else all of `above` are in the list, and
  the other K - above tied with the positive: they stand above it now. So, in both cases,

      above' = max(above, K)        tied' = tied - max(0, K - above)

`n` is unchanged, and so are protocol and candidates: the records stand in one table with any other system's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from recllm.data.origins import Origin, check_same_origin
from recllm.data.tables import describe
from recllm.errors import DataError
from recllm.evaluation.frames import check_scores
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.top_k_files import TopK


def rerank(
    first: RankRecords,
    top: TopK,
    scores: pl.DataFrame,
    *,
    system: str,
    where: str = "scores",
    made: Mapping[str, Any] | None = None,
) -> RankRecords:
    """Returns the rank records of the combined ranking.

    Args:
        first: The first stage's records, under a full protocol.
        top: Its top-K lists, of the same run.
        scores: The second stage's: `user`, `item`, `score`, and perhaps `target`. A user's items have one
            place each in one list, so an item that was scored for several targets of a user gets the mean of
            its scores, which differ by rounding at most. Rows that are in no list are counted in `ignored`.
        system: The name of the combined system.
        where: What errors call the scores.
        made: How the combination was made, which the records keep.

    Returns:
        One record for each of `first`, in its order.

    Raises:
        DataError: The records and the lists are not of one system, protocol and state, or contradict each
            other; an item of a list has no score, or one that is not finite, or two.
    """
    _check_one_stage(first, top)
    lists = top.frame.select("user", "item").unique(maintain_order=True)
    scored, ignored = _scored(lists, scores, where)
    ranked = scored.select(
        "user",
        "item",
        new_above=pl.col("score").rank("min", descending=True).over("user").cast(pl.Int64) - 1,
        new_tied=pl.len().over("user", "score").cast(pl.Int64),
    )
    sizes = lists.group_by("user").agg(k=pl.len().cast(pl.Int64))
    records = pl.DataFrame(
        {
            "user": first.user.cast(pl.String),
            "item": first.item.cast(pl.String),
            **{name: pl.Series(getattr(first, name), dtype=pl.Int64) for name in ("above", "tied", "n")},
        }
    )
    _check_one_set_of_targets(records, top)
    records = records.join(sizes, on="user", how="left", maintain_order="left").join(
        ranked, on=["user", "item"], how="left", maintain_order="left"
    )
    records = records.with_columns(listed=pl.col("new_above").is_not_null())
    passed = pl.max_horizontal(pl.col("k") - pl.col("above"), 0)
    records = records.with_columns(
        new_above=pl.when("listed").then("new_above").otherwise(pl.max_horizontal("above", "k")),
        new_tied=pl.when("listed").then("new_tied").otherwise(pl.col("tied") - passed),
    )
    listed_too_low = pl.col("listed") & (pl.col("above") >= pl.col("k"))
    contradictory = listed_too_low | (pl.col("new_tied") < 1) | (pl.col("k") > pl.col("n"))
    if (wrong := records.filter(contradictory)).height:
        row = wrong.row(0, named=True)
        raise DataError(
            f"{top.path} contradicts the first stage's rank records, first at {describe(row)} (above "
            f"{row['above']}, tied {row['tied']}, n {row['n']}, list of {row['k']}): a list must hold the "
            "best of all candidates; make both in one run of `recllm score ... --top-k`"
        )
    return RankRecords(
        first.user,
        first.item,
        records["new_above"].to_numpy(),
        records["new_tied"].to_numpy(),
        records["n"].to_numpy(),
        first.lists,
        first.protocol,
        system,
        first.candidates or top.candidates,
        ignored,
        made or {},
    )


def share_listed(first: RankRecords, top: TopK) -> float:
    """Returns the share of the positives that are in their list: no second stage can move the others."""
    positives = pl.DataFrame({"user": first.user.cast(pl.String), "item": first.item.cast(pl.String)})
    lists = top.frame.select("user", "item").unique()
    return positives.join(lists, on=["user", "item"], how="semi").height / max(len(positives), 1)


def _check_one_stage(first: RankRecords, top: TopK) -> None:
    if first.protocol != top.protocol:
        raise DataError(
            f"{top.path} is of the protocol {top.protocol!r}, but the first stage's rank records are of "
            f"{first.protocol!r}; make both in one run of `recllm score ... --top-k`"
        )
    if first.system != top.system:
        raise DataError(
            f"{top.path} holds the lists of {top.system!r}, but the first stage's rank records are those of "
            f"{first.system!r}; give the two files of one system"
        )
    check_same_origin(
        Origin.of_manifest("the first stage's rank records", first.made, candidates=first.candidates),
        top.origin,
        remedy="make both in one run of `recllm score ... --top-k`",
    )
    if first.lists == "target" and first.user.n_unique() < len(first):
        raise DataError(
            "the first stage's rank records have several lists for one user (`recllm.lists` is 'target'); "
            "two-stage ranking needs one list for each user, as `recllm score` writes for the whole catalog"
        )


def _check_one_set_of_targets(records: pl.DataFrame, top: TopK) -> None:
    targets = top.frame.select("user", item="target").unique(maintain_order=True)
    for one, other, what in (
        (records, targets, "no list for"),
        (targets, records, "a list that is not among the first stage's rank records:"),
    ):
        lone = one.join(other, on=["user", "item"], how="anti")
        if lone.height:
            user, item = lone.select("user", "item").row(0)
            raise DataError(
                f"{top.path} has {what} user {user!r}, target {item!r} ({lone.height:,} such targets); make "
                "both in one run of `recllm score ... --top-k`"
            )


def _scored(lists: pl.DataFrame, scores: pl.DataFrame, where: str) -> tuple[pl.DataFrame, int]:
    """The lists with one score for each item, and how many score rows belong to none."""
    keys = ["user", "target", "item"] if "target" in scores.columns else ["user", "item"]
    scores = check_scores(scores, keys, where)
    in_lists = scores.join(lists, on=["user", "item"], how="semi", maintain_order="left")
    if (twice := in_lists.select(keys).is_duplicated()).any():
        named = describe(in_lists.row(twice.arg_max(), named=True))
        raise DataError(f"{where}: {named} has more than one score; keep one row for each")
    if (broken := ~in_lists["score"].is_finite().fill_null(False)).any():
        row = in_lists.row(broken.arg_max(), named=True)
        raise DataError(f"{where}: the score of {describe(row)} is {row['score']}; expected finite numbers")
    means = in_lists.group_by("user", "item").agg(pl.col("score").mean())
    scored = lists.join(means, on=["user", "item"], how="left", maintain_order="left")
    if (missing := scored.filter(pl.col("score").is_null())).height:
        raise DataError(
            f"{where}: {missing.height:,} of {scored.height:,} listed items have no score, the first is "
            f"{describe(missing.row(0, named=True))}; score every row that `recllm build instructions "
            "--top-k` writes (without --limit; users without history have none, and `recllm data split "
            "--drop-cold` leaves them out)"
        )
    return scored, scores.height - in_lists.height
