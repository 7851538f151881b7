"""Every GRPO config is one that the recipe takes, and the command in its header is one that can be given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recllm.config import parse_config
from recllm.training.grpo.options import GRPOOptions
from tests.training.test_sft_configs import MODELS

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("keywords.yaml"))
BANNERS = [
    "Model",
    "Data",
    "Rewards",
    "Method",
    "Policy optimization",
    "Optimization",
    "Validation",
    "Output",
]


def test_there_is_one_for_each_model():
    assert [path.parent.name for path in CONFIGS] == sorted(MODELS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_it_is_taken_with_the_command_in_its_header(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    header = text.split("\n\n")[0].splitlines()
    (command,) = (line.removeprefix("#").strip() for line in header if "accelerate launch" in line)
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "--config_file"] and Path(words[3]).is_file()
    assert words[4] == "recipes/grpo.py"
    (override,) = (line.removeprefix("#").strip() for line in header if re.match(r"#\s+--", line))
    for flags in (words[5:], [*words[5:], *shlex.split(override)]):
        options = parse_config(GRPOOptions, flags)
        assert options.model == MODELS[path.parent.name]
        assert options.dataset is not None and options.reward_settings.weights
        assert options.batch_size * options.accumulation % options.group == 0
        assert (options.beta, options.epsilon_high, options.loss) == (0.04, 0.28, "dapo")
    assert path == ROOT / words[words.index("--config") + 1]
    assert re.findall(r"^# -- ([\w ]+?) -+$", text, re.MULTILINE) == BANNERS
    assert "computed" in text.split("# -- ")[0]
