"""Full fine-tuning trains float32 weights, also where a config asks for 16 bits: small updates are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recllm.mllm.scoring.command import model_of
from recllm.mllm.scoring.options import YesNoOptions
from recllm.training import launching
from recllm.training import sft as steps
from tests.training.recipe import run_recipe

RATE = 1e-6


@pytest.mark.parametrize("bf16", ["no", "yes"])
def test_an_update_below_the_resolution_of_bfloat16_is_kept(sft, tiny_path, bf16):
    options = sft(
        method="full",
        dtype="bfloat16",
        bf16=bf16,
        learning_rate=RATE,
        schedule="constant",
        max_steps=2,
        valid_users=1,
    )
    run = run_recipe(options)
    before, after = load_file(tiny_path / "model.safetensors"), load_file(run / "model.safetensors")
    trained = [name for name in after if ".layers." in name and "visual" not in name]
    moved = {name: (after[name] - before[name]).abs().max() for name in trained}
    assert len(moved) > 10
    for name, change in moved.items():
        assert after[name].dtype == torch.float32
        assert 0 < change <= 3 * RATE, name  # Adam moves a weight by about the rate at each step
    resolution = before[name].abs().max() * 2.0**-9
    assert change < resolution  # what bfloat16 would have rounded away
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["model"]["dtype"] == "float32"
    loads, _ = model_of(YesNoOptions(Path(), run=run))
    assert loads.dtype == "auto"  # as trained: the files are float32


@pytest.mark.parametrize(
    ("stage", "bf16", "expected"), [(0, "yes", "float32"), (2, "yes", "bfloat16"), (3, "no", "float32")]
)
def test_deepspeed_keeps_a_copy_of_its_own_only_with_bf16(sft, monkeypatch, stage, bf16, expected):
    monkeypatch.setattr(launching, "zero_stage", lambda: stage)
    assert steps._dtype(sft(method="full", dtype="bfloat16", bf16=bf16)) == expected
    assert steps._dtype(sft(method="lora", dtype="bfloat16", bf16=bf16)) == "bfloat16"
