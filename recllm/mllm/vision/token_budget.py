"""How many tokens an image takes, known before it is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from recllm.errors import DataError
from recllm.mllm.processor import has_pixel_budget, image_text
from recllm.mllm.vision.images import MAX_ASPECT, decode_image, image_size, read_image_bytes


class BudgetError(DataError):
    """A sample that does not fit its token budget even without any history."""


def image_settings(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Sets a processor's pixel budget, in place; None keeps what it has.

    Qwen2-VL, Qwen2.5-VL and Qwen3-VL share one image processor, which keeps the two numbers as
    `size["shortest_edge"]` and `size["longest_edge"]`, both in pixels of area.

    Args:
        processor: A transformers processor.
        min_pixels: Smaller images are enlarged to it.
        max_pixels: Larger images are shrunk to it.

    Raises:
        DataError: The processor has no pixel budget, or no image of the merged patch size lies between the
            two.
    """
    if min_pixels is None and max_pixels is None:
        return
    if not has_pixel_budget(processor):
        raise DataError(
            f"{type(processor).__name__} has no pixel budget, it sizes images by settings of its own: leave "
            "min_pixels and max_pixels out"
        )
    images = processor.image_processor
    smallest = images.size["shortest_edge"] if min_pixels is None else min_pixels
    largest = images.size["longest_edge"] if max_pixels is None else max_pixels
    patch = (images.patch_size * images.merge_size) ** 2
    if smallest < 1 or largest < max(smallest, patch):
        raise DataError(
            f"min_pixels {smallest} and max_pixels {largest}: expected 1 <= min_pixels <= max_pixels, and at "
            f"least {patch} as max_pixels, the pixels of one token"
        )
    images.size = {"shortest_edge": smallest, "longest_edge": largest}


class ImageTokens:
    """Tokens that an image of a given size takes in a prompt, and images of exactly that many tokens.

    For the Qwen-VL family the size is that of `qwen_vl_utils.smart_resize` under the processor's pixel
    budget, 28 x 28 pixels a token for Qwen2-VL. Other processors (LLaVA, Gemma 3, InternVL, Idefics3) are
    given a blank image of the size. InternVL counts the two marks around an image, too.
    """

    def __init__(self, processor: Any, min_pixels: int | None = None, max_pixels: int | None = None):
        """Reads the budget off `processor`, after `image_settings(processor, min_pixels, max_pixels)`.

        Raises:
            DataError: As `image_settings`; or the processor cuts images into pans (Gemma 3's
                `do_pan_and_scan`), whose tokens it cannot tell beforehand.
        """
        image_settings(processor, min_pixels, max_pixels)
        if getattr(processor.image_processor, "do_pan_and_scan", False):
            raise DataError(
                f"{type(processor).__name__}: tokens cannot be counted with do_pan_and_scan; switch it off"
            )
        self._processor = processor
        self._texts: dict[tuple[int, int], str] = {}
        self._resize = None
        if has_pixel_budget(processor):
            from qwen_vl_utils.vision_process import smart_resize

            self._resize = smart_resize

    def count(self, width: int, height: int) -> int:
        """Returns the tokens of an upright image of `width` x `height` pixels.

        Raises:
            DataError: One side is more than 200 times the other.
        """
        tokens = self._processor.tokenizer(self.text(width, height), add_special_tokens=False).input_ids
        return sum(token in self._processor.image_token_ids for token in tokens)

    def text(self, width: int, height: int) -> str:
        """Returns what takes the place of the mark of an upright image of `width` x `height` pixels.

        Raises:
            DataError: One side is more than 200 times the other.
        """
        _check_aspect(width, height)
        if self._resize is not None:
            return image_text(self._processor, width, height)
        if (width, height) not in self._texts:
            self._texts[width, height] = image_text(self._processor, width, height)
        return self._texts[width, height]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the (width, height) to which an image is resized before the processor sees it.

        The processor leaves an image of this size as it is. Where the size is the processor's own affair, the
        result is the given size: for processors with fixed sizes, and for slivers (a side below half a
        token's, or a budget of a few tokens) for which `smart_resize` and the processor differ.
        """
        _check_aspect(width, height)
        if self._resize is None:
            return width, height
        images = self._processor.image_processor
        smallest, largest = images.size["shortest_edge"], images.size["longest_edge"]
        side = images.patch_size * images.merge_size
        fitted_height, fitted_width = self._resize(height, width, side, smallest, largest)
        pixels = fitted_height * fitted_width
        if not smallest <= pixels <= largest or pixels // side**2 != self.count(width, height):
            return width, height
        return fitted_width, fitted_height

    def count_file(self, path: Path) -> int:
        """Returns the tokens of an image file, from its header. Raises ImageError as `image_size`."""
        return self.count(*image_size(path))

    def load(self, path: Path) -> Image.Image:
        """Decodes an image file to the size of which the processor makes exactly `count_file(path)` tokens.

        Raises:
            ImageError: As `recllm.mllm.vision.images.load_image`.
        """
        return self.decode(read_image_bytes(path), path)

    def decode(self, data: bytes, name: object) -> Image.Image:
        """Does what `load` does, from a file's bytes; `name` names the image in errors."""
        return decode_image(data, name, self.size)


def _check_aspect(width: int, height: int) -> None:
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(
            f"an image of {width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other"
        )
