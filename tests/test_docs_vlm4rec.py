"""The commands of docs/vlm4rec.md parse, its Python runs, and its files exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np

from recllm.cli import COMMANDS, main
from recllm.config import parse_config
from recllm.rankers.options import class_of_arguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/vlm4rec.md").read_text(encoding="utf-8")


def test_every_command_parses():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    assert len(lines) >= 15
    for line in lines:
        words = shlex.split(line)
        if words[0] == "accelerate":
            rest = words[words.index("recipes/train_ranker.py") + 1 :]
            rest[rest.index("--config") + 1] = str(ROOT / rest[rest.index("--config") + 1])
            assert parse_config(class_of_arguments(rest), rest).fusion == "attention"
            continue
        command = next(known for known in COMMANDS if line.startswith(f"recllm {known} "))
        module, options, *_ = COMMANDS[command]
        parse_config(getattr(importlib.import_module(module), options), words[1 + len(command.split()) :])


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).exists() for link in links)


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["data", "toyworld", "--users", "40", "--items", "60", "shop"])
    main(["data", "split", "shop", "loo"])
    np.save("vectors.npy", np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["items"].shape == (len(names["lists"].users), 100) and (names["items"] >= -1).all()
