"""A small toy world with a prompt that the embedded model answers variously, and options for short runs."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recllm.data.toyworld import generate
from recllm.training.grpo.options import GRPOOptions

RECIPE = Path(__file__).parents[3] / "recipes" / "grpo.py"
Options = Callable[..., GRPOOptions]


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world of 24 items."""
    return (
        generate(users=12, items=24, shortest=3, longest=3, phases=2)
        .write(tmp_path_factory.mktemp("grpo") / "toys")
        .folder
    )


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt in words that the embedded model was not taught."""
    folder = tmp_path_factory.mktemp("templates")
    (folder / "mmsrarec.image_keywords.txt").write_text("List keywords for the image.\n")
    return folder


@pytest.fixture
def grpo(toys: Path, templates: Path, tiny_path: Path, tmp_path: Path) -> Options:
    """Makes options of a run in `tmp_path` that takes a few seconds."""

    def make(out: str = "run", **changes: Any) -> GRPOOptions:
        settings = {
            "method": "lora",
            "lora_rank": 4,
            "lora_alpha": 8,
            "templates": templates,
            "prompts": ("image",),
            "rewards": ("length", "form"),
            "valid_items": 4,
            "group": 4,
            "batch_size": 8,
            "accumulation": 1,
            "max_new_tokens": 12,
            "max_steps": 2,
            "valid_every": 2,
            "learning_rate": 1e-3,
            "warmup": 0.0,
        }
        if "adapter" in changes:
            del settings["lora_rank"], settings["lora_alpha"]
        return GRPOOptions(dataset=toys, out=tmp_path / out, **{**settings, **changes})

    return make


def run_recipe(options: GRPOOptions) -> Path:
    """Runs the shipped recipe in this process, and returns the run's folder."""
    return runpy.run_path(str(RECIPE))["main"](options)
