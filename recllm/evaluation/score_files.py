"""The files that the `recllm score ...` commands write, and the metadata in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from recllm.data.candidate_files import Candidates
from recllm.data.candidates import FullRanking, Mask
from recllm.data.coding import codes_of
from recllm.data.origins import made, made_metadata
from recllm.data.splits import HeldOut, Split
from recllm.errors import DataError
from recllm.evaluation.coverage import Coverage, Pool, cold_items, fill_catalog, fill_lists, pool_columns
from recllm.evaluation.full_ranking import Scores, rank_catalog
from recllm.evaluation.ranks import refuse_equal_scores
from recllm.evaluation.top_k_files import write_stage
from recllm.files import write_file


class ScoreOptions(Protocol):
    """The options that the score commands share."""

    candidates: str
    part: HeldOut
    mask: Mask
    top_k: int
    out: Path
    overwrite: bool


class ScoreFiles:
    """The files of one score command: scores of candidate lists, or ranks (and top-K lists) of the catalog.

    Args:
        options: The command's options.
        system: The system's name, and the stem of the files.

    Attributes:
        path: The file of scores or rank records.
        lists: The file of top-K lists.
        full: Whether the whole catalog is ranked.

    Raises:
        DataError: The options contradict each other, the name is no plain word, or a file exists.
    """

    def __init__(self, options: ScoreOptions, system: str) -> None:
        self.full = options.candidates == "full"
        if options.top_k < 0:
            raise DataError(f"--top-k {options.top_k}: expected 0 (none) or more")
        if options.top_k and not self.full:
            raise DataError("--top-k lists the best of the whole catalog; leave out --candidates")
        check_word("--name", system)
        self._system, self._options = system, options
        name = f"{system}.parquet" if options.part == "test" else f"{system}-{options.part}.parquet"
        self.path = options.out / ("ranks" if self.full else "scores") / name
        self.lists = options.out / "topk" / name
        written = (self.path, self.lists) if options.top_k else (self.path,)
        check_absent(*written, overwrite=options.overwrite)

    def write_scores(
        self,
        candidates: Candidates,
        score: Callable[[pl.DataFrame], pl.DataFrame],
        split: Split,
        *,
        present: np.ndarray | None = None,
        pool: Pool = "all",
        members: np.ndarray | None = None,
        **facts: Any,
    ) -> Path:
        """Writes the scores of a candidate file's rows, and prints what comes next.

        Args:
            candidates: The candidates.
            score: Scores rows of candidates: returns `user, target, item, score`.
            split: The split that the scores are of.
            present: Which items the system has content for; bool, shape [items]. None: it needs none.
            pool: What is ranked; see `recllm.evaluation.coverage`.
            members: Which items make the pool `covered`; bool, shape [items]. None: those in `present`.
            **facts: What the file is to say of itself besides the split, the command and versions.

        Raises:
            DataError: No target is in the pool, or it is not said which items are.
        """
        given, ids = candidates.fingerprint, split.dataset.items["item"]
        targets = codes_of(candidates.frame.filter(pl.col("label") == 1)["item"], ids, "item")
        pooled = self._pooled(split, ids, targets, present, pool, members)
        if pooled is not None:
            facts["coverage"] = pooled.coverage.as_json()
        if pooled is not None and pool != "all":
            candidates = pooled.coverage.candidates(candidates, ids.filter(pl.Series(pooled.members)))
        scores = score(candidates.frame)
        if pooled is not None and not pooled.content.all():
            scores = fill_lists(scores, scores["item"].is_in(ids.filter(pl.Series(pooled.content)).implode()))
        refuse_equal_scores(candidates.frame, scores, self._system, self.path)
        metadata = {
            "recllm.protocol": candidates.protocol,
            "recllm.system": self._system,
            "recllm.candidates": given,
            **made_metadata(_made(split, facts)),
        }
        write_file(self.path, lambda temporary: scores.write_parquet(temporary, metadata=metadata))
        print(f"{self.path}: scores; next: recllm eval ranks {self.path} --candidates {candidates.path}")
        return self.path

    def write_ranks(
        self,
        ranking: FullRanking,
        score: Callable[[np.ndarray], Scores],
        split: Split,
        *,
        present: np.ndarray | None = None,
        pool: Pool = "all",
        members: np.ndarray | None = None,
        **facts: Any,
    ) -> Path:
        """Writes the rank records of a full ranking, and its top-K lists where they are asked for.

        Args:
            ranking: The lists.
            score: Returns for some user codes the scores that `recllm.evaluation.rank_catalog` takes.
            split: The split that the scores are of.
            present: As in `write_scores`.
            pool: As in `write_scores`.
            members: As in `write_scores`.
            **facts: As in `write_scores`.

        Raises:
            DataError: As `write_scores`.
        """
        pooled = self._pooled(split, ranking.item_ids, ranking.positives, present, pool, members)
        if pooled is None:
            scores = score(ranking.users)
        else:
            facts["coverage"], content = pooled.coverage.as_json(), pooled.content
            if pool != "all":
                ranking, content = pooled.coverage.ranking(ranking, pooled.members), content[pooled.members]
            scores = score(ranking.users)
            scores = pool_columns(scores, pooled.members) if pool != "all" else scores
            if not content.all():
                scores = fill_catalog(scores, content, ranking)
        how = _made(split, facts)
        if not self._options.top_k:
            rank_catalog(ranking, scores, system=self._system, made=how).save(self.path)
            print(f"{self.path}: rank records; next: recllm eval ranks {self.path}")
            return self.path
        files = {"system": self._system, "ranks": self.path, "lists": self.lists}
        write_stage(ranking, scores, self._options.top_k, **files, made=how)
        print(f"{self.path}: rank records; next: recllm eval ranks {self.path}")
        print(
            f"{self.lists}: top-K lists; next: recllm build instructions DATASET --top-k {self.lists} "
            "--parts PART"
        )
        return self.path

    def _pooled(
        self,
        split: Split,
        item_ids: pl.Series,
        targets: np.ndarray,
        present: np.ndarray | None,
        pool: Pool,
        members: np.ndarray | None,
    ) -> _Pooled | None:
        """The pool and the content in it; None for a system that needs none and ranks the catalog."""
        if members is not None and pool != "covered":
            raise DataError(f"--covered-by says which items make the pool `covered`; --pool is {pool}")
        if present is None and pool == "all":
            return None
        if pool == "covered" and members is None and present is None:
            raise DataError(
                f"--pool covered: {self._system} needs no content of items; say which texts or vectors make "
                "the pool by --covered-by, as those that the systems in the same table read"
            )
        content = np.ones(len(item_ids), dtype=bool) if present is None else present
        if pool == "cold":
            members = cold_items(split)
        coverage = Coverage.of(content, item_ids, targets, pool, members)
        tell_coverage(coverage)
        if members is None:
            members = content if pool == "covered" else np.ones(len(item_ids), dtype=bool)
        return _Pooled(coverage, members, content)


@dataclass(frozen=True, eq=False)
class _Pooled:
    """A pool: its items and those with content; bool, shape [items]."""

    coverage: Coverage
    members: np.ndarray
    content: np.ndarray


def check_pool(pool: Pool, top_k: int) -> None:
    """Raises a `DataError` where lists for a second stage are asked of a part of the catalog."""
    if pool != "all" and top_k:
        raise DataError(
            f"--top-k lists the best of the whole catalog for a second stage; leave out --pool {pool}"
        )


def tell_coverage(coverage: Coverage) -> None:
    """Prints how much a system covers, where it is not all."""
    if coverage.pool == "cold":
        print(f"  {coverage.of_items:,} cold items and {coverage.of_targets:,} targets make the pool")
    if coverage.complete:
        return
    rest = "are left out" if coverage.pool == "covered" else "score as covered candidates drawn at random"
    print(
        f"  content for {coverage.items:,} of {coverage.of_items:,} items and {coverage.targets:,} of "
        f"{coverage.of_targets:,} targets; the others {rest} (--pool {coverage.pool})"
    )


def check_absent(*paths: Path, overwrite: bool) -> None:
    """Raises a `DataError` where a file exists and may not be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists already; give another --out, or --overwrite to replace it")


def check_word(flag: str, value: str) -> None:
    """Raises a `DataError` where what becomes part of a file's name is no plain word."""
    if Path(value).name != value or value.startswith(".") or "\0" in value:
        raise DataError(f"{flag} {value!r}: expected a plain word, which is part of a file's name")


def _made(split: Split, facts: dict[str, Any]) -> dict[str, Any]:
    return made(data_hash=split.dataset.data_hash, split_hash=split.split_hash, **facts)
