"""Systems that lack content for some items: how much they cover, and how the rest is ranked.

A system that scores items by their texts or images can say nothing of an item without any. If such items are
ranked last, or all at one place, the covered ones compete with fewer items than the list has; and since items
with content are often the popular ones, a system gains by covering less. There are two fair ways:

* Pool `all` (the default): an item without content scores as one of the list's candidates with content, each
  of which stands for equally many (one more or less), assigned at random with a fixed seed. So a covered item
  keeps its rank among the covered ones, stretched to the length of the list, and an item without content may
  be anywhere. With meaningless scores every metric is that of a random order, whatever is covered. (A tie at
  the mean or the median does not achieve this: the first places still belong to the few covered items.)
* Pool `covered`: candidates and targets are the covered items alone. This is a protocol of its own, named by
  the set of these items, so that two sets never share a table. A system that needs no content (popularity,
  rankers of item numbers) is ranked in the same pool when it is told which content makes it.

A third pool, `cold`, holds the items without a training interaction: only content can rank these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from recllm.data.candidate_files import Candidates, fingerprint
from recllm.errors import DataError
from recllm.evaluation.full_ranking import Scores, score_blocks

if TYPE_CHECKING:
    from recllm.data.candidates import FullRanking
    from recllm.data.splits import Split

Pool = Literal["all", "covered", "cold"]


def cold_items(split: Split) -> np.ndarray:
    """Returns which items have no training interaction; bool, shape [items]."""
    dataset = split.dataset
    return np.bincount(dataset.item_codes[split.rows("train")], minlength=len(dataset.items)) == 0


@dataclass(frozen=True)
class Coverage:
    """How much of what it ranks a system has content for.

    Attributes:
        pool: `all`, `covered` or `cold`.
        items: Items with content: of the catalog, for the pools `covered` and `cold` of the pool.
        of_items: Items of the catalog, for the pool `cold` of the pool.
        targets: Targets with content, of the part that was ranked; they are counted as items are.
        of_targets: Targets of that part, for the pool `cold` those in the pool.
        fingerprint: Of the set of items with content that are in the pool; 16 hex digits.
        pool_fingerprint: Of the items of the pool; empty where these are the items with content, or the
            catalog.
    """

    pool: Pool
    items: int
    of_items: int
    targets: int
    of_targets: int
    fingerprint: str
    pool_fingerprint: str = ""

    @classmethod
    def of(
        cls,
        present: np.ndarray,
        item_ids: pl.Series,
        targets: np.ndarray,
        pool: Pool,
        members: np.ndarray | None = None,
    ) -> Coverage:
        """Counts coverage.

        Args:
            present: Which items have content; bool, shape [items].
            item_ids: The ids of the catalog.
            targets: Item codes of all targets; shape [targets].
            pool: The pool that is ranked.
            members: Which items are in the pool; bool, shape [items]. None: those with content for
                `covered`, the catalog for `all`.

        Raises:
            DataError: No target is in the pool, or the pool is `covered` and an item of it has no content.
        """
        if members is None:
            members = present if pool == "covered" else np.ones(len(present), dtype=bool)
        if pool != "all" and not members[targets].any():
            what = "has content" if pool == "covered" else "lacks a training interaction"
            raise DataError(f"--pool {pool}: no target {what}, so there is nothing to rank")
        if pool == "covered" and (lacking := np.flatnonzero(members & ~present)).size:
            raise DataError(
                f"--covered-by: the system has no content for {len(lacking):,} of the {members.sum():,} "
                f"items of the pool (the first is {item_ids[int(lacking[0])]!r}); name also the texts or "
                "vectors that the system reads, so that the pool holds items with both"
            )
        inside = present & members
        whole = members if pool == "cold" else np.ones(len(present), dtype=bool)
        return cls(
            pool,
            int(inside.sum()),
            int(whole.sum()),
            int(inside[targets].sum()),
            int(whole[targets].sum()),
            _fingerprint_of(item_ids, inside),
            _fingerprint_of(item_ids, members) if pool == "cold" else "",
        )

    @classmethod
    def of_made(cls, made: Mapping[str, Any]) -> Coverage | None:
        """Returns what a file states; None where it states none, as systems do that score every item.

        Raises:
            DataError: It is not what `as_json` writes.
        """
        if "coverage" not in made:
            return None
        try:
            return cls(**made["coverage"])
        except TypeError as error:
            raise DataError(
                f"the coverage in a file's metadata is damaged ({error}); write it again"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """Returns it as files keep it."""
        return asdict(self)

    @property
    def complete(self) -> bool:
        """Whether every item has content."""
        return self.items == self.of_items

    def protocol(self, whole: str) -> str:
        """Returns the protocol of the pool, for example `loo/full/mask-seen/covered-1a2b3c4d`."""
        valid = "/valid" if whole.endswith("/valid") else ""
        return f"{whole.removesuffix('/valid')}/{self.pool}-{self._of_pool[:8]}{valid}"

    @property
    def _of_pool(self) -> str:
        return self.pool_fingerprint or self.fingerprint

    def ranking(self, ranking: FullRanking, members: np.ndarray) -> FullRanking:
        """Returns the lists of a pool: items are coded by their place among its members."""
        code = np.cumsum(members) - 1

        def kept(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            inside = np.concatenate(([0], np.cumsum(members[values])))
            return code[values[members[values]]], np.diff(inside[offsets])

        positives, counts = kept(ranking.positives, ranking.positive_offsets)
        masked, hidden = kept(ranking.masked, ranking.masked_offsets)
        lists = counts > 0
        masked = masked[np.repeat(lists, hidden)]
        return replace(
            ranking,
            users=ranking.users[lists],
            user_ids=ranking.user_ids.filter(pl.Series(lists)),
            positives=positives,
            positive_offsets=np.concatenate(([0], np.cumsum(counts[lists]))),
            masked=masked,
            masked_offsets=np.concatenate(([0], np.cumsum(hidden[lists]))),
            item_ids=ranking.item_ids.filter(pl.Series(members)),
            protocol=self.protocol(ranking.protocol),
            candidates=hashlib.sha256(f"{ranking.candidates} {self._of_pool}".encode()).hexdigest()[:16],
        )

    def candidates(self, candidates: Candidates, members: pl.Series) -> Candidates:
        """Returns the lists of a pool: the rows of its items, in lists whose target is one of them.

        Args:
            candidates: The whole lists.
            members: The ids of the items in the pool.
        """
        frame = candidates.frame.filter(pl.col("item").is_in(members.implode()))
        one_list = [name for name in ("user", "target") if name in frame.columns]
        frame = frame.filter((pl.col("label") == 1).any().over(one_list))
        return replace(
            candidates,
            frame=frame,
            protocol=self.protocol(candidates.protocol),
            fingerprint=fingerprint(frame),
        )


def _fingerprint_of(item_ids: pl.Series, chosen: np.ndarray) -> str:
    names = "\0".join(item_ids.filter(pl.Series(chosen)).sort())
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def pool_columns(scores: Scores, members: np.ndarray) -> Scores:
    """Returns the scores of the items in a pool: as many users, fewer items."""
    if isinstance(scores, tuple):
        return scores[0], scores[1][np.flatnonzero(members)]
    if callable(scores):
        return lambda part: scores(part)[:, np.flatnonzero(members)]
    return scores[:, np.flatnonzero(members)]


def fill_catalog(scores: Scores, present: np.ndarray, ranking: FullRanking) -> Callable[[slice], np.ndarray]:
    """Returns scores of the whole catalog, in which items without content score as covered candidates.

    Args:
        scores: As `recllm.evaluation.rank_catalog` takes them; those of items without content do not count.
        present: Which items have content; bool, shape [items].
        ranking: The lists. What a list masks is no candidate, and nothing scores like it.
    """
    blocks = score_blocks(scores, ranking.user_ids, len(present))
    uncovered = np.flatnonzero(~present)
    random = np.random.default_rng(0)
    order = random.permutation(len(uncovered))
    shifts = random.integers(len(present), size=len(ranking.users))

    def block(part: slice) -> np.ndarray:
        scored = blocks(part)
        scored = np.array(scored if isinstance(scored, np.ndarray) else scored.cpu().numpy())
        for row, place in enumerate(range(part.start, part.start + len(scored))):
            kept = present.copy()
            kept[ranking.masked[ranking.masked_offsets[place] : ranking.masked_offsets[place + 1]]] = False
            like = np.flatnonzero(kept)
            if len(like):
                scored[row, uncovered] = scored[row, like[(order + shifts[place]) % len(like)]]
            else:
                scored[row] = 0
        return scored

    return block


def fill_lists(scores: pl.DataFrame, covered: pl.Series) -> pl.DataFrame:
    """Returns scores in which rows without content score as rows of their list that have content.

    Args:
        scores: `user`, perhaps `target`, `item`, `score`; scores of rows without content do not count. All
            rows of a list without any are equal.
        covered: Which rows have content; bool, shape [rows].
    """
    one_list = [name for name in ("user", "target") if name in scores.columns]
    lists = scores.select(pl.struct(one_list).rank("dense"))[:, 0].to_numpy().astype(np.int64) - 1
    present, score = covered.to_numpy(), scores["score"].to_numpy().copy()
    order = np.random.default_rng(0).permutation(len(lists))
    order = order[np.argsort(lists[order], kind="stable")]  # by list, at random within each
    like, filled = order[present[order]], order[~present[order]]
    counts = np.bincount(lists[like], minlength=lists.max(initial=-1) + 1)
    first = np.concatenate(([0], np.cumsum(counts)))
    of = lists[filled]
    nth = np.arange(len(of)) - np.searchsorted(of, of)
    some = counts[of] > 0
    score[filled[~some]] = 0
    chosen = first[of[some]] + nth[some] % counts[of[some]]
    score[filled[some]] = score[like[chosen]]
    return scores.with_columns(score=pl.Series(score))
