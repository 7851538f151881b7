"""Commands that are run one after the other, each in a process of its own, as a user would by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recllm.errors import DataError

_PROGRAMS = {
    "recllm": ("-m", "recllm.cli"),
    "accelerate": ("-m", "accelerate.commands.accelerate_cli"),
    "python": (),
}


@dataclass(frozen=True)
class Step:
    """One command of a chain.

    Attributes:
        about: What it does, for the log.
        words: The command line; its first word is `recllm`, `accelerate` or `python`.
        makes: What exists once it is done, relative to the working folder.
    """

    about: str
    words: tuple[str, ...]
    makes: str


def run_step(step: Step, folder: Path, *, again: str) -> None:
    """Runs a command and waits for its end.

    Args:
        step: The step.
        folder: The working folder.
        again: What the user runs again once the cause of a failure is mended.

    Raises:
        DataError: It failed; what it said is above the message.
    """
    command = [sys.executable, *_PROGRAMS[step.words[0]], *step.words[1:]]
    try:
        subprocess.run(command, cwd=folder, env=_environment(), check=True)
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"the step {step.about!r} failed with status {error.returncode}; what it said stands above. "
            f"Once mended, {again} goes on from there"
        ) from None


def _environment() -> dict[str, str]:
    """The environment, with a checkout that recllm was imported from in reach of the steps.

    Threads are named because `accelerate launch` warns where they are not.
    """
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = str(len(os.sched_getaffinity(0)))
    return {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
