"""A run that is killed and goes on equals one that was not, to the last bit, on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from recllm.errors import DataError
from recllm.runs.log import Journal, read_log
from recllm.training import callbacks
from recllm.training.checkpoints import complete_checkpoints, drop_old, mark_complete
from recllm.training.trainer import RecSFTTrainer
from recllm.training.validation import Validation
from tests.training.conftest import write_part
from tests.training.recipe import run_recipe

TIMES = {"tokens_per_second", "rows_per_second", "valid_seconds"}


class Killed(BaseException):
    """Stands for the end of a process."""


@contextmanager
def killed_at(step: int, *, before_mark: bool) -> Iterator[None]:
    """Ends a run right after the checkpoint of a step is whole, or while it is not yet."""
    save, mark = RecSFTTrainer._save_checkpoint, callbacks.mark_complete

    def save_and_die(self, *arguments):
        save(self, *arguments)
        if self.state.global_step == step:
            raise Killed

    def die_instead_of_marking(checkpoint):
        if checkpoint.name == f"checkpoint-{step}":
            (checkpoint / "optimizer.pt").write_bytes(b"half")
            raise Killed
        mark(checkpoint)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if before_mark:
            patch.setattr(callbacks, "mark_complete", die_instead_of_marking)
        else:
            patch.setattr(RecSFTTrainer, "_save_checkpoint", save_and_die)
        yield


def lines_of(run: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_log(run / "log.jsonl")
    ]


def metrics_of(run: Path) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["valid"]["seconds"]
    return metrics


@pytest.mark.parametrize(("method", "before_mark"), [("qlora", False), ("lora", True), ("full", False)])
def test_a_killed_run_goes_on_to_the_same_bits(sft, method, before_mark):
    settings = {
        "method": method,
        "max_steps": 9,
        "valid_every": 3.0,
        "patience": 5,
        "lora_dropout": 0.1,
        "batch_size": 5,
    }
    whole = run_recipe(sft(out="whole", **settings))  # 24 rows: the second epoch begins after step 5
    with killed_at(6, before_mark=before_mark):
        run_recipe(sft(out="killed", **settings))
    killed = sft(out="killed", resume="auto", **settings)
    left = [path.name for path in complete_checkpoints(killed.out / "checkpoints")]
    assert left == ["checkpoint-3"] if before_mark else ["checkpoint-3", "checkpoint-6"]
    resumed = run_recipe(killed)
    assert lines_of(resumed) == lines_of(whole)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    for file in (name, f"checkpoints/checkpoint-9/{name}"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    assert metrics_of(resumed) == metrics_of(whole)


def test_a_finished_run_is_left_as_it_is(sft, capsys):
    run = run_recipe(sft(max_steps=2))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run_recipe(sft(max_steps=2, resume="auto")) == run
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_run_does_not_go_on_with_other_rows(sft, world, tmp_path):
    """As when the instructions were built again under the same name since the run began."""
    dataset = shutil.copytree(world, tmp_path / "world")
    folder = dataset / "instructions" / "plain"
    settings = {"instructions": str(folder), "max_steps": 4}
    with killed_at(2, before_mark=False):
        run_recipe(sft(**settings))
    before = {name: (folder / name).read_bytes() for name in ("train.parquet", "manifest.json")}
    write_part(folder, "train", pl.read_parquet(folder / "train.parquet").reverse())
    with pytest.raises(DataError, match=r"was begun with other train rows than .*has now"):
        run_recipe(sft(resume="auto", **settings))
    for name, content in before.items():
        (folder / name).write_bytes(content)
    assert run_recipe(sft(resume="auto", **settings)).is_dir()


@pytest.fixture
def hub(monkeypatch) -> list[tuple[Path, str]]:
    """A hub that notes what is pushed to it."""
    pushed: list[tuple[Path, str]] = []
    monkeypatch.setattr("recllm.training.hub.push_folder", lambda path, name: pushed.append((path, name)))
    return pushed


def test_a_finished_run_is_uploaded_by_the_same_command(sft, hub):
    run = run_recipe(sft(max_steps=2))
    assert not hub
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for count in (1, 2):  # also a second time, as after an upload that failed
        assert run_recipe(sft(max_steps=2, resume="auto", push_to_hub="me/shop")) == run
        assert hub == [(run, "me/shop")] * count
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_run_is_complete_and_free_before_it_is_uploaded(sft, monkeypatch):
    def refuse(path, name):
        assert json.loads((path / "manifest.json").read_text())["status"] == "finished"
        raise DataError("the hub refused")

    monkeypatch.setattr("recllm.training.hub.push_folder", refuse)
    with pytest.raises(DataError, match="the hub refused"):
        run_recipe(sft(max_steps=2, push_to_hub="me/shop"))
    assert run_recipe(sft(max_steps=2, resume="auto")).is_dir()


def test_a_run_that_stopped_early_stays_stopped(sft, monkeypatch):
    aucs = iter([0.5, 0.7, 0.6, 0.6])
    monkeypatch.setattr(Validation, "measure", lambda self, model: {"valid_auc": next(aucs)})
    settings = {"max_steps": 40, "patience": 2}
    with killed_at(6, before_mark=False):
        run_recipe(sft(**settings))
    run = run_recipe(sft(resume="auto", **settings))
    steps = [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_kill_9_while_a_checkpoint_is_written(sft, world, tmp_path):
    """A process ends itself between the files of its second checkpoint; the next goes on from the first."""
    options = sft(max_steps=4, lora_dropout=0.1)
    program = f"""
import os, signal
from pathlib import Path
from recllm.training.options import SFTOptions
from recllm.training.trainer import RecSFTTrainer
from tests.training.recipe import run_recipe

def die(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, folder)

original = RecSFTTrainer._save_rng_state
RecSFTTrainer._save_rng_state = die
settings = {options.as_json()!r}
settings.pop("quantization")
settings.update(instructions=Path(settings["instructions"]), out=Path(settings["out"]), report_to=())
run_recipe(SFTOptions(**settings))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=dict(os.environ), timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    folder = options.out / "checkpoints"
    assert (folder / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-2"]
    resumed = run_recipe(sft(max_steps=4, lora_dropout=0.1, resume="auto"))
    whole = run_recipe(sft(out="whole", max_steps=4, lora_dropout=0.1))
    assert lines_of(resumed) == lines_of(whole)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"state")
    mark_complete(path)
    return path


def test_a_checkpoint_counts_only_while_all_its_files_are_there(tmp_path):
    first, second, third = (make_checkpoint(tmp_path, step) for step in (2, 10, 4))
    assert complete_checkpoints(tmp_path) == [first, third, second]
    (second / "optimizer.pt").write_bytes(b"sta")
    (third / "optimizer.pt").unlink()
    assert complete_checkpoints(tmp_path) == [first]


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-5").mkdir()  # cut off
    drop_old(tmp_path, keep=2, best=tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_resume_from_something_else_is_refused(sft, tmp_path):
    options = sft(max_steps=2)
    options.out.mkdir()
    run_recipe(options)
    (options.out / "manifest.json").write_text(
        (options.out / "manifest.json").read_text().replace('"finished"', '"training"')
    )
    for path, message in (("letters", "not a checkpoint's folder"), ("checkpoint-7", "not a complete")):
        with pytest.raises(DataError, match=message):
            run_recipe(sft(max_steps=2, resume=str(tmp_path / path)))


def test_a_log_goes_on_behind_the_step_that_is_resumed(tmp_path):
    path = tmp_path / "log.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    journal = Journal(path, step=2)
    journal.write({"step": 3, "again": True})
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
