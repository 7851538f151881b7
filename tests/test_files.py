"""Folders and files are whole or absent: after kill -9, after a full disk, with two writers at once."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import recllm.files
from recllm.data import Dataset
from recllm.errors import DataError
from recllm.files import refuse_nested, staged_folder, write_file, write_json

IMPORT = [sys.executable, "-m", "recllm.cli", "data", "import", "table"]


def write_log(path: Path, rows: int) -> None:
    lines = (f"u{row % 997},i{row % 463},{1_600_000_000 + row}" for row in range(rows))
    path.write_text("user,item,timestamp\n" + "\n".join(lines) + "\n")


def test_kill_9_at_random_moments_leaves_no_dataset_and_the_next_run_succeeds(tmp_path):
    write_log(tmp_path / "log.csv", 300_000)
    out = tmp_path / "out"
    command = [*IMPORT, str(tmp_path / "log.csv"), str(out)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.perf_counter() - started
    expected = (out / "interactions.parquet").read_bytes()
    chance = random.Random(0)
    killed = 0
    for _ in range(12):
        for path in (out, tmp_path / "kept"):
            if path.exists():
                path.rename(tmp_path / f"done-{time.time_ns()}")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.3, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if out.exists():  # it was done before the signal: then it must be whole
            assert (out / "interactions.parquet").read_bytes() == expected
            Dataset.open(out)
    assert killed >= 3
    if out.exists():
        out.rename(tmp_path / "last")
    subprocess.run(command, check=True, capture_output=True)
    assert (out / "interactions.parquet").read_bytes() == expected
    assert not list(tmp_path.glob(".out*")), "what the killed runs left was cleared away"


def test_kill_9_during_an_overwrite_keeps_the_old_dataset_or_has_the_new_one(tmp_path):
    write_log(tmp_path / "log.csv", 100_000)
    out = tmp_path / "out"
    command = [*IMPORT, str(tmp_path / "log.csv"), str(out), "--overwrite"]
    subprocess.run(command, check=True, capture_output=True)
    for delay in (0.2, 0.5, 0.8, 1.1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert len(Dataset.open(out).interactions) == 100_000


def test_a_full_disk_is_an_error_that_says_so_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        chance = random.Random(0)
        rows = (f"{chance.getrandbits(64):x},{chance.getrandbits(64):x}" for _ in range(100_000))
        (tmp_path / "log.csv").write_text("user,item\n" + "\n".join(rows))
        done = subprocess.run(
            [*IMPORT, str(tmp_path / "log.csv"), str(disk / "out")], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "the disk is full; nothing was written" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_syncing_is_told_apart_from_other_errors(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="disk is full"), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    with pytest.raises(DataError, match="disk is full"):
        write_json(tmp_path / "file.json", {})
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with staged_folder(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with pytest.raises(DataError, match="another process"), staged_folder(tmp_path / "out"):
            pytest.fail("the second writer got in")
        assert (first / "a").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_file(path, fail)
    assert path.read_text() == '{\n  "old": 1\n}\n' and len(list(tmp_path.iterdir())) == 1


def test_overwrite_replaces_no_folder_of_another_kind(tmp_path):
    for content in ({"kind": "sft run"}, {"format": 1}, {"protocol": "loo"}, {"kind": "report"}):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "manifest.json").write_text(json.dumps(content))
        if content == {"kind": "report"}:
            with staged_folder(out, kind="report", overwrite=True) as staging:
                (staging / "new").touch()
            assert (out / "new").exists()
            continue
        with (
            pytest.raises(DataError, match="does not replace by a report"),
            staged_folder(out, kind="report", overwrite=True),
        ):
            pytest.fail("it got in")
        assert json.loads((out / "manifest.json").read_text()) == content


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_overwrite_replaces_only_what_recllm_made(tmp_path, kind):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    out = {"folder": home, "file": home / "thesis.txt", "link": tmp_path / "link"}[kind]
    if kind == "link":
        out.symlink_to(home)
    for _ in range(2):
        with pytest.raises(DataError, match="was not made by recllm"), staged_folder(out, overwrite=True):
            pytest.fail("it got in")
    assert (home / "thesis.txt").read_text() == "years of work"


def test_overwrite_deletes_no_folder_that_another_command_made(tmp_path):
    """As when `recllm export RUN RUN/export` was run before the report or export around it is made again."""
    out = tmp_path / "out"
    for name in (".", "export", "last"):
        (out / name).mkdir(exist_ok=True, parents=True)
        (out / name / "manifest.json").write_text('{"kind": "report"}')
    with (
        pytest.raises(DataError, match="out holds export, last, made by other commands"),
        staged_folder(out, kind="report", overwrite=True),
    ):
        pytest.fail("it got in")
    with pytest.raises(DataError, match="out holds export, made by other commands"):
        refuse_nested(out, own=("last",))
    assert (out / "export" / "manifest.json").exists()


def test_a_kill_between_the_two_renames_of_a_disk_that_cannot_swap_loses_neither_folder(
    tmp_path, monkeypatch
):
    out = tmp_path / "out"
    write_json(out / "manifest.json", {})
    (out / "file").write_text("old")
    monkeypatch.setattr(recllm.files.ctypes, "CDLL", lambda *_, **__: object())
    rename = Path.rename

    def killed(path: Path, target: Path) -> None:
        if target == out:
            monkeypatch.setattr(recllm.files.shutil, "rmtree", lambda *_, **__: None)  # it cannot clear up
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        with staged_folder(out, overwrite=True) as staging:
            (staging / "file").write_text("new")
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(DataError, match="exists already"), staged_folder(out):
        pytest.fail("it got in")
    assert (out / "file").read_text() == "old"
    with staged_folder(out, overwrite=True) as staging:
        (staging / "file").write_text("new")
    assert (out / "file").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "real")
    with pytest.raises(DataError, match="cannot be written"), staged_folder(tmp_path / "out"):
        pytest.fail("it got in")
    assert (tmp_path / "real" / "file").exists()


def test_a_failed_write_leaves_no_new_folders(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_plain_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"), staged_folder(tmp_path / "file" / "out"):
        pytest.fail("it got in")
    with pytest.raises(DataError, match="cannot be written"):
        write_json(tmp_path / "file" / "out.json", {})
