"""REVEAL's initial prompt of feedback-guided visual extraction, FVE (arXiv 2606.09082, section 4.3)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

import regex

from recllm.prompts.templates import Template

INITIAL = Template(
    "reveal.initial",
    "An item image of a {category}. Item name: {title}. Users often mention: {keywords}. "
    "Focus on the overall appearance of the {item}.",
    {
        "category": "the narrowest category, or `product`",
        "title": "the item's title, or `unknown`",
        "keywords": "the most frequent words of its training reviews, or `nothing yet`",
        "item": "the narrowest category, or `item`",
    },
    source='"Initial Prompt_X Template", section 4.3.2',
)
"""The prompt that the visual embedding of an item is conditioned on, before any feedback."""

TEMPLATES = (INITIAL,)

# Function words of English, with what reviews add to them. The paper removes stop words and does not say
# which.
STOP_WORDS = frozenset(
    """
    a about above after again all also am an and any are aren't as at be because been before being below
    between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during
    each even ever few for from further get gets getting got had hadn't has hasn't have haven't having he her
    here hers herself him himself his how however i i'd i'll i'm i've if in into is isn't it it's its itself
    just let's like made make makes many may me might more most much must my myself no nor not now of off on
    once one only or other our ours ourselves out over own put quite rather really s same she should shouldn't
    since so some still such t than that that's the their theirs them themselves then there these they they're
    this those though through to too two under until up upon us use used using very was wasn't way we well
    were weren't what when where whether which while who whom why will with within without won't would
    wouldn't yet you you'd you'll you're you've your yours yourself yourselves
    """.split()  # noqa: SIM905
)
_WORD = regex.compile(r"\p{L}(?:[\p{L}\p{M}\p{N}]|['’](?=\p{L}))*")


def _plain(review: str) -> str:
    return unicodedata.normalize("NFC", review).lower()


def review_keywords(reviews: Iterable[str], count: int = 5) -> list[str]:
    """Returns the most frequent words of reviews: lower case, no punctuation, no stop words (section 4.3.3).

    Ties go to the word that comes first in the alphabet, so that the order of reviews does not matter.

    Args:
        reviews: Review texts; training reviews only is the caller's duty.
        count: How many words; 5 in the paper.
    """
    words = Counter(
        word
        for review in reviews
        for word in (found[0].replace("’", "'") for found in _WORD.finditer(_plain(review)))
        if len(word) > 1 and word not in STOP_WORDS
    )
    return [word for word, _ in sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))[:count]]
