"""Validation by ranking: the candidate lists are scored as they will be in use, not by their loss."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recllm.data.instructions import YES_NO, rows_of_task
from recllm.data.prompt_files import FILE_ROW, PromptFile, small_columns
from recllm.errors import DataError
from recllm.evaluation import compute_metrics, rank_candidates
from recllm.mllm.scoring import YesNoScorer, score_table

if TYPE_CHECKING:
    from recllm.data.instructions import InstructionPart
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore

MEASURED = {"auc": "auc", "ndcg@10": "ndcg@10", "hr@1": "hr@1"}
_PROBES = 16


class Validation:
    """Scores the validation part's candidate lists with the weights as they are at the moment.

    Only rows that ask for yes or no are scored; other tasks are left out.

    Every rank scores the same lists. Under ZeRO-3 it must (each forward gathers weights from all ranks), and
    elsewhere it costs no wall time and needs no exchange; `valid_users` bounds what it costs.

    Args:
        loaded: The model; what trains it may be wrapped around its layers meanwhile.
        part: The validation part, with candidate lists.
        users: Score the lists of this many users only, spread evenly over all.
        visual_store: Read the images' tokens from it.

    Raises:
        DataError: The part has no candidate lists.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        part: InstructionPart,
        *,
        users: int | None = None,
        visual_store: VisualStore | None = None,
    ):
        lists = (
            rows_of_task(pl.scan_parquet(part.path, glob=False)).select("user", "target", "label").collect()
        )
        labels = lists.group_by("user", "target").agg(
            positives=pl.col("label").sum(), negatives=(1 - pl.col("label")).sum()
        )
        if (
            lists.is_empty()
            or labels.select((pl.col("negatives") < 1) | (pl.col("positives") < 1)).to_series().any()
        ):
            raise DataError(
                f"{part.path} has targets without candidates to rank them among; build the instructions with "
                "--candidates NAME (made by `recllm data candidates`)"
            )
        chosen = None
        if users is not None:
            names = lists["user"].unique(maintain_order=True)
            places = np.unique(np.linspace(0, len(names) - 1, min(users, len(names))).round().astype(int))
            chosen = names[places]
        # A prompt takes kilobytes, and stays in the file.
        self.rows = small_columns(part.path, chosen, task=YES_NO)
        self._prompts = PromptFile(part.path)
        self._loaded, self._part, self._store = loaded, part, visual_store

    def measure(self, model: Any) -> dict[str, float]:
        """Returns `valid_auc`, `valid_ndcg@10`, `valid_hr@1` (means over users), the mean probability mass on
        other answers than yes and no as `valid_outside`, and `valid_seconds`.

        Args:
            model: The model in training, without the wrappers of DDP or DeepSpeed.
        """
        began = time.perf_counter()
        scored = self._score(model, self.rows)
        lists = scored.select("user", "target", "item", "label")
        scores = scored.select("user", "target", "item", score=pl.col("margin"))
        means = compute_metrics(rank_candidates(lists, scores), names=list(MEASURED.values())).mean()
        return {
            **{f"valid_{name}": float(means[metric]) for name, metric in MEASURED.items()},
            "valid_outside": float(scored["outside"].cast(pl.Float64).mean()),
            "valid_seconds": round(time.perf_counter() - began, 2),
        }

    def probes(self, model: Any) -> pl.DataFrame:
        """Returns up to 16 rows, positives and negatives, as they are on disk, with their margins."""
        positives = self.rows.filter(pl.col("label") == 1).head(_PROBES // 2)
        others = self.rows.join(positives, on=["user", "target"], how="semi").filter(pl.col("label") == 0)
        rows = pl.concat([positives, others.head(_PROBES - len(positives))])
        return self._prompts.take(rows[FILE_ROW]).with_columns(margin=self._score(model, rows)["margin"])

    def _score(self, model: Any, rows: pl.DataFrame) -> pl.DataFrame:
        scorer = YesNoScorer(replace(self._loaded, model=model), visual_store=self._store)
        return score_table(scorer, rows, self._part.dataset, prompts=self._prompts)
