"""VLM4Rec's grounding prompt (arXiv 2603.12625, section 3.3).

The paper gives the contents ("color, material, style, category cues, and likely usage scenarios", in two to
three sentences) but not the words, which are ours. Its released code puts the product title into the prompt
although the paper calls the description grounded in the image; here that is a template of its own, chosen by
a flag.
"""

from __future__ import annotations

from recllm.prompts.templates import Template

GROUNDING = Template(
    "vlm4rec.grounding",
    "Describe this product for a recommender in two or three sentences: its color, material, style, category "
    "and likely usage scenarios.",
    {},
    source="contents from section 3.3; the words are ours",
)
"""Image to description, title out."""

GROUNDING_WITH_TITLE = Template(
    "vlm4rec.grounding_with_title",
    "Describe this product for a recommender in two or three sentences: its color, material, style, category "
    "and likely usage scenarios.\n"
    "Product title: {title}",
    {"title": "the item's title"},
    ("title",),
    source="contents from section 3.3; the title as in the released code; the words are ours",
)
"""Image and title to description."""

TEMPLATES = (GROUNDING, GROUNDING_WITH_TITLE)
