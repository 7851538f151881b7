"""MMSRARec's keyword prompts (arXiv 2512.20916, stage 1).

The paper asks for image and text to be summarized separately, so that text does not drown the image; its
prompts are pictures of tables that cannot be recovered, so the words are ours. `recllm.prompts.keywords`
reads the answers.
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

TEMPLATES = (IMAGE_KEYWORDS, TEXT_KEYWORDS)
