"""The quickstart: every command of its chain is one that works by hand, and it goes on where it was."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from recllm import quickstart as chain
from recllm.cli import COMMANDS
from recllm.config import parse_config
from recllm.errors import DataError
from recllm.quickstart import QuickstartOptions, Step, quickstart
from recllm.training.options import SFTOptions


def steps(**options) -> list[Step]:
    return list(chain._steps(QuickstartOptions(**options)))


def test_every_step_is_a_command_that_parses():
    names = []
    for step in steps(users=33, items=177, seed=5, max_steps=9):
        words = list(step.words)
        if words[0] == "accelerate":
            script = words.index("--config") - 1
            options = parse_config(SFTOptions, words[script + 1 :])
            assert Path(words[script]).is_file() and Path(words[3]).is_file()
            assert (options.seed, options.max_steps, options.resume) == (5, 9, "auto")
            assert options.method == "qlora"
            continue
        name = next(" ".join(words[1:end]) for end in (4, 3, 2) if " ".join(words[1:end]) in COMMANDS)
        module, config, _, _ = COMMANDS[name]
        parse_config(getattr(importlib.import_module(module), config), words[1 + len(name.split()) :])
        names.append(name)
    assert names[0] == "data toyworld" and "score yes-no" in names and "report" in names


def test_what_is_there_is_not_made_again_and_a_failure_names_its_step(tmp_path, monkeypatch, capsys):
    ran = []

    def run(step, folder):
        if len(ran) == 3:
            raise DataError("broken")
        ran.append(step.makes)
        (folder / step.makes).mkdir(parents=True)

    monkeypatch.setattr(chain, "_run", run)
    with pytest.raises(DataError, match="broken"):
        quickstart(QuickstartOptions(tmp_path))
    ran.append("mended")
    assert quickstart(QuickstartOptions(tmp_path)) == tmp_path / "report" / "report.html"
    made = [step.makes for step in steps()]
    assert [each for each in ran if each != "mended"] == made
    assert capsys.readouterr().out.count("is there already") == 3


def test_a_failing_command_ends_the_chain_with_its_name(tmp_path, monkeypatch):
    bad = Step("a step that cannot work", ("recllm", "data", "inspect", "nowhere"), "never")
    monkeypatch.setattr(chain, "_steps", lambda options: iter([bad]))
    with pytest.raises(DataError, match="'a step that cannot work' failed with status 1"):
        quickstart(QuickstartOptions(tmp_path))


@pytest.mark.parametrize("option", ["users", "items", "max_steps"])
def test_numbers_that_make_no_world_are_refused(tmp_path, option):
    with pytest.raises(DataError, match=f"--{option.replace('_', '-')} 0"):
        quickstart(QuickstartOptions(tmp_path, **{option: 0}))


def test_a_folder_of_other_options_or_of_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "_steps", lambda options: iter(()))
    quickstart(QuickstartOptions(tmp_path / "mine", seed=1))
    quickstart(QuickstartOptions(tmp_path / "mine", seed=1))
    with pytest.raises(DataError, match=r"was begun with .*--seed 1.*give the same"):
        quickstart(QuickstartOptions(tmp_path / "mine"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("other", "file"):
        with pytest.raises(DataError, match="no quickstart's"):
            quickstart(QuickstartOptions(tmp_path / name))
