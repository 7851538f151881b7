"""Pictures of the toy world: one shape in one color with one pattern, on a light ground.

The three vocabularies are what a model can read off a picture and nowhere else in the catalog. Everything
that does not name the item (place, size, shade, stripe direction, ground) varies from picture to picture, so
a model has to see, and cannot recall pixels.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from recllm.errors import DataError

COLORS: tuple[str, ...] = ("red", "yellow", "green", "blue", "purple", "black")
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted", "checked")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")

NOMINAL_RGB: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "yellow": (242, 200, 24),
    "green": (40, 158, 70),
    "blue": (36, 96, 214),
    "purple": (140, 50, 170),
    "black": (44, 44, 48),
}
"""The color that the shades of a name vary around; far apart in hue, black in lightness."""

_LIGHT = (250, 250, 248)  # the second tone of every pattern
_OVERSAMPLING = 4  # drawn larger, then reduced: edges at 56 px stay smooth


def render(color: str, pattern: str, shape: str, rng: np.random.Generator, size: int = 56) -> Image.Image:
    """Draws one item.

    Args:
        color: One of `COLORS`.
        pattern: One of `PATTERNS`.
        shape: One of `SHAPES`.
        rng: Decides place, size, shade, stripe direction and ground; the same state gives the same picture.
        size: Width and height in pixels, at least 28.

    Returns:
        An RGB picture of `size` x `size` pixels.

    Raises:
        DataError: A word is not of its vocabulary, or `size` is too small to tell the patterns apart.
    """
    for word, words in ((color, COLORS), (pattern, PATTERNS), (shape, SHAPES)):
        if word not in words:
            raise DataError(f"the toy world cannot draw {word!r}; expected one of {', '.join(words)}")
    if size < 28:
        raise DataError(f"size={size}: pictures of the toy world need at least 28 pixels a side")
    side = size * _OVERSAMPLING
    unit = side / 56  # all lengths below are in pixels of a 56-pixel picture
    shade = rng.uniform(0.88, 1.08)
    tone = tuple(int(min(255, max(0, value * shade + rng.uniform(-6, 6)))) for value in NOMINAL_RGB[color])
    edge = tuple(int(value * 0.55) for value in tone)
    ground = tuple(int(value) for value in rng.uniform(222, 240) + rng.uniform(-5, 5, size=3))
    radius = rng.uniform(17.5, 20.5) * unit  # with the offset below, the tips of a star stay inside
    center = side / 2 + rng.uniform(-3.0, 3.0, size=2) * unit

    outline = _outline(shape, float(center[0]), float(center[1]), radius)
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    light = ImageChops.multiply(mask, _light_parts(pattern, side, unit, rng))
    picture = Image.new("RGB", (side, side), ground)
    picture.paste(tone, mask=mask)
    picture.paste(_LIGHT, mask=light)
    ImageDraw.Draw(picture).line([*outline, *outline[:2]], fill=edge, width=round(1.6 * unit), joint="curve")
    return picture.resize((size, size), Image.Resampling.BOX)


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points; scaled so that the shapes cover similar areas, and size does not give the shape away."""
    if shape == "circle":
        turns, radii = np.arange(72) / 72, np.full(72, 0.92 * radius)
    elif shape == "square":
        turns, radii = np.arange(4) / 4 + 0.125, np.full(4, 1.16 * radius)
    elif shape == "triangle":
        turns, radii = np.arange(3) / 3 - 0.25, np.full(3, 1.24 * radius)
        y += 0.22 * radius
    else:
        turns, radii = np.arange(10) / 10 - 0.25, radius * np.where(np.arange(10) % 2, 0.52, 1.22)
        y += 0.06 * radius
    angles = 2 * math.pi * turns
    return [(x + float(r * np.cos(a)), y + float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]


def _light_parts(pattern: str, side: int, unit: float, rng: np.random.Generator) -> Image.Image:
    """Where the second tone shows, over the whole picture; 8-bit mask."""
    phase = rng.uniform(0, 1, size=2)
    direction = rng.integers(4)
    rows, columns = np.mgrid[0:side, 0:side] / unit
    if pattern == "plain":
        light = np.zeros((side, side), dtype=bool)
    elif pattern == "striped":
        angle = math.pi * direction / 4
        along = columns * math.cos(angle) + rows * math.sin(angle)
        light = (along / 9 + phase[0]) % 1 < 0.45
    elif pattern == "dotted":
        right, down = (columns / 9.5 + phase[0]) % 1 - 0.5, (rows / 9.5 + phase[1]) % 1 - 0.5
        light = np.hypot(right, down) < 0.27
    else:
        light = (np.floor(columns / 6.5 + 2 * phase[0]) + np.floor(rows / 6.5 + 2 * phase[1])) % 2 == 0
    return Image.fromarray(np.where(light, np.uint8(255), np.uint8(0)))
