"""Models by name: `load` takes a local folder, a hub id or `tiny`; with quantization and adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recllm.errors import DataError
from recllm.mllm.checkpoints import Checkpoint, check_architecture, check_model_folder, find_checkpoint
from recllm.mllm.fingerprint import fingerprint
from recllm.mllm.processor import check_expands, forward_names, has_pixel_budget
from recllm.precision import computed_in, has_bfloat16, warn_if_emulated
from recllm.processes import local_rank

if TYPE_CHECKING:
    from recllm.mllm.vision.token_budget import ImageTokens

DEFAULT_MAX_PIXELS = 200_704
"""Pixels of an image unless asked otherwise: 256 tokens of 28 x 28. Qwen2-VL's own bound of 12.8 million, or
16,384 tokens an image, is what memory runs out of; this one is ours."""


@dataclass(frozen=True)
class LoadOptions:
    """Which model, and how it is loaded."""

    model: str = "tiny"
    """A local folder, a hub id such as Qwen/Qwen2-VL-2B-Instruct, or `tiny`, the embedded model."""
    adapter: str | None = None
    """A LoRA adapter trained on that model: a local folder or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; `auto` is the one they were saved in, or float32 on a CPU without it."""
    device_map: str | None = None
    """`auto` (spread over all accelerators), `cpu`, `cuda:1`, ...; by default this process's accelerator."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; by default what transformers chooses."""
    quantization: Literal["nf4"] | None = None
    """`nf4`: the language model's layers in 4 bits (QLoRA); vision tower, projector and lm_head are left."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels; by default the model's own setting."""
    max_pixels: int | None = None
    """Larger images are reduced to this many pixels; by default 200,704 (256 tokens of Qwen2-VL), or less."""

    def load(self, *, training: bool = False) -> LoadedModel:
        """Loads the model; see `recllm.mllm.loading.load`."""
        options = asdict(self)
        return load(options.pop("model"), training=training, **options)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its processor, and what the rest of recllm asks about it.

    Attributes:
        model: The transformers model, or peft's around it where there is an adapter.
        processor: Its processor; the tokenizer pads on the left and never truncates.
        identity: What decides an answer besides request and decoding; JSON types only.
    """

    model: Any
    processor: Any
    identity: dict[str, Any]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def base_model(self) -> Any:
        """The transformers model itself; adapters are layers within it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """What data must never write: special tokens, added ones that the chat template uses, turn marks."""
        return tuple(sorted({*self._special_tokens, *(mark.strip() for mark in self.turn_marks)}))

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids of those `special_tokens` that are tokens."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self._special_tokens)))

    @cached_property
    def turn_marks(self) -> tuple[str, ...]:
        """See `recllm.mllm.rendering.find_turn_marks`."""
        from recllm.mllm.rendering import find_turn_marks

        return find_turn_marks(self)

    @cached_property
    def _special_tokens(self) -> frozenset[str]:
        template = self.processor.chat_template
        added = self.tokenizer.added_tokens_decoder.values()
        used = {
            token.content
            for token in added
            if token.special or (token.content in template and not token.content.isspace())
        }
        return frozenset(used | set(self.tokenizer.all_special_tokens))

    @cached_property
    def special_tokens_of_shape(self) -> dict[Any, dict[int | str, int]]:
        """What `recllm.mllm.rendering.render` has found out about chats of each form so far."""
        return {}

    @cached_property
    def words_of_shape(self) -> dict[Any, list[str] | None]:
        """What the chat template writes around the texts of chats of each form so far, where it is plain."""
        return {}

    @cached_property
    def image_token_id(self) -> int:
        """The token that stands in `input_ids` once for each visual feature."""
        return self.base_model.config.image_token_id

    @cached_property
    def forward_names(self) -> frozenset[str]:
        """The names of what the model takes in its forward pass."""
        return forward_names(self.base_model)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the model's and the tokenizer's."""
        own = self.base_model.generation_config.eos_token_id
        ids = set(own if isinstance(own, list) else [own]) | {self.tokenizer.eos_token_id}
        return tuple(sorted(ids - {None}))

    @cached_property
    def max_positions(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self.base_model.config.get_text_config().max_position_embeddings

    @cached_property
    def images(self) -> ImageTokens:
        """Decodes image files to the processor's size and counts their tokens."""
        from recllm.mllm.vision.token_budget import ImageTokens

        return ImageTokens(self.processor)


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization: Literal["nf4"] | None = None,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    training: bool = False,
) -> LoadedModel:
    """Loads a multimodal model with its processor, ready for inference (or for training).

    Only safetensors are read and no code of a repository is run.

    Args:
        name: A local folder, a hub id, or `tiny` (see `recllm.mllm.tiny`).
        adapter: A LoRA adapter that was trained on this model.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: as saved, but float32 on a CPU that has no
            instructions for it.
        device_map: As transformers takes it. None: the accelerator of this process (`LOCAL_RANK`) where there
            is one, else the CPU; in training without quantization the CPU, for the trainer moves the model.
        attn_implementation: As transformers takes it; None for its choice.
        quantization: `nf4`, see `recllm.mllm.quantization`.
        revision: Branch, tag or commit of a hub id.
        min_pixels: Lower bound of an image's pixels; None for the processor's setting.
        max_pixels: Upper bound of an image's pixels; None for `DEFAULT_MAX_PIXELS`, or for the processor's
            setting where that is less or sizes are fixed.
        training: Leave the adapter trainable and the model in training mode.

    Raises:
        DataError: The model or adapter is missing, incomplete, of a kind that cannot be loaded, or the two do
            not belong together.
    """
    from recllm.mllm.adapters import attach_adapter, check_adapter_acts, check_adapter_folder

    found = find_checkpoint(str(name), revision)
    config = check_model_folder(found.folder)
    check_architecture(config, found.folder)
    if quantization is not None and "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise DataError(f"{name}: its weights are quantized already ({method}); leave quantization out")
    lora = None
    if adapter is not None:
        lora = find_checkpoint(str(adapter))
        check_adapter_folder(lora.folder, found)
    processor = read_processor(found.folder, min_pixels, max_pixels)
    with _quiet_unless_terminal():
        model = _load_model(found.folder, dtype, device_map, attn_implementation, quantization, training)
    if found.commit is not None:  # what peft writes into an adapter's config as its base
        model.name_or_path = found.name
    if lora is not None:
        model = attach_adapter(model, lora.folder, training=training)
    model.train(training)
    identity = {
        **checkpoint_identity(found),
        "adapter": None if lora is None else fingerprint(lora.folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization,
        **pixel_budget(processor),
    }
    loaded = LoadedModel(model, processor, identity)
    if lora is not None:
        from recllm.mllm.rendering import probe_inputs

        check_adapter_acts(model, probe_inputs(loaded), lora.folder)
    return loaded


def checkpoint_identity(found: Checkpoint) -> dict[str, str]:
    """Returns what identities say of a checkpoint: its name, and its commit on the hub or a fingerprint."""
    if found.commit is not None:
        return {"model": found.name, "revision": found.commit}
    return {"model": found.name, "fingerprint": fingerprint(found.folder)}


def load_processor(
    name: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> LoadedModel:
    """Loads the processor of a model and no weights: enough to render chats and to count their tokens.

    Args:
        name: A local folder, a hub id, or `tiny`.
        min_pixels: As for `load`.
        max_pixels: As for `load`.

    Returns:
        A loaded model whose `model` is None.

    Raises:
        DataError: As `load`, as far as the processor goes.
    """
    found = find_checkpoint(str(name), None)
    processor = read_processor(found.folder, min_pixels, max_pixels)
    return LoadedModel(None, processor, {"model": found.name, **pixel_budget(processor)})


def pixel_budget(processor: Any) -> dict[str, int | None]:
    """Returns the pixel budget that a processor has, as identities keep it; None where it has no such one."""
    size = processor.image_processor.size if has_pixel_budget(processor) else {}
    return {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}


def read_processor(folder: Path, min_pixels: int | None, max_pixels: int | None) -> Any:
    """Loads the processor in a folder, bounds its images, and has it pad on the left and never truncate.

    Raises:
        DataError: There is none for text and images, or it has no chat template.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: its processor cannot be loaded: {_first_line(error)}") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise DataError(
            f"{folder}: has no processor for text and images, only a {type(processor).__name__}; copy "
            "the processor's files from the model that this one was trained from"
        )
    tokenizer = processor.tokenizer
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    if not isinstance(processor.chat_template, str):
        raise DataError(
            f"{folder}: no chat template; copy chat_template.jinja from the instruction-tuned model"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    from recllm.mllm.vision.token_budget import image_settings

    if max_pixels is None and (pixel_budget(processor)["max_pixels"] or 0) > DEFAULT_MAX_PIXELS:
        max_pixels = max(DEFAULT_MAX_PIXELS, min_pixels or 0)
    image_settings(processor, min_pixels, max_pixels)
    check_expands(processor, folder)
    return processor


def _load_model(
    folder: Path,
    dtype: str,
    device_map: str | dict[str, Any] | None,
    attn_implementation: str | None,
    quantization: str | None,
    training: bool,
) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText

    from recllm.mllm.quantization import check_nf4, keep_unpacked, nf4_config

    if quantization not in (None, "nf4"):
        raise DataError(f"quantization {quantization!r}: expected nf4 or none")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    on_cpu = device_map == "cpu" or not torch.accelerator.is_available()
    options: dict[str, Any] = {"dtype": _computed_in(dtype, config, quantization, on_cpu)}
    if quantization == "nf4":
        options["quantization_config"] = nf4_config(config, options["dtype"])
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    placement = _placement(device_map, by_trainer=training and quantization is None)
    if placement is not None:
        options["device_map"] = placement
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{folder}: the accelerator has too little memory for it ({_first_line(error)}); use "
            "quantization nf4, device_map auto, or a smaller model"
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise DataError(
            f"{folder}: {len(missing)} of the model's tensors are not in its weight files (for example "
            f"{missing[0]}), and would be random; download it again"
        )
    if quantization == "nf4":
        check_nf4(model)
        keep_unpacked(model)
    return model


def _placement(device_map: str | dict[str, Any] | None, *, by_trainer: bool) -> str | dict[str, Any] | None:
    import torch

    if device_map is not None:
        return device_map
    if by_trainer or not torch.cuda.is_available():
        return None
    return {"": local_rank()}


def _computed_in(dtype: str, config: Any, quantization: str | None, on_cpu: bool) -> Any:
    """Returns the number type to load weights in; `auto` if they and the config decide."""
    import torch

    if dtype != "auto":
        asked = getattr(torch, dtype)
        warn_if_emulated(asked, on_cpu=on_cpu)
        return asked
    if quantization == "nf4":
        return torch.bfloat16 if not on_cpu and has_bfloat16() else torch.float32
    saved = config.dtype or config.get_text_config().dtype
    return "auto" if saved is None else computed_in(saved, on_cpu=on_cpu)


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :300
    ]
