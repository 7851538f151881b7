"""The commands of docs/mmsrarec.md parse, and the files that they name exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from recllm.builders.options import InstructionOptions
from recllm.builders.tasks import TASKS
from recllm.cli import COMMANDS
from recllm.config import parse_config
from recllm.rankers.options import class_of_arguments
from recllm.training.options import SFTOptions

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "mmsrarec.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
LINES = [line for line in BLOCKS.split("\n") if line.strip()]


@pytest.mark.parametrize("line", LINES)
def test_each_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "accelerate":
        script = next(word for word in words if word.startswith("recipes/") and word.endswith(".py"))
        assert Path(script).exists() and Path(words[words.index("--config_file") + 1]).exists()
        rest = words[words.index(script) + 1 :]
        kind = SFTOptions if script.endswith("sft.py") else class_of_arguments(rest)
        assert parse_config(kind, rest)
        return
    command = " ".join(words[1:3])
    module, options, _, _ = COMMANDS[command]
    assert parse_config(getattr(importlib.import_module(module), options), words[3:])


def test_the_page_names_the_tasks_and_flags_that_exist():
    assert len(LINES) >= 8
    table = re.findall(r"^\| `(\w+)` \| [A-Z].*\? \|", PAGE, re.MULTILINE)
    assert table == list(TASKS)
    fields = InstructionOptions.__dataclass_fields__
    for name in ("history", "tasks", "keywords", "neighbors"):
        assert f"--{name}" in PAGE and name in fields
