"""Images from disk: decoded once, upright, RGB; whatever is odd about a file is handled or named here."""

from __future__ import annotations

import io
import math
import os
import stat
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from recllm.data.image_files import is_inside
from recllm.errors import DataError

MAX_PIXELS = 100_000_000
"""Larger images are refused: 100 megapixels are 300 MB decoded, and no catalog needs them."""
MAX_BYTES = 256 * 2**20
MAX_ASPECT = 200
"""Long side over short side; Qwen's processors refuse more."""

Fit = Callable[[int, int], tuple[int, int]]
"""Maps an upright image's (width, height) to the size that is wanted."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_SUFFIX_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".jp2": "JPEG2000",
}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GAP = 2  # JPEGs are decoded at no less than twice the wanted size, so that the last resize still filters


class ImageError(DataError):
    """An image file that cannot be used.

    Attributes:
        finding: `missing`, `unreadable`, `empty`, `not_an_image`, `truncated`, `huge` or `extreme_aspect`.
    """

    def __init__(self, name: object, finding: str, reason: str):
        super().__init__(f"image {name}: {reason}")
        self.finding = finding


def resolve_image(folder: Path, relative: str) -> Path:
    """Returns the file that a relative path names, links followed.

    Raises:
        ImageError: The path, or a link on it, leads out of `folder`.
    """
    if not is_inside(relative):
        raise ImageError(repr(relative), "unreadable", f"the path leaves the folder {folder}")
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / relative))
    if not path.is_relative_to(root):
        raise ImageError(repr(relative), "unreadable", f"a link leads out of the folder {folder}")
    return path


def load_image(path: Path, *, max_pixels: int | None = None) -> Image.Image:
    """Decodes one image file: upright (EXIF), RGB, over white where it is transparent, first frame.

    Args:
        path: The file; its content decides the format, not its suffix.
        max_pixels: A larger image is shrunk to at most that many pixels, keeping its shape; JPEGs are
            downscaled while they are decoded. None keeps the size. To have exactly the tokens that were
            counted beforehand, load through `recllm.mllm.vision.token_budget.ImageTokens.load` instead.

    Raises:
        ImageError: The file is missing, empty, no image, truncated or damaged, above 100 megapixels, or more
            than 200 times as long as wide.
    """
    if max_pixels is not None and max_pixels < 1:
        raise DataError(f"max_pixels {max_pixels}: expected 1 or more")
    fit = None if max_pixels is None else lambda width, height: _within(width, height, max_pixels)
    return decode_image(read_image_bytes(path), path, fit)


def decode_image(data: bytes, name: object, fit: Fit | None = None) -> Image.Image:
    """Decodes an image file's bytes, see `load_image`.

    Args:
        data: The file's bytes.
        name: Names the image in errors.
        fit: The size to resize to, see `Fit`; None keeps the size.
    """
    with _opened(io.BytesIO(data), name) as (image, orientation):
        size = None if fit is None else fit(*_upright_size(image, orientation))
        decoded = _decode(image, orientation, size, name)
        return decoded if size is None else decoded.resize(size, Image.Resampling.BICUBIC)


def image_size(path: Path) -> tuple[int, int]:
    """Returns an image's upright (width, height) from its header, without decoding it.

    Raises:
        ImageError: As `load_image`, except for damage that only decoding shows.
    """
    with _open_file(path) as file, _opened(file, path) as (image, orientation):
        return _upright_size(image, orientation)


def read_image_bytes(path: Path) -> bytes:
    """Returns an image file's bytes.

    Raises:
        ImageError: The file is missing, empty, no plain file, not readable, or above 256 MiB.
    """
    with _open_file(path) as file:
        return file.read()


@dataclass
class ImageReport:
    """What `survey` found.

    Attributes:
        images: Files looked at.
        counts: Files by finding: `ok`; handled on loading: `grayscale`, `palette`, `cmyk`, `alpha`,
            `deep` (more than 8 bits), `rotated` (by EXIF), `animated`, `mislabelled` (suffix against
            content); unusable: those of `ImageError`. A file counts under each that it shows.
        examples: The first files of each finding.
        unusable: Every file that cannot be used, with the reason.
    """

    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Returns the report for a manifest."""
        return {
            "images": self.images,
            "counts": dict(sorted(self.counts.items())),
            "examples": self.examples,
            "unusable": self.unusable,
        }


def survey(paths: Iterable[Path], *, workers: int = 2, named: int = 20) -> ImageReport:
    """Decodes every file once and reports what is odd about it.

    Args:
        paths: The files; any number, memory stays bounded.
        workers: Threads that decode.
        named: Files named for each handled finding; unusable ones are all named.
    """
    report = ImageReport()
    for path, (findings, reason) in map_in_threads(_inspect, paths, workers):
        report.images += 1
        for finding in findings or ["ok"]:
            report.counts[finding] += 1
            if finding != "ok" and reason is None and report.counts[finding] <= named:
                report.examples.setdefault(finding, []).append(str(path))
        if reason is not None:
            report.unusable[str(path)] = reason
    return report


