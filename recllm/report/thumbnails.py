"""Images of a dataset as small JPEGs inside the page. A file from data is hostile: it is decoded, never
copied."""

from __future__ import annotations

import base64
import io
import warnings
from functools import lru_cache
from pathlib import Path

from recllm.data.image_files import is_plain_file
from recllm.report.text import escape

SIDE = 96
MAX_PIXELS = 100_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")


def thumbnail(folder: Path, relative: str | None, alt: str) -> str:
    """Returns an `<img>` of at most 96 x 96 pixels, or a box that says why there is none.

    Args:
        folder: The dataset folder, opened with validation: its image paths stay within it.
        relative: The image's path; None for an item without one.
        alt: What it shows, any text.
    """
    if relative is None:
        return '<span class="thumb">no image</span>'
    data, width, height = _encoded(folder / relative)
    if not data:
        return '<span class="thumb">image not readable</span>'
    return (
        f'<img class="thumb" width="{width}" height="{height}" alt="{escape(alt, 160)}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


@lru_cache(maxsize=4096)
def _encoded(path: Path) -> tuple[str, int, int]:
    """The thumbnail in base64 with its size; empty where the file cannot be decoded."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not is_plain_file(path):
        return "", 0, 0
    unusable = (OSError, ValueError, SyntaxError, MemoryError, OverflowError, ZeroDivisionError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and of sizes, which are checked here
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    return "", 0, 0
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
                upright = ImageOps.exif_transpose(image)
                upright.thumbnail((SIDE, SIDE))
                if upright.has_transparency_data:
                    upright = upright.convert("RGBA")
                    white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(white, upright)
                small = Image.new("RGB", upright.size)  # without any of the file's own metadata
                small.paste(upright.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, *unusable):
        return "", 0, 0
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode(), small.width, small.height
