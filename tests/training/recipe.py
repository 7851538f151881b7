"""The shipped recipe itself, run from its file in this process."""

from __future__ import annotations

import runpy
from pathlib import Path

from recllm.training.options import SFTOptions

RECIPE = Path(__file__).parents[2] / "recipes" / "sft.py"


def run_recipe(options: SFTOptions) -> Path:
    """Runs recipes/sft.py with options, and returns the run's folder."""
    return runpy.run_path(str(RECIPE))["main"](options)