def map_in_threads(work: Callable, inputs: Iterable, workers: int) -> Iterator[tuple]:
    """Yields (input, work(input)) in the order of the inputs, at most `4 * workers` of them ahead."""
    with ThreadPoolExecutor(workers) as pool:
        running: deque = deque()
        try:
            for one in inputs:
                running.append((one, pool.submit(work, one)))
                if len(running) >= 4 * workers:
                    first, future = running.popleft()
                    yield first, future.result()
            while running:
                first, future = running.popleft()
                yield first, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _inspect(path: Path) -> tuple[list[str], str | None]:
    findings = []
    try:
        with _opened(io.BytesIO(read_image_bytes(path)), path) as (image, orientation):
            if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"):
                findings.append("grayscale")
            if image.mode.startswith("I"):
                findings.append("deep")
            if image.mode in ("P", "PA"):
                findings.append("palette")
            if image.mode == "CMYK":
                findings.append("cmyk")
            if image.has_transparency_data:
                findings.append("alpha")
            if orientation != 1:
                findings.append("rotated")
            content = "JPEG" if image.format == "MPO" else image.format
            if _SUFFIX_FORMATS.get(Path(path).suffix.lower(), content) != content:
                findings.append("mislabelled")
            _decode(image, orientation, (1, 1), path)
            if image.format != "MPO" and getattr(image, "is_animated", False):
                findings.append("animated")
    except ImageError as error:
        return [error.finding], str(error)
    return findings, None


def _open_file(path: Path) -> io.BufferedReader:
    try:
        state = Path(path).stat()
        if not stat.S_ISREG(state.st_mode):
            raise ImageError(path, "not_an_image", "not a plain file")
        if not state.st_size:
            raise ImageError(path, "empty", "the file is empty")
        if state.st_size > MAX_BYTES:
            raise ImageError(path, "huge", f"{state.st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return Path(path).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(path, "missing", "no such file") from None
    except ImageError:
        raise
    except ValueError as error:  # a NUL in the path
        raise ImageError(repr(path), "unreadable", str(error)) from None
    except OSError as error:
        raise ImageError(path, "unreadable", f"cannot be read: {error.strerror}") from None


@contextmanager
def _opened(file: io.BufferedIOBase, name: object) -> Iterator[tuple[ImageFile.ImageFile, int]]:
    """Yields the undecoded image and its EXIF orientation; size and shape are within bounds."""
    with _quiet_pillow():
        Image.init()  # Image.open registers formats by itself, but not when two threads do it at once
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError:
            raise ImageError(name, "huge", f"more than {MAX_PIXELS:,} pixels") from None
        except UnidentifiedImageError:
            file.seek(0)
            if file.read(16).startswith(_SIGNATURES):
                raise ImageError(name, "truncated", "begins as an image, but is damaged or cut off") from None
            raise ImageError(name, "not_an_image", "not an image of a known format") from None
        except MemoryError:
            raise
        except Exception as error:  # damaged headers surface as nearly any exception
            raise ImageError(name, "truncated", f"damaged ({_first_line(error)})") from None
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    name, "huge", f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded"
                )
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(
                    name,
                    "extreme_aspect",
                    f"{width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other",
                )
            yield image, _orientation(image)


def _orientation(image: ImageFile.ImageFile) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns TIFFs by itself, their size included
    try:
        if image.format == "PNG":  # its getexif() would decode the image
            exif = Image.Exif()
            exif.load(image.info.get("exif") or b"")
        else:
            exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to refuse the picture
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation >= 5 else (width, height)


def _decode(
    image: ImageFile.ImageFile, orientation: int, at_least: tuple[int, int] | None, name: object
) -> Image.Image:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # where another library switched it on, missing rows become gray
    try:
        if at_least is not None:
            width, height = at_least if orientation < 5 else reversed(at_least)
            image.draft(None, (_GAP * width, _GAP * height))
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # damaged files surface as nearly any exception
        raise ImageError(name, "truncated", f"damaged or cut off ({_first_line(error)})") from None
    try:
        upright = _to_rgb(image)
    except ValueError as error:
        raise ImageError(name, "unreadable", f"cannot be made RGB ({_first_line(error)})") from None
    if orientation != 1:
        upright = upright.transpose(_UPRIGHT[orientation])
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
        raise ValueError(f"{image.mode} pixels have no known range; save it with 8 or 16 bits")
    return Image.fromarray((values.astype(np.uint32) * 255 // 65_535).astype(np.uint8))


def _within(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    if width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    shrunk = max(1, int(width * scale)), max(1, int(height * scale))
    return min(shrunk[0], max_pixels), min(shrunk[1], max_pixels)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


_quiet_lock = threading.Lock()
_quiet_users = 0


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Drops the warnings that Pillow's modules give, in all threads, while any thread is inside.

    `warnings.catch_warnings` swaps the list of filters and so undoes what other threads set meanwhile.
    """
    global _quiet_users
    with _quiet_lock:
        _quiet_users += 1
        warnings.filterwarnings("ignore", module=r"PIL\b")
        mine = warnings.filters[0]
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if not _quiet_users and mine in warnings.filters:
                warnings.filters.remove(mine)
