"""MLLMRec's prompts (arXiv 2508.15304, section "Reasoning Strategy"), in the paper's wordings."""

from __future__ import annotations

from recllm.prompts.templates import Template

DESCRIPTION = Template(
    "mllmrec.description",
    "Please convert the given image into an accurate and concise textual description relevant to the "
    "{dataset_name}, focusing on extracting key attributes that can influence the buying behavior of users, "
    "such as color, material, style, functionality, etc. To generate the textual description using a "
    "one-paragraph natural language overview in no more than 100 words.",
    {"dataset_name": "what the catalog is called, for example Amazon Baby"},
    source="Prompt 1",
)
"""Semantic description of an image, which stands before the text (equation 1)."""

PREFERENCE = Template(
    "mllmrec.preference",
    "Please reason about the user preferences based on the following list of item descriptions that he or "
    "she has interacted with. The list is: {items}. To generate the user preferences using a one-paragraph "
    "natural language in no more than 100 words.",
    {"items": "the multimodal descriptions of the user's items (equation 2: text, then description)"},
    ("items",),
    source="Prompt 2",
)
"""User preference from the list of multimodal descriptions (equations 3 and 4)."""

TEMPLATES = (DESCRIPTION, PREFERENCE)
