"""NF4 with safe defaults: only the language model's layers are quantized, never what reads the images."""

from __future__ import annotations

from typing import Any

from recllm.errors import DataError


def nf4_config(config: Any, compute_dtype: Any) -> Any:
    """Returns the quantization config for a model: NF4, double quantization (QLoRA, arXiv 2305.14314).

    Whatever stands outside the language model's layers (vision tower, projector, `lm_head`) keeps its
    precision; it is found in the module tree, so that a new architecture needs no list of names here.

    Args:
        config: The model's transformers config.
        compute_dtype: The torch dtype that products are computed in.

    Raises:
        DataError: bitsandbytes is not installed.
    """
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise DataError("quantization nf4 needs bitsandbytes: pip install bitsandbytes")
    with torch.device("meta"):
        outline = AutoModelForImageTextToText.from_config(config)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=modules_outside_decoder(outline),
    )


def modules_outside_decoder(model: Any) -> list[str]:
    """Returns the names of the largest modules of a model that hold nothing of its language model."""
    decoder = model.get_decoder()
    names = []

    def walk(module: Any, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if child is decoder:
                continue
            if any(part is decoder for part in child.modules()):
                walk(child, f"{path}.")
            else:
                names.append(path)

    walk(model, "")
    return names


def keep_unpacked(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights when a model is first evaluated on a CPU.

    It does so where the CPU has AVX512-BF16. What is repacked computes in bfloat16 and passes no gradient, so
    that training after a validation would go wrong without a word, and scores would depend on the CPU.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_nf4(model: Any) -> None:
    """Checks after loading that the language model was quantized and nothing else was.

    Raises:
        RuntimeError: Something outside the language model is quantized, or nothing is.
    """
    from bitsandbytes.nn import Linear4bit

    quantized = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    outside = tuple(f"{name}." for name in modules_outside_decoder(model))
    if wrong := [name for name in quantized if f"{name}.".startswith(outside)]:
        raise RuntimeError(
            f"{type(model).__name__}: {wrong[0]} was quantized, but is not of the language model"
        )
    if not quantized:
        raise RuntimeError(f"{type(model).__name__}: nothing was quantized")
