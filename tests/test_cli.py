"""The real commands in subprocesses: a stranger's five commands, messages, and what is imported when."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from recllm.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path, script: str | None = None) -> subprocess.CompletedProcess:
    start = [sys.executable, str(ROOT / script)] if script else [sys.executable, "-m", "recllm.cli"]
    return subprocess.run([*start, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def succeed(*arguments: str, cwd: Path, script: str | None = None) -> str:
    done = run(*arguments, cwd=cwd, script=script)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def strangers_folder(tmp_path: Path) -> Path:
    """A CSV of (user, item, time) and a folder of images, as somebody brings them."""
    rng = np.random.default_rng(0)
    users, items = np.divmod(rng.permutation(80 * 50)[:1500], 50)
    rows = [
        f"{user},{item},2024-03-{1 + row % 28:02d} 12:00:00"
        for row, (user, item) in enumerate(zip(users, items, strict=True))
    ]
    (tmp_path / "log.csv").write_text("person,product,time\n" + "\n".join(rows) + "\n")
    (tmp_path / "photos").mkdir()
    for item in range(40):
        Image.new("RGB", (8, 8), (item, 0, 0)).save(tmp_path / "photos" / f"{item}.jpg")
    return tmp_path


def test_five_commands_from_a_csv_and_images_to_metrics(strangers_folder):
    columns = ("--user", "person", "--item", "product", "--timestamp", "time", "--images", "photos")
    told = succeed("data", "import", "table", "log.csv", "shop", *columns, cwd=strangers_folder)
    assert "80 users, 50 items, 1,500 interactions" in told and "40 with image" in told
    told = succeed("data", "split", "shop", "loo", cwd=strangers_folder)
    assert "protocol loo" in told and "models can learn from the future" in told
    succeed("data", "candidates", "shop/splits/loo", "--negatives", "9", cwd=strangers_folder)
    name = "1+9-uniform-seed42"
    told = succeed("score", "popularity", "shop/splits/loo", "--candidates", name, cwd=strangers_folder)
    assert "next: recllm eval ranks scores/popularity.parquet" in told
    file = f"shop/splits/loo/candidates/{name}/test.parquet"
    told = succeed(
        "eval",
        "ranks",
        "scores/popularity.parquet",
        "--candidates",
        file,
        "--out",
        "report",
        cwd=strangers_folder,
    )
    assert f"loo/{name}" in told and "ndcg@10" in told and "tie rate" in told
    metrics = json.loads((strangers_folder / "report" / "metrics.json").read_text())
    assert f"loo/{name}" in json.dumps(metrics)
    assert {path.name for path in (strangers_folder / "report").iterdir()} == {
        "metrics.json",
        "metrics.csv",
        "metrics.tex",
    }


def test_the_same_by_scripts_and_with_the_whole_catalog(strangers_folder):
    columns = ("--user", "person", "--item", "product", "--timestamp", "time")
    succeed(
        "table", "log.csv", "shop", *columns, cwd=strangers_folder, script="data_builders/import_dataset.py"
    )
    succeed("data", "split", "shop", "temporal", cwd=strangers_folder)
    succeed("score", "popularity", "shop/splits/temporal-8-1-1", cwd=strangers_folder)
    told = succeed("ranks/popularity.parquet", cwd=strangers_folder, script="eval/rank_report.py")
    assert "temporal-8:1:1/full/mask-seen" in told
    records = pl.read_parquet(strangers_folder / "ranks" / "popularity.parquet")
    assert records.columns[:5] == ["user", "item", "above", "tied", "n"]


def test_filter_inspect_and_toyworld(tmp_path):
    told = succeed(
        "data", "toyworld", "--users", "60", "--items", "120", "--seed", "3", "world", cwd=tmp_path
    )
    assert "60 users, 120 items" in told and "120 with image" in told
    told = succeed("data", "filter", "world", "core", "--min-rating", "4", "--item-core", "2", cwd=tmp_path)
    assert "rated below 4" in told
    told = succeed("data", "inspect", "core", cwd=tmp_path)
    assert "items.parquet" in told and "profile" in told


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("data", "import", "table", "none.csv", "out"), 1, "none.csv"),
        (("data", "split", "nowhere", "loo"), 1, "is not a recllm dataset"),
        (("data", "splitt", "x", "loo"), 2, "the nearest is 'data split'"),
        (("data", "split", "x", "leave-one-out"), 2, "loo"),
        (("score", "popularity", "nowhere"), 1, "is not a split"),
        (("data", "import"), 2, "recllm data import movielens"),
    ],
)
def test_errors_are_one_message_without_a_traceback(tmp_path, arguments, status, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_help_lists_every_command_and_each_command_has_help(tmp_path):
    told = succeed("--help", cwd=tmp_path)
    assert all(f"recllm {words} " in told for words in COMMANDS)
    for words in COMMANDS:
        assert "--help" in succeed(*words.split(), "--help", cwd=tmp_path)


def test_importing_recllm_is_light():
    code = (
        "import time, sys; start = time.perf_counter(); import recllm; spent = time.perf_counter() - start;"
        "heavy = {'torch', 'polars', 'numpy', 'scipy', 'evaluate', 'tyro'} & set(sys.modules);"
        "assert spent < 1 and not heavy, (spent, heavy)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["recllm.data", "recllm.evaluation", "recllm.data.commands"])
def test_data_and_evaluation_do_not_load_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'evaluate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
