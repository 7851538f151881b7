"""Runs with AVL as a user has them: the same without effect, resumed, and shared by two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recllm.data.splits import Split, SplitOptions, make_split
from recllm.files import read_json
from recllm.rankers.saving import LAST, STATE
from recllm.runs.log import read_log
from tests.rankers.test_runs import ITEMS, farthest, launched, recipe, train, write_log

NUMBERS = ("avl_k", "avl_k_min", "avl_k_max", "avl_gap", "avl_reference", "avl_loss_image", "avl_loss_text")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    dataset = write_log(tmp_path_factory.mktemp("log") / "data")
    return make_split(dataset, SplitOptions(dataset.folder, "loo"))


@pytest.fixture(scope="module")
def features(split: Split) -> list[str]:
    """Flags of vectors of texts and images."""
    random, flags = torch.Generator().manual_seed(0), []
    for name, width in (("text", 8), ("image", 6)):
        path = split.folder / f"{name}.safetensors"
        save_file({f"i{item}": torch.randn(width, generator=random) for item in range(ITEMS)}, path)
        flags += [f"--{name}", str(path)]
    return flags


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Weights are equal to the bit between equal numbers of threads; processes that tests start have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(split: Split, out: Path, *flags: str, ranker: str = "m3srec") -> Path:
    done = train(split, out, *flags, ranker=ranker)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("ranker", "forms"), [("hm4sr", ["updates"]), ("vbpr", ["gradients", "updates", "two-sided"])]
)
def test_with_alpha_0_a_run_is_the_same_to_the_bit(
    split: Split, features: list[str], ranker: str, forms: list[str], tmp_path: Path
):
    plain = trained(split, tmp_path / "plain", *features, "--epochs", "2", ranker=ranker)
    expected = load_file(plain / LAST / STATE)
    for form in forms:
        flags = (*features, "--epochs", "2", "--avl", form, "--avl-alpha", "0")
        found = load_file(trained(split, tmp_path / form, *flags, ranker=ranker) / LAST / STATE)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        log = read_log(tmp_path / form / "log.jsonl")
        assert all(line["avl_k_min"] == line["avl_k_max"] == 1 for line in log)
        assert [line["loss"] for line in log] == [
            line["loss"] for line in read_log(tmp_path / "plain" / "log.jsonl")
        ]
    assert not any(name.startswith("avl") for line in read_log(plain / "log.jsonl") for name in line)


@pytest.mark.parametrize("form", ["gradients", "updates"])
def test_an_interrupted_run_ends_as_one_that_was_left_alone(
    split: Split, features: list[str], form: str, tmp_path: Path
):
    flags = [*features, "--avl", form, "--avl-alpha", "1", "--avl-mean", "ema", "--avl-decay", "0.95"]
    flags += ["--patience", "1000"]
    whole = trained(split, tmp_path / "whole", *flags, "--epochs", "3")
    cut = trained(split, tmp_path / "cut", *flags, "--epochs", "2")
    assert read_json(cut / LAST / "manifest.json", "")["plugin"]["avl"]["steps"] > 1
    other = train(split, cut, *features, "--epochs", "3", "--resume", "auto", ranker="m3srec")
    assert other.returncode == 1 and f"avl: {form} then, None now" in other.stderr
    trained(split, cut, *flags, "--epochs", "3", "--resume", "auto")
    assert farthest(whole, cut) == 0
    logs = [read_log(path / "log.jsonl") for path in (whole, cut)]
    assert len(logs[0]) == 3
    for one, two in zip(*logs, strict=True):
        assert [one[name] for name in NUMBERS] == [two[name] for name in NUMBERS]
        assert one["avl_k_min"] < one["avl_k"] < one["avl_k_max"]


def test_two_processes_train_as_one_does(split: Split, features: list[str], tmp_path: Path):
    """Each has other rows, so that losses which were not averaged would give each another K."""
    flags = [*features, "--epochs", "3", "--batch-size", "15", "--dropout", "0", "--avl", "gradients"]
    flags += ["--avl-alpha", "2"]
    one = trained(split, tmp_path / "one", *flags)
    two = launched(2, *recipe(split, tmp_path / "two", *flags, ranker="m3srec"))
    assert two.returncode == 0, two.stderr[-2000:]
    assert farthest(one, tmp_path / "two") < 2e-4
    logs = [read_log(path / "log.jsonl") for path in (one, tmp_path / "two")]
    for line, other in zip(*logs, strict=True):
        assert np.allclose([line[name] for name in NUMBERS], [other[name] for name in NUMBERS], rtol=1e-4)
    assert logs[0][-1]["avl_k_max"] - logs[0][-1]["avl_k_min"] > 1e-3
