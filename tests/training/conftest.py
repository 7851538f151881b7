"""A small dataset with instruction rows of several kinds, and options for runs of a few steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recllm.builders.instructions import build_instructions
from recllm.builders.options import InstructionOptions
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.dataset import describe_file
from recllm.mllm.loading import LoadedModel, load
from recllm.training.options import SFTOptions
from tests.builders.worlds import split_of, write_world

Run = Callable[..., SFTOptions]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the instructions `plain` (an image each), `text` (none) and `mixed` (both)."""
    dataset = write_world(tmp_path_factory.mktemp("sft") / "world")
    split = split_of(dataset)
    candidates = CandidateOptions(split.folder, negatives=3)
    make_candidates(split, candidates)
    for name, image in (("plain", True), ("text", False)):
        build_instructions(
            InstructionOptions(
                dataset.folder,
                name=name,
                preference="none",
                history=2,
                history_as="title",
                target_image=image,
                candidates=candidates.name,
            )
        )
    instructions = dataset.folder / "instructions"
    both = [pl.read_parquet(instructions / name / "train.parquet") for name in ("plain", "text")]
    mixed = pl.concat([both[0][::2], both[1][1::2].with_columns(id=pl.col("id") + "/text")])
    write_part(instructions / "mixed", "train", mixed)
    write_part(instructions / "mixed", "valid", pl.read_parquet(instructions / "plain" / "valid.parquet"))
    return dataset.folder


def write_part(folder: Path, part: str, rows: pl.DataFrame) -> None:
    """Writes rows as a part of instructions, with a manifest like that of the instructions `plain`."""
    folder.mkdir(exist_ok=True)
    rows.write_parquet(folder / f"{part}.parquet")
    path = folder / "manifest.json"
    plain = json.loads((folder.parent / "plain" / "manifest.json").read_text())
    manifest = json.loads(path.read_text()) if path.exists() else {**plain, "files": {}}
    manifest["files"][f"{part}.parquet"] = describe_file(folder / f"{part}.parquet")
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def loaded(tiny_path: Path) -> LoadedModel:
    """The embedded model, not to be changed."""
    return load("tiny")


@pytest.fixture
def sft(world: Path, tiny_path: Path, tmp_path: Path) -> Run:
    """Makes options of a run in `tmp_path` that takes a second or two."""

    def make(instructions: str = "plain", out: str = "run", **changes: Any) -> SFTOptions:
        settings = {
            "method": "lora",
            "lora_rank": 4,
            "max_steps": 4,
            "batch_size": 4,
            "valid_every": 2.0,
            "valid_users": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "warmup": 0.0,
        }
        folder = world / "instructions" / instructions
        return SFTOptions(instructions=folder, out=tmp_path / out, **{**settings, **changes})

    return make
