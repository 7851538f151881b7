"""Model inputs of a batch of groups: packed into one row, or whole prompts padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recllm.mllm.prefix.attention import GroupLayout
from recllm.mllm.prefix.groups import Group, Prompt
from recllm.mllm.processor import token_kinds

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel


@dataclass(frozen=True)
class Inputs:
    """What the model is given, besides images.

    Attributes:
        arguments: Of the forward pass; tensors on the CPU.
        images: The keys of the images, in the order of their slots.
        last: (rows, columns) of each prompt's last token in the final hidden states.
    """

    arguments: dict[str, Any]
    images: tuple[str, ...]
    last: tuple[torch.Tensor, torch.Tensor]


def packed(loaded: LoadedModel, batch: Sequence[Group], grids: dict[str, Any]) -> Inputs:
    """Returns one row of all groups: the beginning of each once, then what each of its prompts adds.

    Every token keeps the position that it has in its own prompt.

    Args:
        loaded: The model.
        batch: The groups.
        grids: The (time, height, width) in patches of each image, where the model places tokens by it.
    """
    pieces, places, layout, images, last = [], [], [], [], []
    start = 0
    for group in batch:
        positions = _positions(loaded, group.prompts, grids)
        first = group.prompts[0]
        pieces.append(first.tokens[: group.shared])
        places.append(positions[0][:, : group.shared])
        images += first.images[: np.searchsorted(first.image_ends, group.shared, "right")]
        for prompt, place in zip(group.prompts, positions, strict=True):
            pieces.append(prompt.tokens[group.shared :])
            places.append(place[:, group.shared :])
            images += prompt.images[np.searchsorted(prompt.image_ends, group.shared, "right") :]
        suffixes = tuple(len(prompt.tokens) - group.shared for prompt in group.prompts)
        layout.append(GroupLayout(start, group.shared, suffixes))
        last.append(start + group.shared + np.cumsum(suffixes) - 1)
        start = layout[-1].end
    position_ids = torch.cat(places, 1)
    columns = torch.from_numpy(np.concatenate(last))
    arguments = {
        "input_ids": torch.from_numpy(np.concatenate(pieces))[None],
        "position_ids": position_ids[:, None] if len(position_ids) > 1 else position_ids,
        "layout": tuple(layout),
    }
    return Inputs(arguments, tuple(images), (torch.zeros_like(columns), columns))


def padded(loaded: LoadedModel, batch: Sequence[Group]) -> Inputs:
    """Returns a row for each prompt, padded on the left to the longest."""
    prompts = [prompt for group in batch for prompt in group.prompts]
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), loaded.tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens)
        mask[row, longest - len(prompt.tokens) :] = 1
    kinds = token_kinds(loaded.processor, tokens)
    arguments = {"input_ids": tokens, "attention_mask": mask, **kinds}
    rows = torch.arange(len(prompts))
    images = tuple(key for prompt in prompts for key in prompt.images)
    return Inputs(arguments, images, (rows, torch.full_like(rows, longest - 1)))


def _positions(loaded: LoadedModel, prompts: Sequence[Prompt], grids: dict[str, Any]) -> list[torch.Tensor]:
    """The (axes, tokens) positions of whole prompts, from the model itself where it has several axes."""
    core = loaded.base_model.base_model
    if not hasattr(core, "get_rope_index"):
        return [torch.arange(len(prompt.tokens))[None] for prompt in prompts]
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = torch.from_numpy(prompt.tokens)
        mask[row, : len(prompt.tokens)] = 1
    shown = [grids[key] for prompt in prompts for key in prompt.images]
    found, _ = core.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == loaded.image_token_id).int(),
        image_grid_thw=torch.tensor(shown) if shown else None,
        attention_mask=mask,
    )
    return [found[:, row, : len(prompt.tokens)] for row, prompt in enumerate(prompts)]
