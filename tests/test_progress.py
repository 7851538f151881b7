"""Without a terminal, long work prints a line now and then; short work prints nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from recllm import progress
from recllm.progress import Progress


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.05)


def test_a_line_has_what_is_done_of_how_many_the_rate_and_the_time_left(
    often: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress(desc="tokens", total=2000, unit="row", initial=500) as bar:
        bar.update(500)
        time.sleep(0.2)
        bar.update(1000)
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"tokens: 1,000 of 2,000 rows, 0 s so far, [\d,]+ a second, about 0 s left", lines[0])
    assert lines[-1] == "tokens: 2,000 rows in 0 s"


def test_one_long_step_is_not_silent(often: None, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in Progress(["only"], "encoding", 1, unit="image"):
        time.sleep(0.2)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "encoding: 0 of 1 image, 0 s so far"
    assert lines[-1] == "encoding: 1 image in 0 s"


def test_bytes_are_megabytes_and_an_unknown_total_is_left_out(
    often: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with Progress(desc="log.csv", total=4_000_000, unit="B") as bar, Progress(unit="row") as other:
        bar.update(1_000_000)
        other.update(3)
        time.sleep(0.2)
    told = capfd.readouterr().err
    assert re.search(r"^log\.csv: 1\.0 of 4\.0 MB, .*MB a second", told, re.MULTILINE)
    assert re.search(r"^progress: 3 rows, ", told, re.MULTILINE)


@pytest.mark.parametrize("disable", [False, True])
def test_short_or_disabled_work_prints_nothing(disable: bool, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(iter("ab"), "work", 2, disable=disable)) == ["a", "b"]
    assert capfd.readouterr() == ("", "")


def test_an_error_ends_the_lines(often: None, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Progress(desc="work", total=2) as bar:
        1 / bar.n
    capfd.readouterr()
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_a_program_ends_although_a_bar_was_never_closed() -> None:
    program = "from recllm.progress import Progress\nbar = Progress(desc='work', total=2)\nbar.update()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
