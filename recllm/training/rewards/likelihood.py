"""Parts that a frozen language model judges by how probable it finds a text: reconstruction and agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recllm.mllm.chat import message, text_part
from recllm.mllm.prefix.attention import shared_prefix_attention
from recllm.mllm.scoring.scorer import can_share_prefix
from recllm.prompts.safe_text import safe_text
from recllm.prompts.templates import Template
from recllm.training.collate import Collator
from recllm.training.conversations import ConversationEncoder
from recllm.training.packing import IGNORED
from recllm.training.rewards.answers import LONGEST_TEXT, Answer, Source

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel

RECONSTRUCTION = Template(
    "mmsrarec.reconstruction",
    "An item of a shop has these keywords: {keywords}\nWrite its description.",
    {"keywords": "the keywords that were written of the item"},
    required=("keywords",),
    source="the condition of R_recon; the words are ours",
)
"""The prompt that an item's description is to follow from."""

CLIP = 8.0
"""Nats a token at which a description counts as not reconstructed: a perplexity of 3,000. Ours."""
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16_384}


class FrozenModel:
    """A language model that judges and does not learn: another model, or a policy without its adapter.

    A policy that scored its own texts could raise their likelihood by itself; its base cannot change.

    Args:
        loaded: The model. Where it has an adapter that is being trained, give `policy=True`.
        folder: The dataset folder, which image paths are relative to.
        policy: Switch the adapter off meanwhile.
        batch_tokens: The most tokens in one forward pass; by default 4,096 on a CPU, 16,384 on a GPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        folder: Path,
        *,
        policy: bool = False,
        batch_tokens: int | None = None,
    ) -> None:
        self._loaded, self._policy = loaded, policy
        self._encoder = ConversationEncoder(loaded, folder)
        self._shares = can_share_prefix(loaded.base_model)
        self._collate = Collator(loaded, share_prefixes=self._shares)
        self._budget = batch_tokens or _BATCH_TOKENS.get(loaded.model.device.type, 16_384)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What no text may spell."""
        return self._loaded.special_tokens

    def log_probabilities(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Returns the mean log-probability of a completion's tokens, its end included; float64, (rows,).

        Args:
            rows: With id, prompt and completion (chats), images (paths) and group: equal for neighboring rows
                whose prompts begin alike.
        """
        encoded = []
        for row in rows:
            each = self._encoder.encode(row)
            encoded.append(
                {
                    "id": each.id,
                    "input_ids": each.tokens,
                    "start": each.start,
                    "end": each.end,
                    "images": [str(image) for image in each.images],
                    "group": row["group"],
                }
            )
        found = np.empty(len(rows))
        with torch.no_grad(), self._frozen():
            for places in _batches(encoded, self._budget):
                found[places] = self._forward([encoded[place] for place in places])
        return found

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        model = self._loaded.model
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with model.disable_adapter() if self._policy else nullcontext():
                yield
        finally:
            for module in training:
                module.training = True

    def _forward(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        model = self._loaded.base_model
        batch = self._collate(rows)
        labels = batch.pop("labels")[:, 1:]
        labeled = labels != IGNORED
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in batch.items()
        }
        with self._sharing():
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        head = model.get_output_embeddings()
        hidden = hidden[labeled.to(hidden.device)]
        wanted = labels[labeled].to(hidden.device)
        values = []
        for some, which in zip(hidden.split(512), wanted.split(512), strict=True):
            logits = head(some.to(head.weight.dtype)).float()
            values.append(logits.log_softmax(-1).gather(1, which[:, None])[:, 0])
        counts = [row["end"] - row["start"] for row in rows]
        return [float(each.double().mean()) for each in torch.cat(values).split(counts)]

    def _sharing(self) -> AbstractContextManager[None]:
        if not self._shares:
            return nullcontext()
        return shared_prefix_attention(self._loaded.base_model.get_decoder())


class Reconstruction:
    """R_recon: how well a frozen language model foresees the reference text from the keywords.

        L = -1/N sum_j log P(w_j | w_<j, W),    R = 1 - min(L, clip) / clip

    for the N tokens w of the reference. The paper's -exp(L) (`paper=True`) is unbounded; here it is mapped to
    [0, 1] by (e^clip - min(e^L, e^clip)) / (e^clip - 1), which is affine below the clip, so that the
    advantages of a group are those of the negative perplexity itself.

    Args:
        judge: The frozen model.
        clip: Nats a token that are worth 0.
        paper: Perplexity in place of its logarithm.
    """

    def __init__(self, judge: FrozenModel, *, clip: float = CLIP, paper: bool = False) -> None:
        self._judge, self._clip, self._paper = judge, clip, paper

    @staticmethod
    def applies(source: Source) -> bool:
        """Returns whether there is a reference to reconstruct."""
        return bool(source.reference)

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """Returns a number for each answer; None where its source has no reference."""
        judged = [place for place, answer in enumerate(answers) if self.applies(answer.source)]
        tokens = self._judge.special_tokens

        def row(answer: Answer) -> dict[str, Any]:
            keywords = safe_text(answer.content, special_tokens=tokens, limit=LONGEST_TEXT)
            prompt = RECONSTRUCTION.fill({"keywords": keywords}, tokens)
            return _row(answer, message("user", prompt), answer.source.reference, tokens)

        return _spread(
            len(answers), judged, _distinct(self._judge, [row(answers[p]) for p in judged], self._value)
        )

    def _value(self, log_probability: float) -> float:
        loss = min(-log_probability, self._clip)
        if self._paper:
            most = math.exp(self._clip)
            return (most - math.exp(loss)) / (most - 1)
        return 1 - loss / self._clip


class Agreement:
    """R_image, ours: how much more probable the answer is beside its own picture than beside another's.

        R = sigmoid(1/N sum_j [log P(w_j | w_<j, image) - log P(w_j | w_<j, other image)])

    under a frozen multimodal model that is asked the same prompt. Words that fit any picture are worth 1/2,
    wrong ones less: what is said of the image must come from it.

    Args:
        judge: The frozen model.
        others: The image of another item for each item that has one, the same in the whole run.
    """

    def __init__(self, judge: FrozenModel, others: Mapping[str, str]) -> None:
        self._judge, self._others = judge, others

    def applies(self, source: Source) -> bool:
        """Returns whether there is one image to agree with, and another one to compare it with."""
        return len(source.images) == 1 and source.item in self._others

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """Returns a number for each answer; None where its prompt shows no image, or several."""
        judged = [place for place, answer in enumerate(answers) if self.applies(answer.source)]
        rows = []
        for place in judged:
            answer = answers[place]
            for image in (answer.source.images[0], self._others[answer.source.item]):
                rows.append(_row_of_prompt(answer, image, self._judge.special_tokens))
        values = _distinct(self._judge, rows, float)
        pairs = zip(values[::2], values[1::2], strict=True)
        return _spread(len(answers), judged, [1 / (1 + math.exp(other - own)) for own, other in pairs])


def _row(answer: Answer, prompt: Any, text: str, tokens: Sequence[str]) -> dict[str, Any]:
    said = safe_text(text, special_tokens=tokens, limit=LONGEST_TEXT)
    return {
        "id": answer.source.id,
        "prompt": [prompt],
        "completion": [{"role": "assistant", "content": [text_part(said)]}],
        "images": [],
        "key": ("", str(prompt), said),
    }


def _row_of_prompt(answer: Answer, image: str, tokens: Sequence[str]) -> dict[str, Any]:
    said = safe_text(answer.content, special_tokens=tokens, limit=LONGEST_TEXT)
    return {
        "id": answer.source.id,
        "prompt": list(answer.source.messages),
        "completion": [{"role": "assistant", "content": [text_part(said)]}],
        "images": [image],
        "key": (image, str(answer.source.messages), said),
    }


def _distinct(
    judge: FrozenModel, rows: Sequence[dict[str, Any]], value: Callable[[float], float]
) -> list[float]:
    """Judges each different row once, those with one prompt and image beside each other."""
    first = {row["key"]: row for row in rows}
    ordered = sorted(first.values(), key=lambda row: row["key"])
    prompts = {key: number for number, key in enumerate(dict.fromkeys(row["key"][:2] for row in ordered))}
    grouped = [{**row, "group": prompts[row["key"][:2]]} for row in ordered]
    found = judge.log_probabilities(grouped) if grouped else []
    by_key = {row["key"]: value(each) for row, each in zip(ordered, found, strict=True)}
    return [by_key[row["key"]] for row in rows]


def _spread(count: int, places: Sequence[int], values: Sequence[float]) -> list[float | None]:
    spread: list[float | None] = [None] * count
    for place, each in zip(places, values, strict=True):
        spread[place] = each
    return spread


def _batches(rows: Sequence[Mapping[str, Any]], budget: int) -> Iterator[list[int]]:
    """Yields neighboring rows whose tokens, padded to the longest, are within the budget."""
    held: list[int] = []
    longest = 0
    for place, row in enumerate(rows):
        longest = max(longest, len(row["input_ids"]))
        if held and longest * (len(held) + 1) > budget:
            yield held
            held, longest = [], len(row["input_ids"])
        held.append(place)
    if held:
        yield held
