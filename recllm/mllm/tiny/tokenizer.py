"""The embedded model's processor: byte-level BPE trained on the spot, Qwen2-VL's tokens and template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from recllm.data.toyworld import images, words
from recllm.prompts import TEMPLATES
from recllm.prompts.reveal import STOP_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's special tokens in its order."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of Qwen2-VL-Instruct."""

_TOKENS = 2000  # with the special tokens below the 2,048 rows of the embedding
_COMMON = 50  # weight of what must be single tokens, far above the count of anything else
_ONE_TOKEN = ("Yes", "No", "yes", "no", " Yes", " No", " yes", " no")

_CATALOG_WORDS = """
    action adventure animation baby bag bath beauty bed black book bottle box brand brown brush camera
    care case category chair child children city clothing comedy cotton cover crime dark day documentary
    dog drama dress fabric family fantasy film food free game gift girl glass gold gray hair hand home
    horror house jacket kitchen kids lamp leather light love man material men metal movie music musical
    mystery new night office old orange outdoor paper phone pink plastic poster price product quality red
    ring romance science series set shirt shoe shop short silver size skin soft sport steel story style
    summer table thriller time toy travel type video war watch water western white winter woman women
    wood wooden world year yellow
""".split()  # noqa: SIM905


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains the BPE: the same tokens on every machine, because nothing in it is random."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _corpus() -> Iterator[str]:
    """What the embedded model reads and writes; then English function words, for texts of other catalogs."""
    for _ in range(_COMMON):
        yield from _ONE_TOKEN
        yield from (*images.COLORS, *images.PATTERNS, *images.SHAPES, *words.MAKERS, *words.CATEGORIES)
        for word in (*images.COLORS, *images.PATTERNS, *images.SHAPES, *words.MAKERS, *words.CATEGORIES):
            yield f" {word}"
        yield "system\nYou are a helpful assistant."
        yield "user\n"
        yield "assistant\n"
    for template in TEMPLATES.values():
        yield template.text
    for maker in words.MAKERS:
        for category in words.CATEGORIES:
            yield words.text_of(maker, category)
            yield f"{words.PLURALS[category]} {words.PLURALS[category]}"
    for kind in range(words.PROFILE_KINDS):
        for category in words.CATEGORIES:
            yield words.profile_of(category, kind)
    yield "The image shows a red, striped circle. The product shows it. with a for everyday use"
    yield "Last: unknown. Lately: any color, any pattern, any shape. Before: any"
    yield "The user last chose a and likes any"
    for rating in (1, 3, 5):
        for kind in range(words.REVIEW_KINDS):
            yield words.review_of(
                rating, kind, color="red", pattern="plain", shape="star", category="mug", maker="Tarn"
            )
    for word in (*sorted(STOP_WORDS), *_CATALOG_WORDS):
        yield f" {word} {word.capitalize()}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a Qwen2 tokenizer of about 1,900 tokens; words of the toy world and prompts are one each."""
    from transformers import Qwen2Tokenizer

    vocabulary, merges = _vocabulary()
    specials = {token: len(vocabulary) + number for number, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab={**vocabulary, **specials},
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[
            token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")
        ],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor(min_pixels: int, max_pixels: int) -> Qwen2VLProcessor:
    """Returns a Qwen2-VL processor with the embedded vocabulary.

    Args:
        min_pixels: Pictures with fewer pixels are enlarged.
        max_pixels: Pictures with more are reduced.
    """
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )
