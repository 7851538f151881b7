"""What a processor makes of an image: tensors, and the text that takes the place of the image's mark.

The only caller of what transformers' processors keep private, so that a new version is met in one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from recllm.errors import DataError


@dataclass(frozen=True)
class Picture:
    """One image as its processor prepares it.

    Attributes:
        tensors: The processor's tensors of the image; the first axis of each is the image's share of a batch.
        text: What takes the place of the image's mark in a prompt, image tokens included.
    """

    tensors: dict[str, torch.Tensor]
    text: str


def prepare(processor: Any, image: Image.Image) -> Picture:
    """Returns an image as the processor prepares it."""
    settings = processor._merge_kwargs(
        tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt"
    )["images_kwargs"]
    made, (text,) = processor._process_images([image], **settings)
    return Picture({name: torch.as_tensor(value) for name, value in made.items()}, text)


def image_text(processor: Any, width: int, height: int) -> str:
    """Returns the text that takes the place of the mark of an image of `width` x `height` pixels.

    Qwen-VL's processors work it out from the size. All others are given a blank image of that size: what they
    make of it is right by construction, and costs a few milliseconds, so keep the result.
    """
    if not has_pixel_budget(processor):
        return prepare(processor, Image.new("RGB", (width, height))).text
    patches = processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_patches
    return processor.replace_image_token({"image_grid_thw": torch.tensor([[1, 1, patches[0]]])}, image_idx=0)


def check_expands(processor: Any, name: object) -> None:
    """Checks that a processor can put an image's tokens into a prompt.

    Args:
        processor: A transformers processor.
        name: Of the model, for the error.

    Raises:
        DataError: It cannot.
    """
    try:
        text = image_text(processor, 56, 56)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(
            f"{name}: its {type(processor).__name__} cannot say which tokens stand for an image "
            f"({type(error).__name__}: {error}); where a setting is missing (LLaVA's patch_size), complete "
            "processor_config.json as the model's authors publish it, else use another model"
        ) from error
    if not isinstance(getattr(processor, "image_token", None), str) or not text:
        raise DataError(
            f"{name}: its {type(processor).__name__} puts no tokens of an image into the prompt; use a model "
            "whose images are part of the prompt, for example Qwen/Qwen2-VL-2B-Instruct"
        )


def has_pixel_budget(processor: Any) -> bool:
    """Tells whether a processor bounds the pixels of an image by two numbers, as Qwen-VL's do."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl, image_processing_qwen2_vl

    kinds = (
        image_processing_qwen2_vl.Qwen2VLImageProcessor,
        image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil,
    )
    return isinstance(processor.image_processor, kinds)


def fill(processor: Any, text: str, images: Iterable[str]) -> str:
    """Returns a text with what stands for each of its images in place of their marks.

    Args:
        processor: The processor whose marks the text has.
        text: With one mark an image.
        images: For each image, in order, what `image_text` returned.
    """
    first, *rest = text.split(processor.image_token)
    return first + "".join(image + piece for image, piece in zip(images, rest, strict=True))


def count_tokens(processor: Any, text: str, image_token_id: int) -> int:
    """Returns how many visual features the text of an image has room for: its tokens `image_token_id`."""
    return text.count(processor.tokenizer.convert_ids_to_tokens(image_token_id))


def join(pictures: Sequence[Mapping[str, torch.Tensor]], names: Collection[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors of several images as one batch.

    Images of LLaVA-NeXT and Idefics3 have tiles of unequal number along the second axis; shorter ones get
    zeros behind them, which these models leave out, as their processors do.

    Args:
        pictures: The tensors of each image.
        names: The tensors that are wanted; the others are left out.
    """
    if not pictures:
        return {}
    return {name: _stack([one[name] for one in pictures]) for name in pictures[0] if name in names}


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(list(tensors))
    longest = [max(sides) for sides in zip(*shapes, strict=True)]
    out = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *longest)
    start = 0
    for tensor in tensors:
        out[(slice(start, start + len(tensor)), *map(slice, tensor.shape[1:]))] = tensor
        start += len(tensor)
    return out


def token_kinds(processor: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns which of a batch's tokens stand for images, under the name by which the model takes it.

    Args:
        processor: The processor.
        tokens: (rows, tokens).

    Returns:
        A tensor of the same shape, 1 at image tokens; nothing where the model does not ask for it.
    """
    if not getattr(processor, "return_mm_token_type_ids", False):
        return {}
    name = "mm_token_type_ids" if "mm_token_type_ids" in processor.model_input_names else "token_type_ids"
    return {name: torch.tensor(processor.create_mm_token_type_ids(tokens.tolist()))}


def forward_names(model: Any) -> frozenset[str]:
    """Returns the names of what a transformers model takes in its forward pass."""
    return frozenset(inspect.signature(model.forward).parameters)
