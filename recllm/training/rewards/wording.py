"""Parts that need no model: length, form, repetition and copying, each one formula."""

from __future__ import annotations

from collections.abc import Sequence

from recllm.training.rewards.answers import Answer, words_of
from recllm.training.rewards.choice import CHOICE_FAULTS, choice_fault

FREE_RUN = 3
"""Words in a row that an answer may share with its prompt; names of products have as many. Ours."""
MOST_KEYWORDS = 12
"""Keywords that are read from an answer; the paper's length is 0 here."""
_GRAM = 3


def length(answer: Answer, least: int, most: int) -> float:
    """R_len, ours: 1 in the band, falling linearly on both sides to 0 at no keyword and at twice the most.

        R_len = min(1, distinct / least, max(0, 2 - all / most))

    Repetitions do not fill the band, and do overfill it. The paper's -|W| (`paper_length`) is highest for an
    empty answer.

    Args:
        answer: The answer.
        least: The fewest keywords (of a summary, words) in the band.
        most: The most.
    """
    return min(1.0, answer.distinct / least, max(0.0, 2 - answer.count / most))


def in_band(answer: Answer, least: int, most: int) -> bool:
    """Returns whether `length` is 1."""
    return least <= answer.distinct and answer.count <= most


def paper_length(answer: Answer, most: int = MOST_KEYWORDS) -> float:
    """MMSRARec's R_len = -|W|, mapped to [0, 1]: 1 - |W| / most.

    The map is affine, so that the advantages of a group are those of -|W| itself. Lists of more than `most`
    keywords count as `most`.
    """
    return 1 - min(answer.count, most) / most


def form(answer: Answer) -> float:
    """R_format, ours: the share of the answer's letters and digits that are keywords.

    1 for a plain list; sentences, labels, reasoning, placeholders and repetitions lower it.
    """
    letters = sum(character.isalnum() for character in answer.text)
    kept = sum(character.isalnum() for word in answer.keywords.words for character in word)
    return min(1.0, kept / letters) if letters else 0.0


def distinctness(answer: Answer) -> float:
    """R_distinct, ours: the share of keywords that add a word which no keyword before them has.

    "red, red mug, mug" has two of three. Of a summary, the share of distinct trigrams among its trigrams
    (1 where it has none).
    """
    if answer.source.form == "summary":
        words = words_of(answer.text)
        grams = [tuple(words[place : place + _GRAM]) for place in range(len(words) - _GRAM + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0
    known: set[str] = set()
    adding = 0
    for keyword in answer.keywords.words:
        own = set(words_of(keyword)) or {keyword.casefold()}
        adding += not own <= known
        known |= own
    return adding / answer.count if answer.count else 0.0


def originality(answer: Answer, free: int = FREE_RUN) -> float:
    """R_original, ours: 1 less the share of the answer that its longest run of copied words takes.

        R_original = 1 - max(0, run - free) / (words - free)

    `run` is the longest run of words that stands in the same order in the text of the prompt, commas
    disregarded; up to `free` words of it are free. Repeated keywords are judged once, so that they dilute
    nothing.
    """
    text = answer.content
    written, shown = words_of(text), words_of(answer.source.shown)
    run = longest_run(written, shown)
    return 1.0 if run <= free else 1 - (run - free) / (len(written) - free)


def longest_run(words: Sequence[str], others: Sequence[str]) -> int:
    """Returns the length of the longest run of words that both sequences have."""
    longest = 0
    before = [0] * (len(others) + 1)
    for word in words:
        now = [0] * (len(others) + 1)
        for place, other in enumerate(others, 1):
            if word == other:
                now[place] = before[place - 1] + 1
                longest = max(longest, now[place])
        before = now
    return longest


def faults(answer: Answer) -> dict[str, bool]:
    """Returns of each way in which a reward might be won, or a choice fail, whether the answer has it."""
    good = answer.usable and answer.finished
    found = {"empty": answer.finished and not answer.usable, "truncated": not answer.finished}
    if answer.source.form == "choice":
        kind = choice_fault(answer) if good else None
        return {**found, **{name: kind == name for name in CHOICE_FAULTS}}
    return {
        **found,
        "repeating": good and distinctness(answer) < 1,
        "copied": good and originality(answer) < 1,
    }
