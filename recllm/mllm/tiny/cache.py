"""Where the embedded model lives on disk: trained on first use, once, however many processes ask for it."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import orjson

from recllm.errors import DataError
from recllm.files import staged_folder, write_json
from recllm.mllm.tiny.architecture import SHAPES, Shape, save
from recllm.mllm.tiny.training import Course, train

_DECIDED_BY = ("torch", "transformers", "tokenizers", "numpy", "pillow")


def ensure(
    seed: int = 0,
    *,
    cache: Path | None = None,
    progress: bool = True,
    course: Course | None = None,
) -> Path:
    """Returns the folder of the embedded model, and trains it there where it is missing.

    A plain `save_pretrained` folder. Its name holds a hash of everything that decides the weights, so that a
    change of the lessons, of a prompt's wording or of torch trains another. While one process trains, others
    wait for it; a killed one leaves nothing behind that is taken for a model.

    Args:
        seed: 0 or more; decides weights, lessons and pictures.
        cache: Where models are kept; None for `$RECLLM_CACHE`, or else the user's cache folder.
        progress: Say what happens, and show a progress bar where there is a terminal.
        course: How it is trained; None for the usual course.

    Raises:
        DataError: The seed is negative, or the folder cannot be written.
    """
    if seed < 0:
        raise DataError(f"seed={seed}: expected 0 or more")
    course = Course() if course is None else course
    shape = SHAPES["tiny"]
    root = cache_folder() if cache is None else Path(cache)
    out = root / f"tiny-qwen2-vl-{fingerprint(seed, shape, course)}"
    if out.is_dir():
        return out
    with _alone(out, progress):
        if not out.is_dir():
            _train_into(out, seed, shape, course, progress)
    return out


def cache_folder() -> Path:
    """Returns `$RECLLM_CACHE`, or else `recllm` in the user's cache folder."""
    if chosen := os.environ.get("RECLLM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recllm"


def fingerprint(seed: int, shape: Shape, course: Course) -> str:
    """Returns 16 hex digits of everything that decides the weights: code, wordings, sizes, seed, versions."""
    from recllm.data.toyworld import images, words
    from recllm.mllm import chat
    from recllm.mllm.tiny import architecture, lessons, tokenizer, training
    from recllm.prompts import TEMPLATES, templates

    code = (images, words, chat, architecture, lessons, tokenizer, training, templates)
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in code if module.__file__]
    decided = {
        "seed": seed,
        "shape": shape,
        "course": course,
        "prompts": {name: template.text for name, template in TEMPLATES.items()},
        "code": [_without_prose(source) for source in sources],
        "versions": {name: version(name) for name in _DECIDED_BY},
    }
    return hashlib.sha256(orjson.dumps(decided, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _without_prose(source: str) -> str:
    """A module's statements: other comments, docstrings or line breaks train no other model."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [
                line
                for line in body
                if not (
                    isinstance(line, ast.Expr)
                    and isinstance(line.value, ast.Constant)
                    and isinstance(line.value.value, str)
                )
            ]
    return ast.dump(tree)


def _train_into(out: Path, seed: int, shape: Shape, course: Course, progress: bool) -> None:
    if progress:
        print(
            f"Training the embedded model into {out}: once, three to four minutes on two cores.",
            file=sys.stderr,
            flush=True,
        )
    started = time.monotonic()
    with staged_folder(out) as folder:
        model, processor, losses = train(seed, shape, course, progress=progress)
        save(model, processor, folder)
        tail = losses[-20:]
        write_json(
            folder / "manifest.json",
            {
                "kind": "embedded model",
                "seed": seed,
                "steps": course.looking + course.steps + course.comparing,
                "loss": round(sum(tail) / len(tail), 4),
                "seconds": round(time.monotonic() - started, 1),
                "versions": {name: version(name) for name in _DECIDED_BY},
            },
        )


@contextlib.contextmanager
def _alone(out: Path, progress: bool) -> Iterator[None]:
    """Holds the lock of `out`; the kernel drops it however its holder ends, so nobody waits for the dead."""
    path = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise DataError(
            f"{out.parent} cannot be written ({error.strerror}); set RECLLM_CACHE to a folder that can"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"Another process is training {out.name}; waiting for it.", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
