"""Every config is one that the recipe takes, and the command in its header is one that can be given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recllm.config import parse_config
from recllm.training.options import SFTOptions

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for path in (ROOT / "recipes" / "configs").rglob("*.yaml")
    if path.parent.name != "rankers" and path.stem != "keywords"
)
MODELS = {
    "tiny": "tiny",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}
BANNERS = ["Model", "Data", "Method", "Optimization", "Validation", "Output"]


def test_there_is_one_for_each_model_and_task():
    found = [str(path.relative_to(ROOT / "recipes" / "configs")) for path in CONFIGS]
    assert found == sorted(f"{model}/{task}.yaml" for model in MODELS for task in ("cot", "yes_no"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_is_taken_with_the_command_in_its_header(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    header = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    (command,) = (line.removeprefix("#").strip() for line in header if "accelerate launch" in line)
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert Path(words[3]).is_file()
    assert words[4] == "recipes/sft.py"
    (override,) = (line.removeprefix("#").strip() for line in header if re.match(r"#\s+--", line))
    for flags in (words[5:], [*words[5:], *shlex.split(override)]):
        options = parse_config(SFTOptions, flags)
        assert options.model == MODELS[path.parent.name]
        assert options.instructions is not None
    assert path == ROOT / words[words.index("--config") + 1]
    assert re.findall(r"^# -- (\w+) -+$", text, re.MULTILINE) == BANNERS
    assert "computed" in text.split("# -- ")[0]
