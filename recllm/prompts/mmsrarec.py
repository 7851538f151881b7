"""MMSRARec's prompts (arXiv 2512.20916): keywords of items (stage 1), four recommendation tasks (stage 3).

The paper asks for image and text to be summarized separately, so that text does not drown the image; its
prompts are pictures of tables that cannot be recovered, so the words are ours. `recllm.prompts.keywords`
reads the answers.

The paper trains on "four types of recommendation tasks" after LC-Rec and says no more. Ours, as LC-Rec means
them: whether an item comes next (its sequential prediction, as yes or no), the next item's keywords, the
next item among candidates, and the user's preference.
"""

from __future__ import annotations

from recllm.prompts.templates import Template

IMAGE_KEYWORDS = Template(
    "mmsrarec.image_keywords",
    "List three to six keywords for what the image shows, separated by commas. Keywords only.",
    {},
    source="separate summary of the image, stage 1; the words are ours",
)
"""Keywords of the image, which stands before the text."""

TEXT_KEYWORDS = Template(
    "mmsrarec.text_keywords",
    "List three to six keywords for this item, separated by commas. Keywords only.\n"
    "Title: {title}\n"
    "Categories: {categories}\n"
    "Text: {text}",
    {"title": "the item's title", "text": "its description", "categories": "its categories"},
    source="separate summary of the text, stage 1; the words are ours",
)
"""Keywords of title, categories and description."""

_WHAT = {"what": "`keywords`, or `titles` if titles take their place"}
_HISTORY = {"history": "the keywords of the user's latest items, each item on a numbered line of its own"}
_NEIGHBORS = {"neighbors": "the keywords of the next items of similar users, each user on a numbered line"}
_SOURCE = "stage 3, after LC-Rec; the words are ours"

QUESTION = Template(
    "mmsrarec.question",
    "From the {what} below, decide whether the user would like the target item next. "
    'Answer "Yes." or "No.".\n'
    "Recent items of the user, oldest first:{history}\n"
    "Next items of similar users:{neighbors}\n"
    "Target item: {target}",
    {
        **_WHAT,
        **_HISTORY,
        **_NEIGHBORS,
        "target": "the target's id, title, categories and text; its image follows",
    },
    ("target",),
    source=_SOURCE,
)
"""The task `yes_no`, which scores come from. The target is last: the candidates of a user share a prefix."""

NEXT_KEYWORDS = Template(
    "mmsrarec.next_keywords",
    "From the {what} below, predict the item that the user will choose next. Answer with {answer}.\n"
    "Recent items of the user, oldest first:{history}\n"
    "Next items of similar users:{neighbors}",
    {
        **_WHAT,
        "answer": "`its keywords alone, separated by commas`, or `its title alone`",
        **_HISTORY,
        **_NEIGHBORS,
    },
    ("history", "answer"),
    source=_SOURCE,
)
"""The task `next_keywords`."""

CHOOSE = Template(
    "mmsrarec.choose",
    "From the {what} below, decide which of the candidates the user will choose next. Answer with its number "
    "alone.\n"
    "Recent items of the user, oldest first:{history}\n"
    "Next items of similar users:{neighbors}\n"
    "Candidates:{candidates}",
    {
        **_WHAT,
        **_HISTORY,
        **_NEIGHBORS,
        "candidates": "the candidates' titles and keywords, each on a numbered line of its own",
    },
    ("candidates",),
    source=_SOURCE,
)
"""The task `choose`."""

SUMMARIZE = Template(
    "mmsrarec.summarize",
    "Summarize the user's preference from the keywords below: at most six keywords, the most frequent first, "
    "separated by commas. Keywords only.\n"
    "Recent items of the user, oldest first:{history}",
    {**_HISTORY},
    ("history",),
    source=_SOURCE,
)
"""The task `summarize`."""

TEMPLATES = (IMAGE_KEYWORDS, TEXT_KEYWORDS, QUESTION, NEXT_KEYWORDS, CHOOSE, SUMMARIZE)
