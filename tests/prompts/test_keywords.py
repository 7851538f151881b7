"""Keywords out of a model's answer, and out of reviews."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.prompts.keywords import Keywords, parse_keywords, read_keywords
from recllm.prompts.reveal import review_keywords

COMMON = ["red circle", "striped", "mug"]
FORMS = [
    "red circle, striped, mug",
    "Keywords: red circle, striped, mug.",
    "Here are the keywords: 'red circle', \"striped\"; mug",
    "1. red circle\n2. striped\n3) mug",
    "- red circle\n- **striped**\n* mug\n- Red Circle",
    "red circle，striped、mug",
    "Image: red circle, striped, mug, MUG",
    "1) red circle 2) striped 3) mug",
    "1. red circle 2. striped 3. mug",
    "(a) red circle (b) striped (c) mug",
    "[1] red circle [2] striped [3] mug",
    '["red circle", "striped", "mug"]',
    '```json\n{"keywords": ["red circle", "striped", "mug"]}\n```',
    '{"image": ["red circle", "striped"], "text": ["mug"]}',
    '{"red circle": 0.9, "striped": 0.8, "mug": 1}',
    'Here you go:\n["red circle", "striped", "mug"]\nLet me know if you need more.',
    "['red circle', 'striped', 'mug',]",
    "red circle / striped / mug",
    "red circle/striped/mug",
    "red circle | striped | mug",
    "red circle > striped > mug",
    "• red circle • striped • mug",
    "red circle; striped; mug;",
    "Red circle. Striped. Mug.",
    "red circle, striped, and mug",
    "**Image Keywords:**\n- red circle\n- striped\n\n**Text Keywords:**\n- mug\n- `Striped`",
    "## Keywords\n* red circle\n* striped\n* mug",
    "Sure! Here are three to six keywords for the item: red circle, striped, mug. Let me know if it helps!",
    "Here are three to six keywords for the item\nred circle\nstriped\nmug",
    "**Shape**: red circle\n**Pattern**: striped\n**Type**: mug",
    "Shape**: red circle, Pattern**: striped, Type**: mug",
    "- **Red circle**: The mug shows a red circle, in bold.\n- **Striped**: It has stripes.\n- **Mug**",
    "<think>They want keywords, perhaps blue.</think>\n\nred circle, striped, mug",
    "They want keywords, perhaps blue.</think>red circle, striped, mug",
    "<keywords>red circle, striped, mug</keywords><|im_end|>",
    "Answer: \\boxed{red circle, striped, mug}",
    "🔴 red circle\n🔵 striped\n☕ mug",
    "red circle, None, striped, N/A, mug, unknown, not visible, etc.",
    "red circle, Red-Circle, striped, STRIPED!, mug",
    "red circle, striped, mug\nI chose these because they describe the item best.",
]


@pytest.mark.parametrize("answer", FORMS)
def test_usual_forms_of_an_answer(answer):
    assert [word.casefold() for word in parse_keywords(answer)] == COMMON


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("#cozy #warm #home-decor", ["cozy", "warm", "home-decor"]),
        ("#CozyHome, #5 brush, C#, C++", ["CozyHome", "5 brush", "C#", "C++"]),
        ("好的，以下是三个关键词：红色、圆形；杯子", ["红色", "圆形", "杯子"]),
        ("红色 圆形 杯子", ["红色", "圆形", "杯子"]),
        ("1、红色 2、圆形", ["红色", "圆形"]),
        ("キーワード：赤、丸い、マグ", ["赤", "丸い", "マグ"]),
        ("أحمر، دائري؛ كوب", ["أحمر", "دائري", "كوب"]),
        ("Ключевые слова: красный, круглый", ["красный", "круглый"]),
        ("Voici les mots-clés : rouge, rond", ["rouge", "rond"]),
        ("लाल, गोल", ["लाल", "गोल"]),
        (
            "1,5 l, 10,000 pieces, 3-in-1, 16:9, 5.1 sound",
            ["1,5 l", "10,000 pieces", "3-in-1", "16:9", "5.1 sound"],
        ),
        ("AC/DC, 1/2 inch, km/h, black/white", ["AC/DC", "1/2 inch", "km/h", "black", "white"]),
        ("salt & pepper, T-shirt, t shirt", ["salt & pepper", "T-shirt"]),
        ("mug (large), mug (pack of 2), cup (red", ["mug (large)", "mug (pack of 2)", "cup red"]),
        ("St. Louis, No. 5, Dr. Seuss", ["St. Louis", "No. 5", "Dr. Seuss"]),
        ("This Is Us, It Takes Two, The Last of Us", ["This Is Us", "It Takes Two", "The Last of Us"]),
    ],
)
def test_signs_that_belong_to_keywords_and_other_languages(answer, expected):
    assert parse_keywords(answer) == expected


@pytest.mark.parametrize(
    ("answer", "dropped"),
    [
        ("Here are three to six keywords for the item", {"sentences": 1}),
        ("The image shows a red mug, striped and shiny, on a table.", {"sentences": 1}),
        ("It is red.", {"sentences": 1}),
        ("I'm sorry, but I can't see the image.", {"sentences": 1}),
        ("これは赤いマグカップです。", {"sentences": 1}),
        ("None", {"placeholders": 1}),
        ("No image provided.", {"placeholders": 1}),
        ("<think>red, blue", {"reasoning": 1}),
        ("**Keywords:**", {"labels": 1}),
        ("[]", {}),
    ],
)
def test_an_answer_without_keywords_gives_none_and_says_why(answer, dropped):
    read = read_keywords(answer)
    assert (read.words, dict(read.dropped)) == ([], dropped)


def test_what_was_dropped_is_counted_by_reason():
    answer = "Sure!\nColor: red, RED, n/a, " + "x" * 61 + ", blue, green"
    assert read_keywords(answer, most=2) == Keywords(
        ["red", "blue"],
        Counter(
            {
                "sentences": 1,
                "labels": 1,
                "repetitions": 1,
                "placeholders": 1,
                "too long": 1,
                "over the limit": 1,
            }
        ),
    )


def test_the_last_keyword_of_an_answer_that_was_cut_off_is_left_out():
    for answer in ("red, blue, gre", '["red", "blue", "gre', "- red\n- blue\n- gre"):
        read = read_keywords(answer, cut_off=True)
        assert read.words == ["red", "blue"] and read.dropped["cut off"] == 1
    assert read_keywords("red, blue,", cut_off=True).words == ["red", "blue"]


def test_sentences_and_signs_are_no_keywords():
    sentence = "This is a very long sentence which explains at length what can be seen in the picture"
    assert parse_keywords(f"{sentence}. mug, ..., 3-pack") == ["mug", "3-pack"]
    assert parse_keywords(f"mug, {sentence}, 3-pack") == ["mug", "3-pack"]
    assert parse_keywords("") == parse_keywords("—, !") == []
    assert len(parse_keywords(", ".join(f"word{n}" for n in range(50)), most=6)) == 6


FRAGMENTS = [
    *(
        "red",
        "Blue mug",
        "1)",
        "2)",
        "1.",
        "2. ",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        ",",
        ", ",
        ";",
        ": ",
    ),
    *(
        "：",
        "、",
        "\n- ",
        "* ",
        "**",
        "# ",
        " / ",
        "/",
        " - ",
        "<think>",
        "</think>",
        "```json\n",
        "Here are",
    ),
    *(
        "keywords",
        "None",
        " is ",
        " The ",
        "It is a mug",
        ".",
        "?",
        "! ",
        "。",
        "and ",
        "&",
        "#cozy",
        "1,5 l",
        "St. ",
    ),
    *(
        "红色",
        "圆形",
        " ",
        "\t",
        "|",
        "…",
        "<br>",
        "\\boxed{",
        "(b) ",
        "[1] ",
        "👍",
        "\u200b",
        "ा",
        "ſ",
        "İ",
        "①",
    ),
    *("x" * 30, "etc.", "16:9", "word " * 9),
]
answers = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(answers, st.booleans())
def test_any_answer_gives_clean_and_different_keywords_in_order(answer, cut_off):
    keywords = read_keywords(answer, cut_off=cut_off).words
    assert len({word.casefold() for word in keywords}) == len(keywords) <= 12
    assert all(word == word.strip() and 0 < len(word) <= 60 and "\n" not in word for word in keywords)
    assert parse_keywords(", ".join(keywords)) == keywords


@given(st.lists(st.sampled_from(["red", "mug", "striped", "blue", "AC/DC", "3-in-1"]), unique=True))
def test_order_is_kept(words):
    assert parse_keywords("\n".join(f"- {word}" for word in words)) == words


@pytest.mark.parametrize(
    "unit",
    ["a", "a: ", "1) ", "1. ", "1、", "(", "[", '{"a":', "<think>", "</think>", "a, ", "abc/", "St. ", "红 "],
)
def test_reading_a_hostile_answer_takes_linear_time(unit):
    read_keywords(unit)
    seconds = []
    for size in (12_500, 100_000):
        started = time.process_time()
        read_keywords(unit * (size // len(unit)))
        seconds.append(time.process_time() - started)
    assert seconds[1] < max(0.5, 24 * seconds[0])  # 8 times the length; quadratic time would be 64 times


def test_review_keywords_are_the_most_frequent_words_without_stop_words():
    reviews = ["The strap is TOO short!", "Short strap; don't buy. It's the strap", "Color, color: fine"]
    assert review_keywords(reviews, 3) == ["strap", "color", "short"]
    assert review_keywords(reviews[::-1], 3) == ["strap", "color", "short"]
    assert review_keywords(["It’s not the one 123 45 a"]) == []
