"""The world of the report's tests, and one full report of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from recllm.report.text import REPLACEMENT
from tests.report.worlds import World, make_world

HOSTILE = (
    "<script>alert(1)</script>",
    r"$\frac{1}{2$ \input{x}",
    "x" * 10_000,
    "\u202egnp.exe\u2066 \x00\x1b[31m\u200f",
    '" onmouseover="alert(1)" x="',
    "]]></svg><img src=x onerror=alert(1)>",
    "a" + "\u0300" * 500,
    "<!-- --><style>*{display:none}</style>",
    "http://example.com/?q=<b>&amp;",
    "_hidden",
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An ordinary world."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def full(world: World) -> Path:
    """A report with everything in it."""
    first, second, third = (
        world.scores("good", 3.0),
        world.scores("fair", 1.0, seed=1),
        world.scores("plain", 0.0, seed=2, probability=False),
    )
    return world.report(
        *(first, second, third, world.run()),
        out="full",
        resamples=2000,
        dataset=world.dataset,
        instructions=world.instructions,
        ablation=(f"image={second}", f"text={third}", f"both={first}"),
    )


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose titles, users, systems, runs and texts all try to break out."""
    names = {code: text.replace("\x00", "") for code, text in enumerate(HOSTILE * 6)}
    users = {
        code: f"{text}{code}"[:400] for code, text in enumerate(HOSTILE[:2] + HOSTILE[4:] + HOSTILE[3:4])
    }
    world = make_world(tmp_path_factory.mktemp("hostile"), titles=names, user_ids=users)
    files = [
        world.scores(f"s{place}", 1.0, seed=place, system=text.replace("\x00", "") + str(place))
        for place, text in enumerate(HOSTILE)
    ]
    bad = (
        '{"step": 1, "loss": 0.5, "<script>": 1}\n{"step": 2, "loss": NaN}\n{"step": "$x$", "loss": 1e400}\n'
    )
    run = world.run("<script>alert(2)<-script>", **{"log.jsonl": bad})
    return world.report(
        *(*files, run),
        dataset=world.dataset,
        instructions=world.instructions,
        examples=30,
        title=HOSTILE[0] + HOSTILE[3] + REPLACEMENT,
        ablation=(f"{HOSTILE[0]}={files[0]}", f"{HOSTILE[1]}={files[1]}"),
    )
