"""What `recllm report` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from recllm.evaluation.significance import RESAMPLES


@dataclass
class ReportOptions:
    """Writes one self-contained HTML file of what systems score, how they were trained, and examples."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILES")]]
    """Score files, rank records, and run folders of `recipes/sft.py`. The first score or rank file is the
    system that the report is about; name the baselines after it. Put them before options that take several
    words."""
    candidates: Path | None = None
    """The candidate file that the scores belong to; rank records need none."""
    dataset: Path | None = None
    """The dataset folder: for the data card, the metric by history length, and examples."""
    instructions: Path | None = None
    """The folder DATASET/instructions/NAME whose prompts the system was asked: examples show them."""
    part: Literal["valid", "test"] = "test"
    """Which targets were ranked."""
    ablation: tuple[str, ...] = ()
    """The systems of the modality ablation, as name=file: image=scores/a.parquet text=scores/b.parquet
    both=scores/c.parquet. They get a table of their own, and stand in the main one where FILES names them."""
    examples: int = 6
    """Users shown, a third each of the best, middle and worst ranked; 0 shows none."""
    ks: tuple[int, ...] = (1, 5, 10, 20)
    """Cutoffs of the tables."""
    resamples: int = RESAMPLES
    """Bootstrap resamples and sign flips."""
    seed: int = 0
    """Seeds both, and the choice among users of equal rank."""
    title: str | None = None
    """Heading of the report."""
    out: Path | None = None
    """The folder to write; reports/<name of the first file> when not given."""
    overwrite: bool = False
    """Replace that folder where it exists."""
