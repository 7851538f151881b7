"""Configuration: flags over YAML over defaults; unknown keys and wrong types are errors that say which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from recllm.config import parse_config
from recllm.errors import DataError


@dataclass
class Example:
    """An example."""

    source: Positional[Path]
    """Where from."""
    learning_rate: float = 1e-3
    """The rate."""
    mode: Literal["fast", "exact"] = "exact"
    """The mode."""
    ks: tuple[int, ...] = (5, 10)
    """Cutoffs."""
    ratios: tuple[float, float] = (8, 1)
    """Shares."""
    limit: int | None = None
    """How many."""
    strict: bool = False
    """Fail early."""


def parse(tmp_path: Path, yaml: str, *flags: str) -> Example:
    (tmp_path / "c.yaml").write_text(yaml)
    return parse_config(Example, ["--config", str(tmp_path / "c.yaml"), *flags])


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    config = parse(tmp_path, "learning_rate: 2\nks: [1, 2]\nstrict: true\n", "here", "--learning-rate", "0.5")
    assert config == Example(Path("here"), 0.5, "exact", (1, 2), strict=True)
    assert parse(tmp_path, "ratios: [1, 2.5]", "here").ratios == (1.0, 2.5)
    assert parse(tmp_path, "source: there\nlimit: 3").limit == 3
    assert parse(tmp_path, "", "here") == Example(Path("here"))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("learning_rat: 1", r"unknown key 'learning_rat'; the nearest known key is 'learning_rate'"),
        ("learning_rate: fast", r"learning_rate: 'fast' is not of type float"),
        ("strict: 1", r"strict: 1 is not of type bool"),
        ("limit: true", r"limit: True is not of type int \| None"),
        ("mode: slow", r"mode: 'slow' is not of type"),
        ("ks: 5", r"ks: 5 is not of type"),
        ("ratios: [1]", r"ratios: \[1\] is not of type"),
        ("ratios: [1, 2, 3]", r"ratios: \[1, 2, 3\] is not of type"),
        ("- a", r"expected `key: value` lines"),
        ("a: [", r"not readable as YAML"),
        ("a: !!python/object/apply:os.system ['true']", r"not readable as YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path, yaml, message):
    with pytest.raises(DataError, match=message):
        parse(tmp_path, yaml, "here")


def test_a_missing_file_and_a_missing_name_are_errors(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        parse_config(Example, ["here", f"--config={tmp_path / 'none.yaml'}"])
    with pytest.raises(DataError, match="needs a YAML file"):
        parse_config(Example, ["here", "--config"])


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Example, ["here", "--learning-rat", "1"])
    assert stop.value.code == 2 and "--learning-rate" in capsys.readouterr().err
