"""Held-out items: answered greedily, as `recllm build items` answers them, and judged by the same rewards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object

from recllm.errors import DataError
from recllm.mllm.chat import Decoding
from recllm.mllm.generation.in_process import InProcessBackend
from recllm.processes import rank, world_size
from recllm.training.grpo.rows import Rows
from recllm.training.rewards import Answer, Rewards, Source
from recllm.training.rewards.wording import faults

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.runs.log import Journal


class Validation:
    """Answers the held-out prompts with the weights as they are at the moment; every rank answers a share.

    Args:
        loaded: The model.
        rows: The prompts.
        rewards: The rewards.
        max_new_tokens: Longest answer.
        journal: Where the answers are written, with their rewards.
    """

    def __init__(
        self, loaded: LoadedModel, rows: Rows, rewards: Rewards, *, max_new_tokens: int, journal: Journal
    ) -> None:
        self._loaded, self._rows, self._rewards, self._journal = loaded, rows, rewards, journal
        self._decoding = Decoding(max_new_tokens)

    def measure(self, model: Any, step: int) -> dict[str, float]:
        """Returns means over the held-out answers: `valid_reward`, each part as `valid_<part>`, `valid_units`
        (keywords, words of summaries, or candidates named), `valid_tokens`, the share of each fault as
        `valid_<fault>`, and `valid_seconds`.

        An answer that was cut off has reward 0 here, whatever it has in training: it could be used by nobody.

        Args:
            model: The model in training, without the wrappers of DDP or DeepSpeed.
            step: Of the weights.
        """
        began = time.perf_counter()
        own = list(range(len(self._rows.valid)))[rank() :: world_size()]
        sources = [self._rows.valid[place] for place in own]
        answers, tokens = self._answer(model, sources)
        table = self._rewards(answers)
        total = np.where([each.finished for each in answers], self._rewards.total(table), 0.0)
        facts = [
            [float(value) for value in (*line, reward, answer.count, length, *faults(answer).values())]
            for line, reward, answer, length in zip(table, total, answers, tokens, strict=True)
        ]
        gathered = list(zip(own, facts, [answer.as_row() for answer in answers], strict=True))
        if world_size() > 1:
            gathered = gather_object(gathered)
        gathered.sort(key=lambda each: each[0])
        judged_by = (*self._rewards.names, "reward")
        names = (*judged_by, "units", "tokens", *faults(Answer(self._rows.valid[0], "")))
        for _, values, row in gathered:
            judged = {
                name: None if np.isnan(value) else value
                for name, value in zip(judged_by, values, strict=False)
            }
            self._journal.write({"step": step, **row, "rewards": judged})
        columns = np.array([values for _, values, _ in gathered])
        means = {
            f"valid_{name}": float(np.nanmean(column))
            for name, column in zip(names, columns.T, strict=True)
            if not np.isnan(column).all()
        }
        return {**means, "valid_seconds": round(time.perf_counter() - began, 2)}

    def _answer(self, model: Any, sources: Sequence[Source]) -> tuple[list[Answer], list[int]]:
        training = [module for module in model.modules() if module.training]
        try:
            backend = InProcessBackend(replace(self._loaded, model=model))
            asked = [(source.id.encode(), self._rows.request(source)) for source in sources]
            found = {
                result.key: result for batch in backend.generate(asked, self._decoding) for result in batch
            }
        finally:
            for module in training:
                module.training = True
        results = [found[key] for key, _ in asked]
        for source, result in zip(sources, results, strict=True):
            if result.error is not None:
                raise DataError(f"{source.id}: {result.error}")
        answers = [
            Answer(source, result.text, result.finish == "stop")
            for source, result in zip(sources, results, strict=True)
        ]
        return answers, [result.completion_tokens for result in results]
