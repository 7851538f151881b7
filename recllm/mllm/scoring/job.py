"""Scoring a table into a file: resumable, shared among ranks, the same file however it came about."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm import processes
from recllm.data.prompt_files import PromptFile
from recllm.files import write_file
from recllm.mllm.scoring.prompts import PromptReader, digest_of_images, group_rows, image_sizes, units_of
from recllm.mllm.scoring.scorer import YesNoScorer
from recllm.mllm.scoring.shards import ScoreShards
from recllm.mllm.scoring.tables import unit_reader
from recllm.progress import Progress


@dataclass(frozen=True)
class Summary:
    """What became of a run.

    Attributes:
        users: Lists, one a user and target.
        rows: Rows in all.
        scored: Rows that this run scored, over all ranks.
        seconds: What it took.
        computed: Tokens that the model went through for all rows, by this run and those before it.
        full: Tokens of the same prompts one by one.
        outside: Mean probability mass of neither yes nor no.
        tied: Share of pairs within lists whose scores are equal.
    """

    users: int
    rows: int
    scored: int
    seconds: float
    computed: int
    full: int
    outside: float
    tied: float

    def __str__(self) -> str:
        return (
            f"{self.users:,} users, {self.rows:,} rows; {self.scored:,} scored now in {self.seconds:,.1f} s "
            f"({self.scored / self.seconds:,.1f} rows/s); {self.computed:,} tokens computed for "
            f"{self.full:,} of full prompts; mass outside yes and no {self.outside:.4f}; tied pairs "
            f"{self.tied:.4%}"
        )


def score_into(
    scorer: YesNoScorer,
    rows: pl.DataFrame,
    folder: Path,
    out: Path,
    *,
    job: dict[str, Any],
    metadata: dict[str, str],
    overwrite: bool = False,
    prompts: PromptFile | None = None,
) -> Summary | None:
    """Scores rows and writes `out` when all ranks are done; what an earlier run of the job scored is kept.

    Unfinished scores lie in `.<name>.scoring` beside `out`. Ranks take units of lists in turn; which prompts
    are batched together does not depend on their number, nor on interruptions.

    Args:
        scorer: The scorer.
        rows: Rows of instructions.
        folder: The dataset folder.
        out: The score file: user, target, item, score, probability, outside.
        job: What decides the scores besides the scorer; JSON types only.
        metadata: Of the file.
        overwrite: Drop unfinished scores of other settings.
        prompts: The file to read the prompts from, as for `score_table`; None: `rows` has them.

    Returns:
        What became of it, on rank 0; None on the others.

    Raises:
        DataError: As `score_table`; or unfinished scores of other settings are there.
        RuntimeError: Another rank has ended.
    """
    started = time.perf_counter()
    processes.connect()
    groups = group_rows(rows, prompts_on_disk=prompts is not None)
    shards = ScoreShards(out.parent / f".{out.stem}.scoring")
    if processes.rank() == 0:
        job = {**job, "images": digest_of_images(rows, folder), "scorer": scorer.identity}
        ScoreShards.prepare(shards.folder, job, scorer.batch_tokens, overwrite=overwrite)
    processes.sum_over_ranks([0])  # the folder is there
    scorer.batch_tokens = shards.batch_tokens
    done = {row for scored in shards.lines() for row in scored.rows}
    mine = [
        unit
        for place, unit in enumerate(units_of(groups))
        if place % processes.world_size() == processes.rank()
        and any(row not in done for group in unit for row in group)
    ]
    scored_now = 0
    if mine:
        numbers = [row for unit in mine for group in unit for row in group]
        sizes = image_sizes(rows[numbers], folder)
        total = sum(row not in done for row in numbers)
        with (
            shards.writer(processes.rank()) as shard,
            scorer.session() as session,
            Progress(
                desc="scoring", total=total, unit="row", disable=processes.rank() > 0, leave=False
            ) as bar,
        ):
            reader = PromptReader(scorer.loaded, folder, sizes, session.key_of)
            units = [unit_reader(reader, rows, unit, prompts) for unit in mine]
            for scored in session.score(units, reader.paths, done):
                shard.append(scored)
                scored_now += len(scored.rows)
                bar.update(len(scored.rows))
    (scored_now,) = processes.sum_over_ranks([scored_now])  # all have scored theirs
    if processes.rank():
        return None
    margin, outside = np.full(rows.height, np.nan, np.float32), np.empty(rows.height, np.float32)
    tokens = {}
    for scored in shards.lines():
        margin[scored.rows], outside[scored.rows] = scored.margin, scored.outside
        tokens[tuple(scored.rows)] = scored.computed, scored.full
    if np.isnan(margin).any():
        raise RuntimeError(f"{shards.folder}: {np.isnan(margin).sum()} rows have no score")
    probability = scorer.probability(margin, outside)
    score = scorer.score(margin, outside)
    table = rows.select("user", "target", "item").with_columns(
        score=score, probability=probability, outside=outside
    )
    write_file(out, lambda temporary: table.write_parquet(temporary, metadata=metadata))
    shards.remove()
    seconds = time.perf_counter() - started
    computed, full = np.array(list(tokens.values())).sum(0).tolist()
    return Summary(
        len(groups),
        rows.height,
        scored_now,
        seconds,
        computed,
        full,
        float(outside.mean(dtype=np.float64)),
        tied_pairs(score, groups),
    )


def tied_pairs(scores: np.ndarray, groups: list[list[int]]) -> float:
    """Returns the share of pairs within lists whose scores are equal; 0 where there are no pairs."""
    tied = pairs = 0
    for group in groups:
        counts = np.unique(scores[group], return_counts=True)[1]
        tied += int((counts * (counts - 1)).sum())
        pairs += len(group) * (len(group) - 1)
    return tied / pairs if pairs else 0.0
