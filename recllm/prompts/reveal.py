"""REVEAL's prompts of feedback-guided visual extraction, FVE (arXiv 2606.09082, section 4.3).

The initial prompt of an item's image, and the prompts by which a model judges and rewrites it (eq. 3 and 4),
with the strict reading of its answers.

The released code asks for analysis and new prompt in one call (`REFINE`), the paper in two (`CRITIC`, then
`UPDATE`). The paper prints the evaluation instruction only; all other words are ours.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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

PROMPT_WORDS = 40
"""Words that a rewritten prompt may have, as released."""

_ITEM_FIELDS = {
    "title": "the item's title",
    "category": "its narrowest category",
    "prompt": "the prompt that its image vector is conditioned on now",
    "results": "how the recommender ranked the item in validation lists, a line for each finding",
}
_DIRECTION = {"direction": "what the feedback asks for: `DIRECTIONS`"}
_EVALUATION = (
    "Assess whether the current prompt effectively extracts visual features for recommendation by comparing "
    "the prediction with the ground truth. If recommendation errors occur, analyze whether the prompt misses "
    "preference-relevant visual attributes and suggest improvements to the prompt."
)
_SITUATION = (
    "A recommender describes each item by features that a vision-language model extracts from the item's "
    "image under a prompt.\n"
    "Item: {title}\n"
    "Category: {category}\n"
    "Current prompt: {prompt}\n"
)
_ANALYSIS_FORM = (
    "Analysis: what users of this item care about, what the prompt looks at, and where the two differ, in at "
    "most three sentences"
)
_PROMPT_RULES = (
    "{direction} The new prompt has at most 40 words, names the product, and names only what can be seen in "
    "the image: no price, rating, review or popularity."
)
_PROMPT_FORM = "Prompt: the new prompt"

CRITIC = Template(
    "reveal.critic",
    _SITUATION + "Recommendation results against the ground truth:{results}\n" + _EVALUATION + "\n"
    "Answer in this form and write nothing else:\n" + _ANALYSIS_FORM,
    _ITEM_FIELDS,
    ("prompt", "results"),
    source='"Evaluation Instruction EvalInstr Template", section 4.3.2; the rest is ours',
)
"""REVEAL eq. 3: prompt, EvalInstr, ground truth and results to an analysis. The image is not shown."""

UPDATE = Template(
    "reveal.update",
    _SITUATION + "Analysis: {analysis}\n"
    "Rewrite the prompt so that it makes up for what the analysis misses. " + _PROMPT_RULES + "\n"
    "Answer in this form and write nothing else:\n" + _PROMPT_FORM,
    {
        **{name: meaning for name, meaning in _ITEM_FIELDS.items() if name != "results"},
        "analysis": "the critic's analysis",
        **_DIRECTION,
    },
    ("prompt", "analysis"),
)
"""REVEAL eq. 4: analysis, prompt and image to the next prompt."""

REFINE = Template(
    "reveal.refine",
    _SITUATION
    + "Recommendation results against the ground truth:{results}\n"
    + _EVALUATION
    + " Then rewrite "
    "the prompt. " + _PROMPT_RULES + "\n"
    "Answer in this form and write nothing else:\n" + _ANALYSIS_FORM + "\n" + _PROMPT_FORM,
    {**_ITEM_FIELDS, **_DIRECTION},
    ("prompt", "results"),
    source="EvalInstr of section 4.3.2, in one call with the update as released; the rest is ours",
)
"""REVEAL eq. 3 and 4 in one call, with the image."""

DIRECTIONS = {
    "pos": "Emphasize what sets this item apart for the users who choose it.",
    "neg": "Be more specific and less generic, so that the item is not taken for others that look similar.",
}
"""By the kind of feedback: users want the item and it ranks low, or it ranks high for users who do not."""

TEMPLATES = (INITIAL, CRITIC, UPDATE, REFINE)

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


def results_lines(feedback: Mapping[str, float | None], rivals: Sequence[str], wanted: Sequence[str]) -> str:
    """Returns the `results` of a template: what the validation lists say of an item, a line each.

    Args:
        feedback: A row of `recllm.reveal.feedback`: `targets, hits, rank_when_hit, top10, top20, mean_rank,
            wrong, wrong_rank, exposures` and `lists`, the length of the lists.
        rivals: What was ranked above the item for the users who chose it; made safe by the caller.
        wanted: What users chose to whom the item was recommended wrongly; made safe by the caller.
    """
    lines = []
    if feedback["targets"]:
        lines.append(
            f"{_users(feedback['targets'])} chose it; it was ranked {feedback['mean_rank']:.0f} on average"
        )
        if feedback["hits"]:
            lines.append(
                f"it was among the first {feedback['lists']} for {_users(feedback['hits'])}, at rank "
                f"{feedback['rank_when_hit']:.1f} on average; of these {feedback['top10']:.0%} among the "
                f"first 10 and {feedback['top20']:.0%} among the first 20"
            )
        else:
            lines.append(f"it was never among the first {feedback['lists']} for them")
        if rivals:
            lines.append(f"ranked above it: {'; '.join(rivals)}")
    if feedback["wrong"]:
        lines.append(
            f"it was among the first 10 for {_users(feedback['wrong'])} who did not choose it, at rank "
            f"{feedback['wrong_rank']:.1f} on average"
        )
        if wanted:
            lines.append(f"they chose: {'; '.join(wanted)}")
    lines.append(f"it was shown to {_users(feedback['exposures'])} in all")
    return "".join(f"\n- {line}" for line in lines)


def _users(count: float) -> str:
    return f"{count:.0f} user{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Reading:
    """What was read off an answer.

    Attributes:
        sections: The text of each section; empty where the answer is broken.
        problem: Why the answer is not used: `form`, `cut off`, `too long`, `product lost` or `not visible`;
            None where it is.
    """

    sections: Mapping[str, str]
    problem: str | None = None


_LABEL = regex.compile(r"^[#*\s]*(?P<name>Analysis|Prompt)[*\s]*:[*\s]*", regex.MULTILINE)
_UNSEEN = frozenset(
    """
    customer customers popular popularity price prices priced rank ranked ranking rating ratings recommend
    recommendation recommendations recommended recommender review reviews reviewer reviewers shipping user
    users
    """.split()  # noqa: SIM905
)
"""Words that no image shows; ours."""
_QUOTES = "\"'“”‘’`*"


def read_answer(answer: str, sections: Sequence[str], *, cut_off: bool = False) -> Reading:
    """Reads the sections of an answer: each once, in order, not empty, and nothing before the first.

    Args:
        answer: What the model wrote.
        sections: The names asked for: `Analysis`, `Prompt`.
        cut_off: The answer ended at the limit of its length, so that its last section is not whole.
    """
    if cut_off:
        return Reading({}, "cut off")
    found = list(_LABEL.finditer(answer))
    if [label["name"] for label in found] != list(sections) or answer[: found[0].start()].strip():
        return Reading({}, "form")
    ends = [*(label.start() for label in found[1:]), len(answer)]
    texts = [
        " ".join(answer[label.end() : end].split()).strip(_QUOTES).strip()
        for label, end in zip(found, ends, strict=True)
    ]
    if not all(texts):
        return Reading({}, "form")
    return Reading(dict(zip(sections, texts, strict=True)))


def problem_of_prompt(prompt: str, title: str, category: str) -> str | None:
    """Returns why a rewritten prompt is refused; None if it is not.

    Args:
        prompt: The new prompt.
        title: The item's title.
        category: Its narrowest category. The prompt must have a word of title or category, where there is
            one, in singular or plural.
    """
    if len(prompt.split()) > PROMPT_WORDS:
        return "too long"
    words = {found[0].replace("’", "'") for found in _WORD.finditer(_plain(prompt))}
    product = {_singular(word) for word in _content_words(f"{title} {category}")}
    if product and not product & {_singular(word) for word in words}:
        return "product lost"
    return "not visible" if words & _UNSEEN else None


def _content_words(text: str) -> set[str]:
    words = {found[0].replace("’", "'") for found in _WORD.finditer(_plain(text))}
    return {word for word in words if len(word) > 1 and word not in STOP_WORDS}


def _singular(word: str) -> str:
    word = word.removesuffix("'s")
    for ending, instead in (
        ("ies", "y"),
        ("ses", "s"),
        ("xes", "x"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + instead
    return word
