"""Qwen2-VL models of any size with fresh weights: the embedded one, and the published sizes for speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recllm.errors import DataError
from recllm.files import MANIFEST, staged_folder, write_json
from recllm.mllm.tiny.tokenizer import build_processor

if TYPE_CHECKING:
    import torch
    from transformers import (
        PreTrainedTokenizerBase,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLProcessor,
    )


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2-VL model; the defaults are those of the embedded model (1.5 M parameters)."""

    layers: int = 4
    """Layers of the language model."""
    hidden: int = 128
    """Its width."""
    intermediate: int = 384
    """Width of its feed-forward layers."""
    heads: int = 8
    """Its attention heads."""
    kv_heads: int = 4
    """Its key-value heads; divide `heads`."""
    context: int = 8192
    """The longest sequence, in tokens."""
    vocabulary: int = 2048
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    tied: bool = True
    """Whether the output layer shares the embedding's weights."""
    rope_theta: float = 1000.0
    """Base of the rotary position embedding."""
    rope_sections: tuple[int, int, int] = (2, 3, 3)
    """How many of the frequencies turn with time, height and width; half a head in all."""
    vision_width: int = 96
    """Width of the vision tower."""
    vision_depth: int = 4
    """Its layers."""
    vision_heads: int = 4
    """Its attention heads."""
    min_pixels: int = 56 * 56
    """Pictures with fewer pixels are enlarged."""
    max_pixels: int = 4 * 56 * 56
    """Pictures with more are reduced; 28 x 28 pixels are one token."""
    deviation: float = 0.05
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise DataError(
                f"hidden={self.hidden}, heads={self.heads}, kv_heads={self.kv_heads}: heads must divide the "
                "width, and kv_heads the heads"
            )
        if 2 * sum(self.rope_sections) != self.hidden // self.heads:
            raise DataError(
                f"rope_sections={self.rope_sections}: expected a sum of {self.hidden // self.heads // 2}, "
                "half the width of a head"
            )
        if self.vision_width % (4 * self.vision_heads):
            raise DataError(
                f"vision_width={self.vision_width}: expected a multiple of 4 * vision_heads "
                f"({4 * self.vision_heads}), for positions in two dimensions"
            )
        if not 28 * 28 <= self.min_pixels <= self.max_pixels:
            raise DataError(
                f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}: expected 784 <= min <= max"
            )


SHAPES: dict[str, Shape] = {
    "tiny": Shape(),
    "qwen2-vl-2b": Shape(
        layers=28,
        hidden=1536,
        intermediate=8960,
        heads=12,
        kv_heads=2,
        context=32768,
        vocabulary=151_936,
        tied=True,
        rope_theta=1_000_000.0,
        rope_sections=(16, 24, 24),
        vision_width=1280,
        vision_depth=32,
        vision_heads=16,
        max_pixels=12_845_056,
        deviation=0.02,
    ),
    "qwen2-vl-7b": Shape(
        layers=28,
        hidden=3584,
        intermediate=18_944,
        heads=28,
        kv_heads=4,
        context=32768,
        vocabulary=152_064,
        tied=False,
        rope_theta=1_000_000.0,
        rope_sections=(16, 24, 24),
        vision_width=1280,
        vision_depth=32,
        vision_heads=16,
        max_pixels=12_845_056,
        deviation=0.02,
    ),
}
"""The embedded model, and the published configurations of Qwen2-VL-2B-Instruct and Qwen2-VL-7B-Instruct."""


def random_model(
    shape: str | Shape,
    *,
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    """Makes a Qwen2-VL model with random weights in memory, without writing it to disk.

    Every layer has its real size and cost; what the model says is noise. The weights are one block of normal
    numbers over and over, shifted from tensor to tensor, which takes a fraction of the time of drawing each.

    Args:
        shape: A name in `SHAPES`, or sizes.
        dtype: Number type of the weights.
        device: Where the weights are made.
        seed: The same seed gives the same weights on the same kind of device.

    Returns:
        The model in evaluation mode, and a processor with the embedded model's vocabulary; rows of the
        embedding beyond it are never used by a prompt.

    Raises:
        DataError: The name is unknown.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    shape = _shape_of(shape)
    processor = build_processor(shape.min_pixels, shape.max_pixels)
    config = _config_of(shape, processor.tokenizer)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    _fill(model, shape.deviation, seed)
    _end_turns(model, processor.tokenizer)
    return model.eval(), processor


def build_random(
    shape: str | Shape | None,
    out: Path,
    *,
    dtype: torch.dtype | str = "float32",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a `save_pretrained` folder of a model with random weights; see `random_model`.

    Args:
        shape: A name in `SHAPES`, or sizes; None for those of the embedded model.
        out: The folder to make.
        dtype: Number type of the weights.
        seed: The same seed gives the same weights.
        overwrite: Replace `out` where recllm made it.

    Raises:
        DataError: The name is unknown, or `out` exists or cannot be written.
    """
    shape = _shape_of("tiny" if shape is None else shape)
    with staged_folder(Path(out), overwrite=overwrite) as folder:
        model, processor = random_model(shape, dtype=dtype, seed=seed)
        save(model, processor, folder)
        write_json(folder / MANIFEST, {"kind": "random Qwen2-VL", "seed": seed, "dtype": str(dtype)})
    return Path(out)


def save(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, folder: Path) -> None:
    """Writes both with `save_pretrained`, without the progress bar that transformers shows for one file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def fresh_model(shape: Shape, processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """Returns a float32 model on the CPU with weights as transformers draws them, for training.

    torch's generator decides the weights.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    config = _config_of(shape, processor.tokenizer)
    model = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    _end_turns(model, processor.tokenizer)
    return model


def _shape_of(shape: str | Shape) -> Shape:
    if isinstance(shape, Shape):
        return shape
    if shape not in SHAPES:
        raise DataError(f"shape {shape!r} is unknown; expected one of {', '.join(SHAPES)}, or a Shape")
    return SHAPES[shape]


def _config_of(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLConfig:
    from transformers import Qwen2VLConfig

    if len(tokenizer) > shape.vocabulary:
        raise DataError(
            f"vocabulary={shape.vocabulary}: the tokenizer has {len(tokenizer)} tokens; give as many or more"
        )
    token = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": shape.context,
            "max_window_layers": shape.layers,
            "rms_norm_eps": 1e-6,
            "initializer_range": shape.deviation,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": list(shape.rope_sections),
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": shape.tied,
        },
        vision_config={
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_width,
            "num_heads": shape.vision_heads,
            "hidden_size": shape.hidden,
            "initializer_range": shape.deviation,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=shape.tied,
    )


def _end_turns(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedy decoding until a turn or the text ends, as Qwen's own generation settings have it."""
    from transformers import GenerationConfig

    token = tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=token("<|endoftext|>"),
        pad_token_id=token("<|endoftext|>"),
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
        do_sample=False,
    )


def _fill(model: Qwen2VLForConditionalGeneration, deviation: float, seed: int) -> None:
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    block = deviation * torch.randn(1_000_003, generator=generator, device=device)  # a prime: rows differ
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "original_inv_freq"):  # buffers that the meta device left empty
                model._init_weights(module)
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim > 1:
                _tile(parameter, block.roll(-7919 * number).to(parameter.dtype))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _tile(parameter: torch.Tensor, block: torch.Tensor) -> None:
    flat = parameter.view(-1)
    whole = len(flat) // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: len(flat) - whole])
