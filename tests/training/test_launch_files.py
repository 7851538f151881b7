"""The launch files: each header's command can be run, and each starts what it says, also on CPUs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from recllm import precision
from recllm.config import parse_config
from recllm.errors import DataError
from recllm.training import launching
from recllm.training.options import SFTOptions
from tests.training.ports import free_port

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "launch").glob("*.yaml"))
SHOW = """
from recllm.training import launching
from recllm.training.options import SFTOptions
arguments = launching.prepare(SFTOptions())
from transformers import TrainingArguments
training = TrainingArguments(output_dir="unused", **arguments)
if training.process_index == 0:
    print("SHOWN", training.world_size, training.device.type, launching.zero_stage())
"""


def test_all_launch_files_are_there() -> None:
    assert {path.stem for path in FILES} == {"cpu", "cpu2", "single_gpu", "ddp", "zero2", "zero3"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_in_the_header_names_this_file_a_recipe_and_options_that_exist(path: Path) -> None:
    load_config_from_file(str(path))
    header = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    (command,) = [line for line in header if line.startswith("accelerate launch")]
    words = shlex.split(command)
    assert words[words.index("--config_file") + 1] == f"recipes/launch/{path.name}"
    script = words.index("recipes/sft.py")
    options = words[script + 1 :]
    config = options[options.index("--config") + 1]
    assert (ROOT / config).is_file()
    parse_config(
        SFTOptions,
        options if Path.cwd() == ROOT else [word.replace(config, str(ROOT / config)) for word in options],
    )
    several = yaml.safe_load(path.read_text())["num_processes"] > 1
    assert several == ("--num_processes" in path.read_text().split("compute_environment")[0])


def launched(tmp_path: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Starts a script that shows what its process is told."""
    (tmp_path / "show.py").write_text(SHOW)
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--main_process_port",
        str(free_port()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *launcher, "show.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_cpu2_starts_two_processes_that_know_of_each_other(tmp_path: Path) -> None:
    done = launched(tmp_path, "--config_file", str(ROOT / "recipes/launch/cpu2.yaml"))
    assert "SHOWN 2 cpu 0" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_a_launch_that_starts_fewer_processes_than_asked_for_is_refused(tmp_path: Path) -> None:
    done = launched(tmp_path, "--cpu", "--num_processes", "2")
    assert done.returncode != 0
    assert "asked for several processes but started one" in done.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(DataError, match=r"8 processes .* 2 GPUs; say --num_processes"):
        launching.prepare(SFTOptions())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launching.prepare(SFTOptions()) == {"ddp_find_unused_parameters": False}


def test_bfloat16_is_taken_where_a_gpu_has_it_and_never_unasked_on_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    assert [launching.uses_bf16(SFTOptions(bf16=how)) for how in ("auto", "yes", "no")] == [
        False,
        True,
        False,
    ]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(DataError, match="on GPUs only"):
        launching.prepare(SFTOptions(bf16="yes"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert [launching.uses_bf16(SFTOptions(bf16=how)) for how in ("auto", "yes", "no")] == [True, True, False]
