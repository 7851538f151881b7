"""What the `recllm score ...` commands have in common: the candidates they read, the files they may write."""

from __future__ import annotations

from pathlib import Path

from recllm.errors import DataError


def check_top_k(top_k: int, *, full: bool) -> None:
    """Raises a `DataError` where --top-k is negative, or asked for without full ranking."""
    if top_k < 0:
        raise DataError(f"--top-k {top_k}: expected 0 (none) or more")
    if top_k and not full:
        raise DataError("--top-k lists the best of the whole catalog; leave out --candidates")


def check_absent(*paths: Path, overwrite: bool) -> None:
    """Raises a `DataError` where a file exists and may not be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists already; give another --out, or --overwrite to replace it")


def check_word(flag: str, value: str) -> None:
    """Raises a `DataError` where what becomes part of a file's name is no plain word."""
    if Path(value).name != value or value.startswith(".") or "\0" in value:
        raise DataError(f"{flag} {value!r}: expected a plain word, which is part of a file's name")


def tell_stage(ranks: Path, lists: Path) -> None:
    """Prints what `recllm score ... --top-k` has written, and what comes next."""
    print(f"{ranks}: rank records; next: recllm eval ranks {ranks}")
    print(f"{lists}: top-K lists; next: recllm build instructions DATASET --top-k {lists} --parts PART")
