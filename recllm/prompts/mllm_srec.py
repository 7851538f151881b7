"""MLLM-SRec's prompts (Scientific Reports 2025, doi 10.1038/s41598-025-14251-1).

p1, p2 and p3 are the paper's wordings (equations 1 and 2, section "Temporal user behavior comprehend"); how
the material is laid out around them, and the words of the question, of which
table 1 gives the form, are ours.
"""

from __future__ import annotations

from recllm.prompts.templates import Template

_ITEM = {
    "title": "the item's title",
    "text": "its description",
    "categories": "its categories, the widest first",
}

VIU = Template(
    "mllm_srec.viu",
    "What is in the image and describe its category, type, color, style, brand, specifications, and feature?",
    {},
    source="p1, equation 1",
)
"""VQA-based image understanding; the image stands before the text."""

IMSG = Template(
    "mllm_srec.imsg",
    "Please combine visual summary and text to summarize the item.\n"
    "Visual summary: {visual_summary}\n"
    "Title: {title}\n"
    "Categories: {categories}\n"
    "Text: {text}",
    {"visual_summary": "what VIU answered; empty for an item without a usable image", **_ITEM},
    ("visual_summary",),
    source="p2, equation 2",
)
"""Item multimodal summary generator."""

TUBC = Template(
    "mllm_srec.tubc",
    "Please summarize the user's multimodal summaries sequence in chronological order to refine the user's "
    "interests and preferences.\n"
    "Previous preference: {previous}\n"
    "Sequence:{items}",
    {
        "previous": "the summary of the window before; empty in the first",
        "items": "the window's item summaries, oldest first, each on a numbered line of its own",
    },
    ("previous", "items"),
    source='p3, section "Temporal user behavior comprehend"',
)
"""Temporal user behavior comprehend: one window of the history."""

QUESTION = Template(
    "mllm_srec.question",
    "From the user's history, decide whether the user would like the target item next. "
    'Answer "Yes." or "No.".\n'
    "User: {user}\n"
    "Profile: {profile}\n"
    "Preference: {preference}\n"
    "Recent items, oldest first:{history}\n"
    "Target item: {target}",
    {
        "user": "the user's id; empty unless asked for",
        "profile": "the user's profile",
        "preference": "the last TUBC summary before the target",
        "history": "the most recent items, each on a numbered line of its own; empty without them",
        "target": "the target item's title, categories and text; its image follows",
    },
    ("target",),
    source="the form of table 1; the words are ours",
)
"""The instruction and input of a tuple; "Yes." or "No." is the response. The target stands last, so that the
candidates of a user share a prefix."""

TEMPLATES = (VIU, IMSG, TUBC, QUESTION)
