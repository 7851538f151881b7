"""R_info: how much of a reference text the keywords keep, by sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recllm.mllm.embedding import DEFAULT_ENCODER, Encoder, embed_texts, find_encoder
from recllm.training.rewards.answers import Answer, Source


class Information:
    """MMSRARec's R_info = cos(phi(W), phi(t)), for the keywords W and the reference t; in [0, 1].

    Ours: a negative cosine counts as 0, and one above `cap` as `cap`, by which it is divided: what a keyword
    list of a person's length reaches is enough, and only copying goes further.

    Args:
        encoder: The sentence encoder phi.
        cap: The cosine that is worth 1.
        device: Where it runs; None for the accelerator where there is one.
    """

    def __init__(
        self, encoder: str | Encoder = DEFAULT_ENCODER, *, cap: float = 1.0, device: str | None = None
    ) -> None:
        self._encoder = encoder if isinstance(encoder, Encoder) else find_encoder(encoder)
        self._cap, self._device = cap, device
        self._references: dict[str, np.ndarray] = {}

    @staticmethod
    def applies(source: Source) -> bool:
        """Returns whether there is a reference to compare with."""
        return bool(source.reference)

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """Returns a number for each answer; None where its source has no reference."""
        new = {
            answer.source.reference
            for answer in answers
            if answer.source.reference and answer.source.reference not in self._references
        }
        texts = list(dict.fromkeys([answer.content for answer in answers if answer.source.reference]))
        vectors = self._unit_vectors([*texts, *sorted(new)])
        self._references |= dict(zip(sorted(new), vectors[len(texts) :], strict=True))
        written = dict(zip(texts, vectors[: len(texts)], strict=True))
        return [
            self._value(written[answer.content] @ self._references[answer.source.reference])
            if answer.source.reference
            else None
            for answer in answers
        ]

    def _value(self, cosine: float) -> float:
        return float(min(max(cosine, 0.0), self._cap) / self._cap)

    def _unit_vectors(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, 1), np.float32)
        vectors = embed_texts(texts, self._encoder, device=self._device).vectors
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms > 0, norms, 1)
