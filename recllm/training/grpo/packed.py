"""Log-probabilities of a batch of answers; what answers to one prompt share is computed once. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from recllm.mllm.prefix.attention import shared_prefix_attention
from recllm.training.collate import IMAGE_KEYS, Collator
from recllm.training.packing import IGNORED

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore


class PackedAnswers:
    """Packs a batch of padded prompts with answers into one row, where answers share prompt and picture.

    TRL computes the prompt, and the vision tower its picture, for each of the G answers. Here the language
    model goes through a prompt once a batch, and the tower through a picture once, or not at all where a
    visual store has its tokens.

    Args:
        loaded: The model; what trains it may be wrapped around its layers meanwhile.
        visual_store: Where images' tokens are read; None to run the vision tower.
    """

    def __init__(self, loaded: LoadedModel, visual_store: VisualStore | None = None) -> None:
        self._collate = Collator(loaded, visual_store=visual_store, share_prefixes=True)
        self._decoder = loaded.base_model.get_decoder()
        self._loaded, self._store = loaded, visual_store

    def sharing(self) -> AbstractContextManager[None]:
        """Switches the language model to packed rows; in training for the backward pass as well."""
        return shared_prefix_attention(self._decoder)

    def __call__(
        self,
        model: Any,
        tokens: torch.Tensor,
        attended: torch.Tensor,
        answer: int,
        images: Sequence[Sequence[str]],
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the log-probabilities of the answers' tokens, (rows, answer), and their entropies.

        Args:
            model: The model with TRL's fused head, also in the wrapper of DDP or DeepSpeed.
            tokens: (rows, prompt + answer), prompts padded on the left, answers on the right.
            attended: Which of them are not padding.
            answer: The longest answer.
            images: The files of each row's images.
            entropy: Whether entropies are wanted.
        """
        lengths = attended[:, -answer:].sum(1).tolist()
        groups: dict[Any, list[dict[str, Any]]] = {}
        for place, (row, mask, shown) in enumerate(
            zip(tokens.cpu(), attended.bool().cpu(), images, strict=True)
        ):
            whole = row[mask].tolist()
            start = len(whole) - lengths[place]
            key = tuple(whole[:start]), tuple(shown)
            groups.setdefault(key, []).append(
                {
                    "id": str(place),
                    "input_ids": whole,
                    "start": start,
                    "end": len(whole),
                    "images": list(shown),
                }
            )
        rows = [{**row, "group": number} for number, of in enumerate(groups.values()) for row in of]
        batch = self._collate(rows)
        labels = batch.pop("labels").to(tokens.device)
        inputs = {
            name: value.to(tokens.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        if keys := inputs.pop(IMAGE_KEYS, None):
            dtype = self._loaded.model.get_input_embeddings().weight.dtype
            inputs |= self._store.mm_inputs(keys, tokens.device, dtype)
        outputs = model(**inputs, labels=labels, fused_lm_head=True)
        labeled = labels[0, 1:] != IGNORED
        counts = [row["end"] - row["start"] for row in rows]
        order = [int(row["id"]) for row in rows]

        def unpacked(values: torch.Tensor) -> torch.Tensor:
            pieces = dict(zip(order, values[0][labeled].split(counts), strict=True))
            padded = [
                torch.nn.functional.pad(pieces[row], (0, answer - lengths[row])) for row in range(len(order))
            ]
            return torch.stack(padded)

        return unpacked(outputs.log_probs), unpacked(outputs.entropy) if entropy else None
