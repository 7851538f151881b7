"""A table of instruction rows in, the same rows with scores out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from recllm.data.prompt_files import FILE_ROW, PromptFile
from recllm.mllm.prefix.groups import Prompt
from recllm.mllm.scoring.prompts import COLUMNS, PromptReader, group_rows, image_sizes, units_of
from recllm.processes import rank
from recllm.progress import Progress

if TYPE_CHECKING:
    from recllm.mllm.scoring.scorer import YesNoScorer


def score_table(
    scorer: YesNoScorer,
    rows: pl.DataFrame,
    folder: Path,
    progress: bool = False,
    prompts: PromptFile | None = None,
) -> pl.DataFrame:
    """Scores rows of instructions; what the rows of one user and target share is computed once.

    Args:
        scorer: The scorer; the model's weights are read as they are now.
        rows: As in `instructions/<name>/<part>.parquet`, in any order.
        folder: The dataset folder, which image paths are relative to.
        progress: Show a bar where there is a terminal, on rank 0.
        prompts: Read the prompts from this file as they are needed; `rows` are then what
            `recllm.data.prompt_files.small_columns` returns for it, or some of them.

    Returns:
        In the order of `rows`: id, user, target, item, label, margin, probability, outside (the probability
        mass of neither yes nor no); the last three in float32, but the `paper` probability in float64.

    Raises:
        DataError: A column is missing, an image cannot be read, a prompt is too long, or a text forges
            special tokens; the sample is named.
    """
    folder = Path(folder)
    groups = group_rows(rows, prompts_on_disk=prompts is not None)
    sizes = image_sizes(rows, folder)
    margin, outside = np.empty(rows.height, np.float32), np.empty(rows.height, np.float32)
    with (
        scorer.session() as session,
        Progress(
            desc="scoring",
            total=rows.height,
            unit="row",
            disable=not progress or rank() > 0,
            leave=False,
        ) as bar,
    ):
        reader = PromptReader(scorer.loaded, folder, sizes, session.key_of)
        units = [unit_reader(reader, rows, unit, prompts) for unit in units_of(groups)]
        for scored in session.score(units, reader.paths):
            margin[scored.rows], outside[scored.rows] = scored.margin, scored.outside
            bar.update(len(scored.rows))
    return rows.select("id", "user", "target", "item", "label").with_columns(
        margin=margin, probability=scorer.probability(margin, outside), outside=outside
    )


def unit_reader(
    reader: PromptReader, rows: pl.DataFrame, unit: list[list[int]], prompts: PromptFile | None = None
) -> Callable[[], list[list[Prompt]]]:
    """Returns what reads the prompts of some groups of row numbers, when it is called.

    Args:
        reader: Makes prompts of rows.
        rows: The table that has the groups' rows.
        unit: The groups.
        prompts: The file that has the rows' prompts; None: `rows` has them.
    """
    return partial(_read, reader, rows, unit, prompts)


def _read(
    reader: PromptReader, rows: pl.DataFrame, unit: list[list[int]], prompts: PromptFile | None
) -> list[list[Prompt]]:
    numbers = [row for group in unit for row in group]
    if prompts is None:
        table = rows[numbers].select(COLUMNS)
    else:
        table = prompts.take(rows[FILE_ROW][numbers], COLUMNS)
    found, start = [], 0
    for group in unit:
        contents = table[start : start + len(group)].to_dicts()
        found.append([reader.read(row, content) for row, content in zip(group, contents, strict=True)])
        start += len(group)
    return found
