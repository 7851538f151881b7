"""The README tells the truth: its commands parse, its files exist, its tables are those of results/."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from recllm.cli import COMMANDS
from recllm.config import parse_config

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
        if words[0] != "recllm" or "--help" in words or "..." in words:
            continue
        command = next((" ".join(words[1:end]) for end in (4, 3) if " ".join(words[1:end]) in COMMANDS), None)
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


def test_the_tables_are_made_from_the_results():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.with_tables(README) == README, "README.md and results/ disagree; run `make tables`"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.name)
def test_results_explain_themselves(path):
    result = json.loads(path.read_text())
    assert result["run"]["command"] and result["run"]["packages"] and result["figures"]
    assert "cores" in result["machine"]
