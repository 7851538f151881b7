"""Seeded sampling draws from the model's distribution, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from recllm.mllm.chat import Decoding
from recllm.mllm.generation.sampling import sampling_processors


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_distribution(top_p):
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]]).repeat(20_000, 1)
    temperature = 0.8
    keys = [number.to_bytes(4, "big") for number in range(len(logits))]
    decoding = Decoding(temperature=temperature, top_p=top_p, seed=5)
    scores = sampling_processors(decoding, keys, torch.device("cpu"))(None, logits)
    counts = torch.bincount(scores.argmax(-1), minlength=6).numpy()
    probabilities = np.exp(logits[0].double().numpy() / temperature)
    probabilities /= probabilities.sum()
    if top_p < 1:  # the smallest set with this probability, by hand
        kept = np.cumsum(probabilities) - probabilities < top_p
        probabilities = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    assert stats.chisquare(counts[possible], len(logits) * probabilities[possible]).pvalue > 1e-3


def test_samples_of_successive_steps_are_independent():
    logits = torch.zeros(4000, 2)
    keys = [number.to_bytes(4, "big") for number in range(len(logits))]
    processors = sampling_processors(Decoding(temperature=1.0), keys, torch.device("cpu"))
    first, second = (processors(None, logits).argmax(-1) for _ in range(2))
    table = torch.bincount(2 * first + second, minlength=4).numpy()
    assert stats.chisquare(table).pvalue > 1e-3


def test_greedy_decoding_has_no_noise():
    assert not sampling_processors(Decoding(), [b"a"], torch.device("cpu"))
