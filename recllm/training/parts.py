"""Which parts of a model train: named, counted, and checked parameter by parameter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from recllm.errors import DataError
from recllm.mllm.vision.tower import unwrapped

VISION, PROJECTOR, LANGUAGE, EMBEDDINGS = (
    "vision tower",
    "projector",
    "language model",
    "embeddings and lm_head",
)
PARTS = (VISION, PROJECTOR, LANGUAGE, EMBEDDINGS)
# The names in transformers of what stands between tower and language model: Qwen-VL's, Gemma's and others',
# and LLaVA-NeXT's learned end of a row of patches.
_PROJECTORS = (
    *("merger", "deepstack_merger_list", "multi_modal_projector", "connector", "aligner"),
    "image_newline",
)


@dataclass(frozen=True)
class PartCount:
    """How many parameters a part has, and how many of its numbers (those of LoRA included) train."""

    part: str
    parameters: int
    trained: int


class Parts:
    """Tells of each module and parameter of a transformers model which part it belongs to.

    Args:
        model: An image-text-to-text model, also within a PEFT wrapper.
    """

    def __init__(self, model: Any):
        core = unwrapped(model)
        decoder = core.get_decoder()
        ends = [core.get_input_embeddings(), core.get_output_embeddings()]
        self._model = core
        self._prefixes: dict[str, str] = {}
        for name, module in core.named_modules():
            if any(module is end for end in ends):
                self._prefixes[name] = EMBEDDINGS
            elif module is decoder:
                self._prefixes[name] = LANGUAGE
            elif name.rpartition(".")[2] in _PROJECTORS:
                self._prefixes[name] = PROJECTOR

    def of(self, name: str) -> str:
        """Returns the part of a module or parameter of the transformers model, by its name there."""
        pieces = name.split(".")
        for length in range(len(pieces), 0, -1):
            if (part := self._prefixes.get(".".join(pieces[:length]))) is not None:
                return part
        return PROJECTOR if pieces[-1] in _PROJECTORS else VISION

    def linear_layers(self, trained: tuple[str, ...]) -> list[str]:
        """Returns the names of the linear layers of parts, by which LoRA finds them.

        Raises:
            DataError: A part has none.
        """
        from torch import nn

        layers: dict[str, list[str]] = {part: [] for part in trained}
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear) and self.of(name) in layers:
                layers[self.of(name)].append(name)
        for part, names in layers.items():
            if not names:
                raise DataError(f"{type(self._model).__name__} has no linear layers in its {part} to train")
        return [name for names in layers.values() for name in names]

    def counts(self) -> list[PartCount]:
        """Returns the counts of each part; parameters in 4 bits count as the numbers that they stand for."""
        found = {part: [0, 0] for part in PARTS}
        for name, parameter in self._model.named_parameters():
            count = found[self.of(name)]
            numbers = number_count(parameter)
            count[0] += 0 if _is_adapter(name) else numbers
            count[1] += numbers if parameter.requires_grad else 0
        return [PartCount(part, *count) for part, count in found.items()]

    def freeze_all_but(self, trained: tuple[str, ...]) -> None:
        """Leaves the parameters of the trained parts alone to train."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self.of(name) in trained)

    def check(self, trained: tuple[str, ...], *, adapter: bool) -> None:
        """Checks that exactly what should train does, before a step is made.

        Args:
            trained: The parts that are to train.
            adapter: LoRA's weights train, not the parts' own.

        Raises:
            RuntimeError: A parameter trains that should not or the other way round, a part has nothing that
                trains, or something outside the language model is in 4 bits.
        """
        from bitsandbytes.nn import Linear4bit

        active = set()
        for name, parameter in self._model.named_parameters():
            part = self.of(name)
            expected = part in trained and _is_adapter(name) == adapter
            if parameter.requires_grad != expected:
                raise RuntimeError(f"{name} ({part}) should {'' if expected else 'not '}train")
            if expected:
                active.add(part)
        if missing := set(trained) - active:
            raise RuntimeError(f"nothing trains in the {', '.join(sorted(missing))}")
        for name, module in self._model.named_modules():
            if isinstance(module, Linear4bit) and self.of(name) != LANGUAGE:
                raise RuntimeError(f"{name} ({self.of(name)}) is in 4 bits")


def lora_pattern(names: list[str]) -> str:
    """Returns one regular expression that matches the names of layers and no others of the same model.

    Numbers in names (the n-th layer) become `\\d+`, so that an adapter's config stays readable.
    """
    kinds = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names}
    return "|".join(sorted(kinds))


def number_count(parameter: Any) -> int:
    """Returns how many numbers a parameter stands for, be it packed in 4 bits or shared out by ZeRO-3."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(state.shape)
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def parts_table(counts: list[PartCount]) -> str:
    """Returns the counts as lines of text."""
    total = PartCount("all", sum(each.parameters for each in counts), sum(each.trained for each in counts))
    lines = [f"{'part':<24}{'parameters':>16}{'trained':>16}"]
    lines += [f"{each.part:<24}{each.parameters:>16,}{each.trained:>16,}" for each in (*counts, total)]
    return "\n".join(lines)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name
