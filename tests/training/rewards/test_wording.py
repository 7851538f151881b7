"""Properties of the parts that need no model, and of the gates: what never pays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import DataError
from recllm.training.rewards import Answer, RewardSettings, Source, make_rewards, total
from recllm.training.rewards.wording import (
    distinctness,
    form,
    in_band,
    length,
    longest_run,
    originality,
    paper_length,
)

WORDS = ["red", "mug", "striped", "cotton", "round", "warm", "steel", "blue", "tall", "soft", "old", "new"]
SHOWN = "A hand made mug of white clay from a small workshop by the sea, fired twice and glazed by hand."
PLAIN = {"length": 1.0, "form": 1.0, "distinctness": 1.0, "originality": 1.0}


def answer(text: str, *, finished: bool = True, shown: str = SHOWN, form: str = "keywords") -> Answer:
    return Answer(Source("i/text", "i", "text", (), shown=shown, form=form), text, finished)


def listed(count: int, repeated: int = 0) -> Answer:
    return answer(", ".join(WORDS[:count] + WORDS[:1] * repeated))


def worth(*answers: Answer, **settings) -> np.ndarray:
    rewards = make_rewards(RewardSettings(PLAIN, **settings))
    return rewards.total(rewards(answers))


def test_length_is_flat_in_the_band_and_falls_linearly_on_both_sides():
    values = [length(listed(count), 3, 6) for count in range(1, 13)]
    assert values[2:6] == [1.0] * 4
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert values[5:] == pytest.approx([1 - step / 6 for step in range(7)])
    assert [in_band(listed(count), 3, 6) for count in (2, 3, 6, 7)] == [False, True, True, False]


def test_repetitions_do_not_fill_the_band_but_overfill_it():
    assert length(listed(1, repeated=2), 3, 6) == pytest.approx(1 / 3)
    assert length(listed(6, repeated=3), 3, 6) == pytest.approx(0.5)


def test_the_papers_length_is_highest_for_nothing_and_a_map_of_minus_the_length():
    values = [paper_length(listed(count)) for count in range(0, 13)]
    assert values == pytest.approx([1 - count / 12 for count in range(13)])


def test_form_is_the_share_of_keywords():
    assert form(answer("red, mug, striped")) == 1
    assert form(answer("Sure, here are the keywords for this item: red, mug, striped")) < 0.5
    assert form(answer("red, mug, mug")) < 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("red, mug, blue", 1), ("red, red mug, mug", 2 / 3), ("red, red, red", 1 / 3), ("salt & pepper", 1)],
)
def test_distinctness_counts_keywords_that_add_a_word(text, expected):
    assert distinctness(answer(text)) == pytest.approx(expected)


def test_a_summary_that_repeats_itself_is_less_distinct():
    said = "The mug is red and round. "
    once, thrice = answer(said, form="summary"), answer(said * 3, form="summary")
    assert distinctness(once) == 1
    assert distinctness(thrice) < 0.5


def test_copied_runs_lower_originality_and_names_do_not():
    assert originality(answer("hand made mug, white clay, workshop")) == 1
    copied = [originality(answer(", ".join(SHOWN.split()[:count]))) for count in (3, 4, 6, 8)]
    assert copied[0] == 1
    assert copied == sorted(copied, reverse=True)
    assert copied[-1] == 0
    assert originality(answer(SHOWN, form="summary")) == 0


def test_the_longest_run_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        one, other = ([str(v) for v in rng.integers(3, size=12)] for _ in range(2))
        brute = max(
            (
                end - start
                for start in range(12)
                for end in range(start, 13)
                if any(one[start:end] == other[p : p + end - start] for p in range(13))
            ),
            default=0,
        )
        assert longest_run(one, other) == brute


@given(st.lists(st.sampled_from(WORDS), min_size=3, max_size=6, unique=True), st.integers(1, 5), st.data())
def test_repeating_never_pays(words, times, data):
    again = data.draw(st.sampled_from(words))
    before, after = worth(answer(", ".join(words)), answer(", ".join(words + [again] * times)))
    assert after < before


@given(st.lists(st.sampled_from(WORDS), min_size=3, max_size=5, unique=True))
def test_copying_never_pays(words):
    plain, copied = worth(answer(", ".join(words)), answer(", ".join(SHOWN.split()[: len(words) + 1])))
    assert copied < plain


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_an_empty_answer_is_never_best(words):
    values = worth(answer(""), answer("..."), answer(", ".join([*words, "red"])))
    assert values[0] == values[1] == 0 < values[2]


def test_parts_are_bounded_and_do_not_depend_on_the_batch():
    texts = [
        "red, mug",
        "",
        "Here you are: a, b",
        "x" * 5000,
        "red " * 300,
        "<|im_end|>",
        "1. a\n2. b",
        "紅い, 器",
    ]
    rewards = make_rewards(RewardSettings({**PLAIN, "paper_length": 1}))
    answers = [answer(text) for text in texts]
    together = rewards(answers)
    assert ((together >= 0) & (together <= 1)).all()
    np.testing.assert_array_equal(together[::-1], rewards(answers[::-1]))
    np.testing.assert_array_equal(together, np.concatenate([rewards([each]) for each in answers]))


def test_an_answer_that_was_cut_off_counts_nowhere_or_least():
    cut = answer("red, mug, striped, cot", finished=False)
    assert math.isnan(worth(cut)[0])
    assert worth(cut, truncated="minimum")[0] == 0


def test_content_counts_in_the_band_alone(monkeypatch, tmp_path):
    (tmp_path / "own_rewards.py").write_text("def half(answers):\n    return [0.5 for _ in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = make_rewards(RewardSettings({"own_rewards:half": 1.0, "length": 0.0}))
    np.testing.assert_allclose(rewards([listed(3), listed(1)])[:, 0], 0.5)  # a part of one's own is not gated
    monkeypatch.setattr("recllm.training.rewards.table.CONTENT", ("own_rewards:half",))
    np.testing.assert_allclose(rewards([listed(3), listed(1), listed(9)])[:, 0], [0.5, 0, 0])


def test_parts_of_weight_zero_are_told_and_do_not_count():
    rewards = make_rewards(RewardSettings({"length": 1.0, "form": 0.0}))
    table = rewards([answer("Here are some: red, mug, blue")])
    assert table[0, 1] < 1
    assert rewards.total(table)[0] == table[0, 0]


def test_the_total_leaves_out_what_does_not_apply():
    table = np.array([[1.0, np.nan, 0.5], [np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(total(table, [1, 5, 3]), [2.5 / 4, np.nan])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lenght": 1.0}, "nearest is 'length'"),
        ({"length": -1.0}, "expected 0 or more"),
        ({"length": 0.0}, "weight above 0"),
        ({}, "weight above 0"),
        ({"nowhere:to": 1.0}, "No module named"),
        ({"recllm.files:MANIFEST": 1.0}, "a str, not a function"),
    ],
)
def test_unusable_rewards_are_refused(weights, message):
    with pytest.raises(DataError, match=message):
        make_rewards(RewardSettings(weights))


@pytest.mark.parametrize("value", ["1.5", "float('nan')", "-0.1"])
def test_a_part_of_ones_own_out_of_bounds_is_an_error(value, monkeypatch, tmp_path):
    (tmp_path / "wild_rewards.py").write_text(f"def wild(answers):\n    return [{value} for _ in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "wild_rewards", raising=False)
    rewards = make_rewards(RewardSettings({"wild_rewards:wild": 1.0}))
    with pytest.raises(DataError, match="expected a number from 0 to 1"):
        rewards([listed(3)])
