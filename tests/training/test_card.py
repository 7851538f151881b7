"""The model card: front matter that the hub reads, figures of the run, no markup from data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recllm.errors import DataError
from recllm.training.card import escaped, fenced, write_card

HOSTILE = "<script>alert(1)</script> | `x` ``` \n# [a](javascript:b) ![i](http://e) $x$"


def write_run(run: Path, **changes: Any) -> Path:
    """Writes what a card is made from."""
    settings = {
        "model": "Qwen/Qwen2-VL-2B-Instruct",
        "method": "qlora",
        "push_to_hub": None,
        "learning_rate": 2e-4,
    }
    manifest = {
        "kind": "sft run",
        "settings": {**settings, **changes.pop("settings", {})},
        "model": {"model": "Qwen/Qwen2-VL-2B-Instruct", "revision": "abc123"},
        "instructions": {"train": {"path": "shop/instructions/loo/train.parquet", "sha256": "f00d"}},
        "parts": [["vision tower", 665_000_000, 0], ["language model", 1_540_000_000, 18_000_000]],
        "run": {"command": ["sft.py", "--out", "runs/a b"], "recllm": "0.1.0", "packages": {"torch": "2.12"}},
        **changes,
    }
    metrics = {"best_step": 1200, "valid": {"auc": 0.87654, "ndcg@10": 0.61, "outside": 0.001}}
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def read_card(run: Path) -> tuple[dict[str, Any], str]:
    """Returns the front matter and the text."""
    _, head, text = (run / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_base_metrics_data_parts_settings_and_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "shop-yes-no")
    write_card(run)
    head, text = read_card(run)
    assert head["base_model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert head["library_name"] == "peft"
    assert {"recommendation", "lora"} <= set(head["tags"])
    for said in (
        "# shop-yes-no",
        "| AUC | 0.8765 |",
        "step 1200",
        "f00d",
        "| language model | 1,540,000,000 | 18,000,000 |",
        "learning_rate: 0.0002",
        "sft.py --out 'runs/a b'",
        "quantization='nf4'",
    ):
        assert said in text


def test_full_fine_tuning_is_a_model_of_its_own_and_a_local_base_is_not_linked(tmp_path: Path) -> None:
    local = {"model": "my-model", "fingerprint": "0123"}
    run = write_run(tmp_path / "run", settings={"method": "full", "model": "./my-model"}, model=local)
    write_card(run)
    head, text = read_card(run)
    assert head["library_name"] == "transformers"
    assert "base_model" not in head
    assert "PeftModel" not in text
    assert "fingerprint 0123" in text


def test_text_from_data_stays_text(tmp_path: Path) -> None:
    instructions = {"train": {"path": HOSTILE, "sha256": "f00d"}}
    run = write_run(
        tmp_path / "<b>run|", instructions=instructions, settings={"note": HOSTILE, "model": HOSTILE}
    )
    write_card(run)
    _, text = read_card(run)
    outside_code = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "alert" in outside_code
    assert "<" not in outside_code
    assert r"\[a\](javascript" in outside_code
    assert not re.search(r"(?<!\\)`", outside_code)
    tables = [line for line in outside_code.splitlines() if "f00d" in line or "alert" in line]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in tables)


def test_escaped_text_is_one_line_and_code_cannot_be_left() -> None:
    assert escaped("a\nb\x00\u202ec") == "a b c"
    block = fenced("before\n````\nafter\x1b[0m")
    assert block.startswith("`````\n")
    assert block.endswith("\n`````")
    assert "\x1b" not in block


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        write_card(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match="best_step"):
        write_card(run)
    assert not (run / "README.md").exists()
