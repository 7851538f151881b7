"""REVEAL eq. 1: an image's vector under a prompt, e = VLM(image, prompt), by a frozen multimodal LLM.

The language model is causal: the states at an image's tokens see only what precedes them. The prompt
therefore comes before the image ("Repaired": the released extractor puts it behind, where it cannot change
the states that are pooled). The vision tower's tokens come from a visual store, so that only the language
model runs for each prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from recllm.errors import DataError
from recllm.mllm.chat import Request, message
from recllm.mllm.prefix.groups import Group, Prompt, contents_of, halves, plan_padded
from recllm.mllm.prefix.inputs import padded
from recllm.mllm.rendering import render_tokens
from recllm.mllm.vision.images import image_size
from recllm.mllm.vision.slots import ImageSlots
from recllm.prompts.safe_text import IMAGE_MARK, safe_text

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore

Order = Literal["prompt-first", "image-first"]
Pooling = Literal["image", "last", "after"]
PROMPT_LIMIT = 2000
"""Characters of a prompt that are kept; ours."""


@dataclass(frozen=True, slots=True)
class Conditioned:
    """An image under a prompt.

    Attributes:
        name: Names it in errors, for example an item id.
        prompt: The prompt; it is made harmless here, whoever wrote it.
        image: The image's file.
    """

    name: str
    prompt: str
    image: Path


class PromptedEncoder:
    """Encodes images under prompts.

    Args:
        loaded: The model; it is put into inference mode.
        store: The images' visual tokens.
        order: `prompt-first`, or `image-first` as released, which is kept to show that image states are then
            the same for every prompt.
        pooling: The positions whose last hidden states are averaged: the `image`'s tokens, the `last` token
            of the chat (behind the opening of the assistant's turn), or all tokens `after` the image.
        batch_tokens: Most tokens in a batch, padding included. Where the accelerator has too little memory
            for it, it is lowered on the way.

    Attributes:
        identity: What decides a vector besides image and prompt; JSON types only.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store: VisualStore,
        *,
        order: Order = "prompt-first",
        pooling: Pooling = "image",
        batch_tokens: int = 4096,
    ) -> None:
        if batch_tokens < 1:
            raise DataError(f"--batch-tokens {batch_tokens}: expected 1 or more")
        loaded.model.eval()
        self._loaded, self._store, self._slots = loaded, store, ImageSlots(loaded)
        self._order, self._pooling, self._batch_tokens = order, pooling, batch_tokens
        self._sizes: dict[Path, tuple[int, int]] = {}
        self.identity: dict[str, Any] = {
            **loaded.identity,
            "visual_store": store.manifest["dtype"],
            "order": order,
            "pooling": pooling,
        }

    @property
    def width(self) -> int:
        """The length of a vector."""
        return self._loaded.base_model.config.get_text_config().hidden_size

    def safe(self, prompt: str) -> str:
        """Returns a prompt as the model reads it: one line that opens no turn and adds no image."""
        return safe_text(prompt, special_tokens=self._loaded.special_tokens, limit=PROMPT_LIMIT)

    def encode(self, pairs: Sequence[Conditioned]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yields batches of vectors, the longest prompts first.

        A vector depends on its own image and prompt; what is in the same batch changes it by rounding only
        (float32: below 1e-5).

        Args:
            pairs: Images of the visual store, each with its prompt.

        Yields:
            Places in `pairs` and their vectors, of length 1; float32 on the CPU, shape [batch, width].

        Raises:
            DataError: A prompt is empty or longer than the model's context, the chat template moves the
                image, the visual store lacks an image, a vector is not finite, or the memory is too small for
                a single prompt.
        """
        groups = [Group((self._prompt(row, pair),), 0) for row, pair in enumerate(pairs)]
        waiting = plan_padded(groups, self._batch_tokens)[::-1]
        while waiting:
            batch = waiting.pop()
            try:
                vectors = self._run(batch)
            except torch.OutOfMemoryError:
                parts = halves(batch)
                if len(parts) == 1:
                    prompt = batch[0].prompts[0]
                    raise DataError(
                        f"{prompt.id!r}: its {len(prompt.tokens):,} tokens need more memory than the "
                        "accelerator has; lower --max-pixels"
                    ) from None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                waiting += parts[::-1]
                continue
            yield [group.prompts[0].row for group in batch], vectors

    def _prompt(self, row: int, pair: Conditioned) -> Prompt:
        loaded = self._loaded
        if not (words := self.safe(pair.prompt)):
            raise DataError(f"item {pair.name!r}: its prompt is empty; write one, or leave the item out")
        content = f"{words} {IMAGE_MARK}" if self._order == "prompt-first" else f"{IMAGE_MARK}{words}"
        request = Request(pair.name, (message("user", content),), (pair.image,))
        (key,) = self._store.keys_of([pair.image])
        if pair.image not in self._sizes:
            self._sizes[pair.image] = image_size(pair.image)
        size = self._sizes[pair.image]
        text, tokens = render_tokens(loaded, request)
        self._check_order(text, words)
        tokens = self._slots.tokens(text, tokens, [size])
        if len(tokens) > loaded.max_positions:
            raise DataError(
                f"item {pair.name!r}: prompt and image have {len(tokens):,} tokens, but the model takes "
                f"{loaded.max_positions:,}; lower --max-pixels or shorten the prompt"
            )
        contents, ends = contents_of(tokens, loaded.image_token_id, [0], [self._slots.features(size)])
        return Prompt(row, pair.name, tokens, contents, (key,), ends)

    def _check_order(self, text: str, words: str) -> None:
        """Raises a `DataError` if the chat template moved the image to another place (LLaVA's does)."""
        prompt, image = text.find(words), text.find(self._loaded.processor.image_token)
        found = "prompt-first" if 0 <= prompt < image else "image-first"
        if found != self._order:
            remedy = "give --order image-first --pooling last (or after), or take another model"
            raise DataError(
                f"{self.identity['model']}: its chat template writes {found} whatever the order of parts, "
                f"so --order {self._order} cannot be had; {remedy}"
            )

    @torch.inference_mode()
    def _run(self, batch: list[Group]) -> torch.Tensor:
        model = self._loaded.base_model
        inputs = padded(self._loaded, batch)
        images = self._store.mm_inputs(inputs.images, model.device, model.dtype)
        arguments = {name: value.to(model.device) for name, value in inputs.arguments.items()}
        hidden = model.base_model(**arguments, **images, use_cache=False).last_hidden_state
        tokens = arguments["input_ids"]
        pooled = pool(hidden, tokens == self._loaded.image_token_id, self._pooling)
        vectors = torch.nn.functional.normalize(pooled, dim=1).cpu()
        if not torch.isfinite(vectors).all():
            bad = int((~torch.isfinite(vectors)).any(1).int().argmax())
            raise DataError(
                f"item {batch[bad].prompts[0].id!r}: its vector is not finite; the model's numbers overflow, "
                "so load it with --dtype bfloat16 or float32"
            )
        return vectors


def pool(hidden: torch.Tensor, of_image: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Averages the hidden states at some positions of each row.

    Args:
        hidden: Of rows padded on the left; shape [rows, tokens, width].
        of_image: Which tokens are the image's; bool, shape [rows, tokens].
        pooling: See `PromptedEncoder`.

    Returns:
        float32, shape [rows, width].
    """
    if pooling == "last":
        return hidden[:, -1].float()
    places = of_image
    if pooling == "after":
        columns = torch.arange(of_image.shape[1], device=of_image.device)
        last = torch.where(of_image, columns, -1).amax(1, keepdim=True)
        places = columns > last
    weights = places.float() / places.sum(1, keepdim=True)
    return torch.einsum("rt,rtw->rw", weights, hidden.float())
