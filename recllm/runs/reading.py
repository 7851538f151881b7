"""Run folders of fine-tuning and of rankers: what their manifests, logs and metrics say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recllm.errors import DataError
from recllm.files import MANIFEST, read_json
from recllm.runs.folder import KINDS, RANKER


@dataclass(frozen=True, eq=False)
class Run:
    """One run."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any]
    """`best_step` (of a ranker an epoch), and what `valid` and `train` came to."""
    log: list[dict[str, Any]]
    """One object per logged step, in the order of the file."""

    @property
    def log_path(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def unit(self) -> str:
        """What a line of the log counts."""
        return "epoch" if self.manifest.get("kind") == RANKER else "step"

    @property
    def best_step(self) -> float | None:
        """The step whose weights were kept."""
        return finite(self.metrics.get("best_step"))

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps at which a value was logged, and the value: two arrays [points], by step.

        What is not a finite number is left out.
        """
        points = [(finite(line.get("step")), finite(line.get(name))) for line in self.log]
        kept = sorted((step, value) for step, value in points if step is not None and value is not None)
        steps, values = zip(*kept, strict=True) if kept else ((), ())
        return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        DataError: It is not the folder of a finished run, or a line of its log is not JSON.
    """
    manifest = read_json(
        folder / MANIFEST, "a run folder (made by recipes/sft.py or recipes/train_ranker.py)"
    )
    if manifest.get("kind") not in KINDS:
        expected = " or ".join(repr(kind) for kind in KINDS)
        raise DataError(
            f"{folder} is not a run folder: its manifest says kind {manifest.get('kind')!r}, not {expected}"
        )
    metrics = read_json(folder / "metrics.json", "the folder of a finished run")
    return Run(folder.resolve().name, folder, manifest, metrics, _read_log(folder / "log.jsonl"))


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} is missing: the run was not finished; run it again with --resume auto")
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not JSON ({error})") from None
            if not isinstance(entry, dict):
                raise DataError(f"{path}: line {number} should hold one JSON object")
            lines.append(entry)
    return lines


def finite(value: Any) -> float | None:
    """Returns a number as a float; None for anything else, NaN and infinities included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
