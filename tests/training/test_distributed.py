"""Two processes train as one does: DDP, ZeRO-2 and ZeRO-3 on CPUs, through the users' launch files."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from recllm.files import read_json
from recllm.mllm import load
from recllm.mllm.scoring.command import score_yes_no
from recllm.mllm.scoring.options import YesNoOptions
from recllm.runs.log import read_log
from recllm.training.options import SFTOptions
from tests.training.conftest import Run
from tests.training.ports import free_port
from tests.training.recipe import run_recipe

ROOT = Path(__file__).parents[2]
# Rows with and without images, one a process: a process often has none while the other has. Tower and
# projector train, which is where processes would wait for each other for ever.
MIXED = {
    "instructions": "mixed",
    "train_vision": True,
    "train_projector": True,
    "lora_dropout": 0.0,
    "max_steps": 3,
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {**MIXED, "method": "lora"},
    "qlora": {**MIXED, "method": "qlora"},
    "full": {**MIXED, "method": "full", "train_embeddings": True, "learning_rate": 1e-4, "dtype": "float32"},
}
# Updates that bfloat16 weights, which the configs of real models ask for, would not keep.
METHODS["full, bfloat16"] = {**METHODS["full"], "dtype": "bfloat16", "learning_rate": 1e-6}


def launch(launch_file: str, script: str, *arguments: str) -> None:
    """Runs a script in two processes, as a user would; fails after two minutes, as a hang would."""
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        *("--config_file", f"recipes/launch/{launch_file}.yaml"),
        *("--num_processes", "2", "--main_process_port", str(free_port())),
        *(script, *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def flags(options: SFTOptions) -> list[str]:
    """Returns options as the flags that give them."""
    found = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        found += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    return found


def losses(run: Path) -> list[float]:
    """Returns the loss of each step."""
    return [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]


def weights_apart(run: Path, other: Path, start: Path | None) -> float:
    """Returns how far the weights of two runs are apart, as a share of how far training moved them.

    Full fine-tuning started from the weights in `start`; of LoRA, B started from zero and is compared.
    """
    name = "adapter_model.safetensors" if start is None else "model.safetensors"
    weights, others = load_file(run / name), load_file(other / name)
    assert weights.keys() == others.keys()
    began = load_file(start / name) if start is not None else {}
    compared = [key for key in weights if start is not None or "lora_B" in key]
    moved = np.concatenate([(others[key] - began.get(key, 0)).ravel() for key in compared])
    apart = np.concatenate([(others[key] - weights[key]).ravel() for key in compared])
    return float(np.linalg.norm(apart) / np.linalg.norm(moved))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch_file", "method"),
    [
        ("cpu2", "lora"),
        ("cpu2", "full, bfloat16"),
        ("zero2", "qlora"),
        ("zero3", "lora"),
        ("zero3", "qlora"),
        ("zero3", "full"),
    ],
)
def test_two_processes_train_as_one_with_the_same_global_batch(
    launch_file: str, method: str, sft: Run, tiny_path: Path, tmp_path: Path
) -> None:
    run_recipe(sft(out="one", batch_size=2, **METHODS[method]))
    launch(launch_file, "recipes/sft.py", *flags(sft(out="two", batch_size=1, **METHODS[method])))
    one, two = tmp_path / "one", tmp_path / "two"
    assert read_json(two / "manifest.json", "a run")["ranks"] == 2
    assert len(losses(one)) == 3
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    for key in ("auc", "outside"):
        mine, theirs = (read_json(run / "metrics.json", "a run")["valid"][key] for run in (two, one))
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert weights_apart(two, one, tiny_path if "full" in method else None) < 1e-3
    if "full" in method:
        load(two)
    else:
        assert load("tiny", adapter=two, quantization="nf4" if method == "qlora" else None).identity[
            "adapter"
        ]


@pytest.mark.slow
def test_two_processes_score_as_one(world: Path, tiny_path: Path, tmp_path: Path) -> None:
    asked = YesNoOptions(
        world / "instructions" / "plain", part="valid", model="tiny", name="one", out=tmp_path
    )
    score_yes_no(asked)
    launch(
        "cpu2",
        "eval/score_yes_no.py",
        str(asked.instructions),
        *("--part", "valid", "--model", "tiny", "--name", "two", "--out", str(tmp_path)),
    )
    one, two = (pl.read_parquet(tmp_path / "scores" / f"{name}.parquet") for name in ("one", "two"))
    assert len(one) > 4
    names = ["user", "target", "item"]
    assert two.select(names).equals(one.select(names))
    np.testing.assert_allclose(two["score"], one["score"], atol=1e-5)
