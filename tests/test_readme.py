"""The README tells the truth: its commands parse, its files exist, its tables are those of results/."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.cli import COMMANDS, main
from recllm.config import parse_config
from recllm.training.options import SFTOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_lines() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(recllm [^`]*?)`", README)
    return [line for line in lines if line] + [" ".join(line.split()) for line in inline]


def test_every_command_in_the_readme_parses():
    parsed = set()
    for line in shell_lines():
        words = shlex.split(line)
        if words[:2] == ["accelerate", "launch"] and "recipes/sft.py" in words and "..." not in words:
            parse_config(SFTOptions, words[words.index("recipes/sft.py") + 1 :])
        if words[0] != "recllm" or "--help" in words or "..." in words:
            continue
        command = next(
            (" ".join(words[1:end]) for end in (4, 3, 2) if " ".join(words[1:end]) in COMMANDS), None
        )
        if any(
            known == " ".join(words[1:]) or known.startswith(" ".join(words[1:]) + " ") for known in COMMANDS
        ):
            continue  # only the beginning of a command, in running text
        assert command is not None, line
        module, options, _, _ = COMMANDS[command]
        parse_config(getattr(importlib.import_module(module), options), words[1 + len(command.split()) :])
        parsed.add(command)
    assert len(parsed) >= 10


def test_every_file_that_the_readme_names_exists():
    named = set(re.findall(r"(?:data_builders|eval|benchmarks|recllm)/[\w/.]+\.py", README))
    assert len(named) >= 2
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("tables")
    assert tables.with_tables(README) == README, "README.md and results/ disagree; run `make tables`"


MEASURED = sorted(set((ROOT / "results").glob("*.json")) - {ROOT / "results" / "published.json"})


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_results_explain_themselves(path):
    result = json.loads(path.read_text())
    assert result["run"]["command"] and result["run"]["packages"] and result["figures"]
    assert "cores" in result["machine"]


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    """On the toy world, with random vectors: what it writes goes into one table with popularity."""
    monkeypatch.chdir(tmp_path)
    for line in (
        "data toyworld --users 60 --items 100 shop",
        "data split shop loo",
        "data candidates shop/splits/loo",
    ):
        main(line.split())
    Path("ml5").symlink_to("shop")
    Path("toys").symlink_to("shop")
    rng = np.random.default_rng(0)
    own_system, _, rankers, library = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    Path("scores").mkdir()
    exec(own_system, {"my_model": lambda pairs: rng.random(len(pairs)), "pl": pl})
    exec(library, {"user_vectors": rng.random((60, 4)), "item_vectors": rng.random((100, 4))})
    exec(rankers, {})
    main(["score", "popularity", "shop/splits/loo"])
    file = "shop/splits/loo/candidates/1+20-uniform-seed42/test.parquet"
    capsys.readouterr()
    main(["eval", "ranks", "scores/mine.parquet", "--candidates", file])
    main(["eval", "compare", "ranks/mine.parquet", "ranks/popularity.parquet"])
    told = capsys.readouterr().out
    assert "loo/1+20-uniform-seed42" in told and "loo/full/mask-seen" in told


def test_the_notebook_in_the_readme_runs(tmp_path, capsys, tiny_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["data", "toyworld", "--users", "30", "--items", "60", "toys"])
    (notebook,) = [
        each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "InProcessBackend" in each
    ]
    exec(notebook, {})
    assert "The image shows a" in capsys.readouterr().out
