"""Reasoning in answers and prompts."""

from __future__ import annotations

import pytest

from recllm.errors import DataError
from recllm.mllm.chat import Result
from recllm.mllm.generation.reasoning import answered, opens_reasoning, without_reasoning
from recllm.mllm.rendering import refuse_open_reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nhm\n</think>\n\nA red mug", "A red mug"),
        ("hm, a mug</think>A red mug", "A red mug"),  # begun by the prompt
        ("<think></think>A red mug", "A red mug"),
        ("<think>a</think><think>b</think>A red mug", "A red mug"),
        ("<think>never ended", ""),
        ("[THINK]hm[/THINK]A red mug", "A red mug"),
        ("◁think▷hm◁/think▷A red mug", "A red mug"),
        (
            "<|channel|>analysis<|message|>hm<|end|>"
            "<|start|>assistant<|channel|>final<|message|>A red mug<|return|>",
            "A red mug",
        ),
        ("analysisWe need a noun.assistantfinalA red mug", "A red mug"),
        ("<|channel|>analysis<|message|>hm", ""),
    ],
)
def test_reasoning_is_taken_away(text: str, answer: str) -> None:
    assert without_reasoning(text) == (answer, True)


@pytest.mark.parametrize("text", ["A red mug", "", "analysis of colors", "The tag <think> opens reasoning"])
def test_answers_without_reasoning_stay_as_they_are(text: str) -> None:
    assert without_reasoning(text) == (text, False)


def test_an_answer_of_nothing_has_failed() -> None:
    for text in ("", " \n", "<think>too long", "<think>x</think>"):
        result, _ = answered(Result(b"k", text, 5, 5, "stop"))
        assert result.error is not None and result.error.startswith("empty: ")
    result, found = answered(Result(b"k", "<think>x</think>fine", 5, 5, "stop"))
    assert (result.text, result.error, found) == ("fine", None, True)


def test_a_prompt_that_opens_reasoning_is_refused() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_reasoning("<|im_start|>assistant\n")
    with pytest.raises(DataError, match=r"ends in '.*<think>'"):
        refuse_open_reasoning("assistant\n<think>\n", "a")
