"""Provenance: command, package versions and git revision, for every manifest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import recllm

_SCRIPTS = ("recipes", "eval", "data_builders", "benchmarks")
PACKAGES = ("numpy", "scipy", "polars", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def describe_run() -> dict[str, Any]:
    """Returns what made a file: command line, UTC time, versions, git revision."""
    return {
        "command": [_program(Path(sys.argv[0])), *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recllm": recllm.__version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _program(path: Path) -> str:
    """Returns what a user types for the program: `recllm`, or a script with its folder in the checkout."""
    if path.name == "cli.py" and path.parent.name == "recllm":
        return "recllm"
    return f"{path.parent.name}/{path.name}" if path.parent.name in _SCRIPTS else path.name


def describe_machine() -> str:
    """Returns the machine's kind in words, for measured figures: cores, vector instructions, memory."""
    from recllm.precision import vector_instructions

    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    cpu = f"{platform.machine()} ({vector_instructions()})"
    return f"{cores} cores, {cpu}, {gib:.0f} GiB memory, {platform.system()}"


def git_revision() -> str | None:
    """Returns the revision of the checkout recllm runs from (`+changes` where edited), else None."""
    folder = Path(recllm.__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        return revision + (
            "+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
