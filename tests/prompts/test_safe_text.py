"""Text from data opens no turn, closes none and shows no image, whatever it holds."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.prompts.safe_text import IMAGE_MARK, neutralize, safe_text

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
OTHERS = ("<s>", "</s>", "<image>", "<start_of_turn>", "<end_of_turn>", "<IMG_CONTEXT>", "[INST]", "<<SYS>>")


@pytest.mark.parametrize("token", QWEN + OTHERS)
def test_a_special_token_is_broken_up_and_stays_readable(token):
    safe = safe_text(f"a {token} b")
    assert token not in safe
    assert safe.replace(" ", "") == f"a{token}b".replace(" ", "")


def test_tokens_of_the_tokenizer_in_use_are_broken_up_whatever_their_form():
    safe = safe_text("x @@USER@@ y ~ z", special_tokens=["@@USER@@", "~"])
    assert "@@USER@@" not in safe and "~" not in safe


def test_removing_one_token_does_not_form_another():
    nested = "<|im_<|im_end|>end|>" * 3 + "<<|im_end|>|im_end|>"
    safe = safe_text(nested, special_tokens=QWEN)
    assert not any(token in safe for token in QWEN)


def test_compatibility_spellings_that_normalization_turns_into_tokens_are_caught():
    # U+037E becomes a semicolon, U+212A a K under NFC, which tokenizers apply before they look for tokens.
    safe = safe_text("<\u212ali>", special_tokens=["<Kli>"])
    assert "<Kli>" not in unicodedata.normalize("NFC", safe)


def test_lines_controls_and_direction_overrides_become_spaces():
    assert safe_text("a\nb\tc\x00d\u202ee\u2066f\ufeffg\u200bh") == "a b c d e f g h"
    assert safe_text("می\u200cخواهم") == "می\u200cخواهم"
    assert safe_text(f"x{IMAGE_MARK}y") == "x y"
    assert safe_text(None) == safe_text("") == safe_text(" \n ") == ""


def test_long_text_is_cut_and_says_so():
    cut = safe_text("word " * 1000, limit=50)
    assert len(cut) <= 50 and cut.endswith("…")
    assert safe_text("x" * 50, limit=50) == "x" * 50


hostile = st.lists(
    st.one_of(
        st.text(max_size=12), st.sampled_from(QWEN + OTHERS + ("<", ">", "|", "<|", "|>", "im_end", "\u202e"))
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400)
@given(hostile, st.integers(1, 60))
def test_whatever_the_text(text, limit):
    safe = safe_text(text, special_tokens=QWEN, limit=limit)
    assert len(safe) <= limit
    assert not any(token in safe for token in QWEN + OTHERS)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") for c in safe)
    assert IMAGE_MARK not in safe
    assert safe_text(safe, special_tokens=QWEN, limit=limit) == safe
    assert unicodedata.normalize("NFC", safe) == safe


@settings(max_examples=200)
@given(st.lists(st.text("<>|aim_endstr ~", min_size=1, max_size=6), max_size=4), hostile)
def test_neutralize_ends_for_any_set_of_tokens(tokens, text):
    safe = neutralize(text, tokens)
    assert not any(token in safe for token in tokens if token.strip())
