"""Pictures of the toy world: what a look at their pixels tells."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from recllm.data.toyworld import COLORS, PATTERNS, SHAPES, render
from recllm.data.toyworld.images import NOMINAL_RGB
from recllm.errors import DataError


def measure(picture: Image.Image) -> tuple[str, str, str]:
    """Reads color, pattern and shape by simple pixel statistics, without knowing how pictures are drawn."""
    filled = picture.copy()
    ImageDraw.floodfill(filled, (0, 0), (255, 0, 255), thresh=30)
    inside = (np.asarray(filled) != (255, 0, 255)).any(axis=2)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cover = box.mean()
    shape = "square" if cover > 0.9 else "circle" if cover > 0.7 else "triangle" if cover > 0.45 else "star"
    core = inside.copy()
    for _ in range(3):  # away from the outline
        core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    pixels = np.asarray(picture).astype(float)
    lightness = pixels.min(axis=2)
    light = core & (lightness > 170)
    tone = np.median(pixels[core & (lightness < 120)], axis=0)
    color = min(COLORS, key=lambda name: np.abs(tone - NOMINAL_RGB[name]).sum())
    share = light.sum() / core.sum()
    down, right = np.gradient(lightness)
    xx, yy, xy = ((right * right)[core].sum(), (down * down)[core].sum(), (right * down)[core].sum())
    one_direction = np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-9)  # 1: all edges are parallel
    pattern = "plain" if share < 0.03 else "striped" if one_direction > 0.5 else None
    return color, pattern or ("dotted" if share < 0.33 else "checked"), shape


def test_pictures_show_what_they_are_said_to_show() -> None:
    rng = np.random.default_rng(0)
    wrong: Counter[tuple[str, str]] = Counter()
    for look in itertools.product(COLORS, PATTERNS, SHAPES):
        for _ in range(3):
            read = measure(render(*look, rng))
            wrong.update((said, seen) for said, seen in zip(look, read, strict=True) if said != seen)
    assert not wrong


def test_pictures_vary_fit_and_repeat() -> None:
    for shape in SHAPES:
        pictures = [render("black", "plain", shape, np.random.default_rng(seed)) for seed in range(60)]
        assert len({picture.tobytes() for picture in pictures}) == 60
        assert render("black", "plain", shape, np.random.default_rng(7)).tobytes() == pictures[7].tobytes()
        for picture in pictures:
            assert picture.size == (56, 56) and picture.mode == "RGB"
            pixels = np.asarray(picture)
            border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert border.min() > 200, "a shape is cut off by the edge of its picture"
    assert render("red", "striped", "star", np.random.default_rng(0), size=112).size == (112, 112)


@pytest.mark.parametrize(
    "look", [("pink", "plain", "star"), ("red", "wavy", "star"), ("red", "plain", "cube")]
)
def test_unknown_words_cannot_be_drawn(look: tuple[str, str, str]) -> None:
    with pytest.raises(DataError, match="cannot draw"):
        render(*look, np.random.default_rng(0))


def test_tiny_pictures_are_refused() -> None:
    with pytest.raises(DataError, match="at least 28"):
        render("red", "plain", "star", np.random.default_rng(0), size=8)
