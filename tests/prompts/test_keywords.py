"""Keywords out of a model's answer, and out of reviews."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.prompts.mmsrarec import parse_keywords
from recllm.prompts.reveal import review_keywords


@pytest.mark.parametrize(
    "answer",
    [
        "red circle, striped, mug",
        "Keywords: red circle, striped, mug.",
        "Here are the keywords: 'red circle', \"striped\"; mug",
        "1. red circle\n2. striped\n3) mug",
        "- red circle\n- **striped**\n* mug\n- Red Circle",
        "red circle，striped、mug",
        "Image: red circle, striped, mug, MUG",
    ],
)
def test_usual_forms_of_an_answer(answer):
    assert [word.casefold() for word in parse_keywords(answer)] == ["red circle", "striped", "mug"]


def test_sentences_and_signs_are_no_keywords():
    sentence = "This is a very long sentence which explains at length what can be seen in the picture"
    assert parse_keywords(f"{sentence}, mug, ..., 3-pack") == ["mug", "3-pack"]
    assert parse_keywords("") == parse_keywords("—, !") == []
    assert len(parse_keywords(", ".join(f"word{n}" for n in range(50)), most=6)) == 6


@given(st.text())
def test_any_answer_gives_clean_and_different_keywords(answer):
    keywords = parse_keywords(answer)
    assert len({word.casefold() for word in keywords}) == len(keywords) <= 12
    assert all(word == word.strip() and 0 < len(word) <= 60 and "\n" not in word for word in keywords)
    assert parse_keywords(", ".join(keywords)) == keywords


def test_review_keywords_are_the_most_frequent_words_without_stop_words():
    reviews = ["The strap is TOO short!", "Short strap; don't buy. It's the strap", "Color, color: fine"]
    assert review_keywords(reviews, 3) == ["strap", "color", "short"]
    assert review_keywords(reviews[::-1], 3) == ["strap", "color", "short"]
    assert review_keywords(["It’s not the one 123 45 a"]) == []
