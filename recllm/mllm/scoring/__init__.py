"""The yes/no scorer: how much sooner a model would answer yes than no, for each candidate of each user.

`YesNoScorer` scores prompts with a loaded model, `score_table` a table of instruction rows, and
`recllm.mllm.scoring.command.score_yes_no` a file of them, resumable and shared among ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recllm.mllm.scoring.scorer import YesNoScorer
    from recllm.mllm.scoring.tables import score_table

__all__ = ["YesNoScorer", "score_table"]


def __getattr__(name: str) -> Any:
    # Looked up late: the options of this package are read by `recllm --help`, which must not wait for torch.
    if name == "YesNoScorer":
        from recllm.mllm.scoring.scorer import YesNoScorer

        return YesNoScorer
    if name == "score_table":
        from recllm.mllm.scoring.tables import score_table

        return score_table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
