"""A run that is killed while it samples goes on to the same bits; two processes train as one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from recllm.errors import DataError
from recllm.files import read_json
from recllm.runs.log import read_log
from recllm.training.checkpoints import complete_checkpoints
from recllm.training.grpo.options import GRPOOptions
from tests.training.grpo.conftest import Options, run_recipe
from tests.training.test_distributed import launch

TIMES = {"step_time", "valid_seconds"}
DIFFERS = "tests.training.grpo.planted:differs"
# Both kinds of prompts; 8 + 8 of them in blocks of 4: the second epoch begins after step 4.
SETTINGS = {
    "prompts": ("image", "text"),
    "rewards": (DIFFERS, "length"),
    "temperature": 1.5,
    "batch_size": 4,
    "accumulation": 4,
    "limit": 12,
    "max_steps": 7,
    "valid_every": 3,
    "save_every": 2,
    "learning_rate": 2e-3,
}


def lines_of(run: Path, file: str = "log.jsonl") -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in TIMES} for line in read_log(run / file)
    ]


def test_a_run_killed_while_it_samples_goes_on_to_the_same_bits(grpo: Options):
    whole = run_recipe(grpo(out="whole", **SETTINGS))
    options = grpo(out="killed", **SETTINGS)
    program = f"""
import os, signal
from pathlib import Path
from recllm.training.grpo.options import GRPOOptions
from recllm.training.grpo.trainer import RecGRPOTrainer
from tests.training.grpo.conftest import run_recipe

def die(self, *arguments, **named):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **named)

original = RecGRPOTrainer._generate_single_turn
RecGRPOTrainer._generate_single_turn = die
settings = {options.as_json()!r}
settings.pop("quantization")
for name in ("dataset", "out", "templates"):
    settings[name] = Path(settings[name])
for name in ("rewards", "prompts", "report_to"):
    settings[name] = tuple(settings[name])
run_recipe(GRPOOptions(**settings))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    left = [path.name for path in complete_checkpoints(options.out / "checkpoints")]
    assert left[-2:] == ["checkpoint-4", "checkpoint-6"]
    resumed = run_recipe(grpo(out="killed", resume="auto", **SETTINGS))
    assert lines_of(resumed) == lines_of(whole)
    assert lines_of(resumed, "completions.jsonl") == lines_of(whole, "completions.jsonl")
    assert lines_of(resumed, "held_out.jsonl") == lines_of(whole, "held_out.jsonl")
    for file in ("adapter_model.safetensors", "checkpoints/checkpoint-6/adapter_model.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    metrics = [read_json(run / "metrics.json", "a run") for run in (resumed, whole)]
    for each in metrics:
        del each["valid"]["seconds"], each["untrained"]["seconds"]
    assert metrics[0] == metrics[1]


def test_a_run_goes_on_with_its_own_settings_and_items_alone(grpo: Options, toys, templates, tmp_path):
    import shutil

    words = shutil.copytree(templates, tmp_path / "words")
    run = run_recipe(grpo(templates=words))
    with pytest.raises(DataError, match="give --resume auto"):
        run_recipe(grpo(templates=words))
    with pytest.raises(DataError, match=r"other settings \(beta: 0.04 then, 0.1 now\)"):
        run_recipe(grpo(templates=words, resume="auto", beta=0.1))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run_recipe(grpo(templates=words, resume="auto")) == run
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "training"}))
    (words / "mmsrarec.image_keywords.txt").write_text("Other words.\n")
    with pytest.raises(DataError, match="begun with another templates than"):
        run_recipe(grpo(templates=words, resume="auto"))


def flags(options: GRPOOptions) -> list[str]:
    """Returns options as the flags that give them."""
    found = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        values = value if isinstance(value, tuple) else (value,)
        found += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launch_file", ["cpu2", "zero2"])
def test_two_processes_make_the_same_groups_and_learn_as_one(launch_file: str, grpo: Options, tmp_path):
    """What they sample differs; prompts, groups and the first validation do not."""
    settings = {
        **SETTINGS,
        "batch_size": 4,
        "accumulation": 2,
        "max_steps": 2,
        "valid_every": 2,
        "save_every": None,
    }
    del settings["save_every"]
    launch(launch_file, "recipes/grpo.py", *flags(grpo(out="two", **settings)))
    one = run_recipe(grpo(out="one", **{**settings, "accumulation": 4}))
    two = tmp_path / "two"
    assert read_json(two / "manifest.json", "a run")["ranks"] == 2
    samples = [lines_of(run, "completions.jsonl") for run in (one, two)]
    assert [line["id"] for line in samples[0]] == [line["id"] for line in samples[1]]
    assert [line["rewards"] for line in lines_of(one, "held_out.jsonl")[:8]] == [
        line["rewards"] for line in lines_of(two, "held_out.jsonl")[:8]
    ]
    for line in samples[1]:
        assert np.isfinite(line["advantage"])
    groups = [samples[1][start : start + 4] for start in range(0, len(samples[1]), 4)]
    assert all(len({line["id"] for line in group}) == 1 for group in groups)
    weights = load_file(two / "adapter_model.safetensors")
    assert any(np.abs(weight).max() > 0 for name, weight in weights.items() if "lora_B" in name)
