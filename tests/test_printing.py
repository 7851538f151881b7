"""Text from data on a terminal, and words of YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recllm.config import parse_config
from recllm.data import commands
from recllm.errors import DataError
from recllm.printing import printable
from tests.data.imports import put, take


def test_control_sequences_are_shown_and_not_sent() -> None:
    assert printable("\x1b]0;owned\x07 \u202eevil\u00e9\n") == "\\x1b]0;owned\\x07 \\u202eevil\u00e9\n"
    assert "\x1b" not in str(DataError("user \x1b[31m"))


def test_inspect_and_import_escape_titles(tmp_path: Path, capsys) -> None:
    items = put(tmp_path / "items.csv", 'item,title,\x1b[1mcol\ni1,"\x1b]0;owned\x07red",x\ni2,ok,y\n')
    log = put(tmp_path / "log.csv", "user,item\nu1,i1\nu1,i2\nu\x1b[2J,i1\nbad\x1b[31m\n")
    dataset, findings = take(log, items_file=items)
    commands.inspect(commands.InspectOptions(dataset.folder))
    shown = capsys.readouterr().out + "\n".join(findings.lines())
    assert "\x1b" not in shown and "\\x1b]0;owned\\x07red" in shown
    assert "\x1b]0;owned\x07red" in dataset.items["title"].to_list()


@dataclass
class Answers:
    """Answers."""

    yes: tuple[str, ...] = ("Yes",)
    """Forms of yes."""
    no: tuple[str, ...] = ("No",)
    """Forms of no."""
    fast: bool = False
    """Whether."""
    extra: dict[str, str] = field(default_factory=dict)
    """More."""


def test_yes_and_no_are_words_in_yaml(tmp_path: Path) -> None:
    path = put(tmp_path / "a.yaml", "yes: [yes, Yes]\nno: [no, off]\nfast: true\n")
    options = parse_config(Answers, ["--config", str(path)])
    assert (options.yes, options.no, options.fast) == (("yes", "Yes"), ("no", "off"), True)
