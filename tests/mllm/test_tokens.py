"""Texts in parts have exactly the tokens of whole texts, and plain templates the template's own prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recllm.mllm.chat import IMAGE_PART, text_part
from recllm.mllm.plain_templates import is_plain
from recllm.mllm.rendering import apply_template
from recllm.mllm.tiny.tokenizer import CHAT_TEMPLATE, build_processor, build_tokenizer
from recllm.mllm.tokens import part_tokenizer

CORPUS = [
    "the red mug, a blue cup\n\nIt is 12 cm high.  Yes.",
    "déjà vu ﬁne \u0301 e\u0301 <b>",
    "▁under▁score",
] * 9


def bpe(pre_tokenizer, normalizer=None, post_processor=None, added=()):
    """A BPE tokenizer that merges as far as its corpus goes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        special_tokens=["<unk>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, **flags) for text, flags in added])
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<unk>")


SPECIAL = {"special": True, "normalized": False}
ADDED = [
    ("<|im_start|>", SPECIAL),
    ("<|im_end|>", SPECIAL),
    ("<image>", SPECIAL),
    ("<image>!", {"normalized": False}),  # begins with another
    ("<fake>", SPECIAL),
    ("<left>", {**SPECIAL, "lstrip": True}),
    ("<right>", {**SPECIAL, "rstrip": True}),
    ("<word>", {**SPECIAL, "single_word": True}),
    ("\n\n", {"normalized": False}),
    ("e\u0301x", {"normalized": True}),
]
KINDS = {
    "qwen2": lambda: build_tokenizer(),
    "bytes": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), added=ADDED),
    "prefix space": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), added=ADDED),
    "no pre-tokenizer": lambda: bpe(
        pre_tokenizers.Split(Regex("(?!)"), "isolated"),
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")]),
        added=ADDED,
    ),
    "first": lambda: bpe(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        normalizers.NFKC(),
        processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)]),
        added=ADDED,
    ),
    "always": lambda: bpe(
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        normalizers.Strip(),
        processors.TemplateProcessing(single="<bos> $A <unk>", special_tokens=[("<bos>", 1), ("<unk>", 0)]),
        added=ADDED,
    ),
}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
PIECES = [
    *(text for text, _ in ADDED),
    *("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>", "<bos>", "<unk>"),
    *("<|im_", "start|>", "<imag", "<image", ">", "!", "<", "|"),
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u0301",
        "e",
        "e\u0301",
        "x",
        "▁",
        "ﬁ",
        "the red mug",
        "Yes",
        "12",
    ),
    *("'s", "'", "😀", "\u200d", "👩\u200d👧", "中文", "\x00", "\ufffd", "a" * 40),
]
HOSTILE = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=14).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=HOSTILE, special=st.booleans())
@settings(max_examples=400, deadline=None)
def test_a_text_in_parts_has_the_tokens_of_the_whole(kind, text, special):
    tokenizer = TOKENIZERS[kind]
    expected = tokenizer(text, add_special_tokens=special).input_ids
    assert part_tokenizer(tokenizer).ids(text, special).tolist() == expected
    assert part_tokenizer(tokenizer).ids(text, special).tolist() == expected  # known by now


@pytest.mark.parametrize("kind", KINDS)
@given(before=HOSTILE, text=HOSTILE, after=HOSTILE)
@settings(max_examples=200, deadline=None)
def test_what_stands_alone_has_the_same_tokens_in_every_text(kind, before, text, after):
    tokenizer = TOKENIZERS[kind]
    text = f"<|im_start|>{text}<|im_end|>"
    found = part_tokenizer(tokenizer).alone(text)
    if found is None:
        return

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    assert ids(before + text + after) == [*ids(before), *found.tolist(), *_after(ids, after)]


def _after(ids, text):
    """The tokens of a text that follows a special token: not those of a text that begins."""
    return ids(f"<|im_end|>{text}")[1:]


def test_only_what_is_new_is_tokenized(monkeypatch):
    parts = part_tokenizer(tokenizer := build_tokenizer())
    shared = "<|im_start|>user\nA red mug<|image_pad|><|image_pad|> and a cup<|vision_end|>"
    parts.ids(f"{shared} first", special=True)
    seen = []

    class Counting:
        def encode(self, text, **options):
            seen.append(text)
            return tokenizer.backend_tokenizer.encode(text, **options)

    monkeypatch.setattr(parts, "_backend", Counting())
    parts.ids(f"{shared} second", special=True)
    assert len(seen) == 1 and seen[0].endswith(" second")


def test_a_token_that_is_added_later_counts():
    tokenizer = build_tokenizer()
    part_tokenizer(tokenizer).ids("a <new> b", special=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]}, replace_extra_special_tokens=False)
    expected = tokenizer("a <new> b").input_ids
    assert tokenizer.convert_tokens_to_ids("<new>") in expected
    assert part_tokenizer(tokenizer).ids("a <new> b", special=True).tolist() == expected


def test_padding_and_truncation_of_other_calls_do_not_matter():
    tokenizer = build_tokenizer()
    parts = part_tokenizer(tokenizer)
    tokenizer(["a", "b c d e"], padding="max_length", max_length=3, truncation=True)
    text = "<|im_start|>the red mug, a blue cup<|im_end|>"
    assert parts.ids(text, special=True).tolist() == tokenizer(text).input_ids


def test_thousands_of_added_tokens_are_found_fast():
    tokenizer = bpe(
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        added=[(f"<unused{number}>", {"normalized": False}) for number in range(3000)],
    )
    text = "the <unused7><unused77> red <unused777><unused2999>" * 40
    assert part_tokenizer(tokenizer).ids(text, special=False).tolist() == tokenizer(text).input_ids


PLAIN = {
    "qwen2_vl": CHAT_TEMPLATE,
    "attributes": (
        "{%- set seen = namespace(value=0) %}{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.content is string %}{{- message.content }}{%- else %}"
        "{%- for part in message.content %}{%- if part.type == 'image' or 'image' in part %}"
        "{%- set seen.value = seen.value + 1 %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "joined": (
        "{% for m in messages %}{{ m['role'] ~ ': ' }}{% for p in m['content'] %}"
        "{% if p['type'] == 'text' %}{{ '[' + p['text'] + ']' }}{% else %}<|image_pad|>{% endif %}"
        "{% endfor %}{% if not loop.last %}; {% endif %}{% endfor %}"
    ),
}
_LOOP = "{{% for m in messages %}}{{% for p in m.content %}}{body}{{% endfor %}}{{% endfor %}}"
NOT_PLAIN = {
    "trimmed": _LOOP.format(body="{{ p.text | trim }}"),
    "method": _LOOP.format(body="{{ p.text.strip() }}"),
    "tested": _LOOP.format(body="{% if 'a' in p.text %}{{ p.text }}{% endif %}"),
    "truth": _LOOP.format(body="{% if p.text %}{{ p.text }}{% endif %}"),
    "compared": _LOOP.format(body="{% if p.text == 'a' %}b{% else %}{{ p.text }}{% endif %}"),
    "length": _LOOP.format(body="{{ p.text }}{{ p.text | length }}"),
    "set": _LOOP.format(body="{% set t = p.text %}{{ t }}"),
    "alias": _LOOP.format(body="{% set q = p %}{{ q.text }}"),
    "values": _LOOP.format(body="{% for v in p.values() %}{{ v }}{% endfor %}"),
    "json": "{{ messages | tojson }}",
    "repr": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "macro": "{% macro w(t) %}{{ t | trim }}{% endmacro %}" + _LOOP.format(body="{{ w(p.text) }}"),
    "conditional": _LOOP.format(body="{{ p.text if p.text != 'a' else 'b' }}"),
    "filtered block": "{% filter upper %}" + _LOOP.format(body="{{ p.text }}") + "{% endfilter %}",
    "captured": "{% set x %}" + _LOOP.format(body="{{ p.text }}") + "{% endset %}{{ x | trim }}",
    "next item": _LOOP.format(body="{{ loop.nextitem }}{{ p.text }}"),
    "sliced": _LOOP.format(body="{{ p.text[1:] }}"),
    "times": _LOOP.format(body="{{ p.text * 2 }}"),
    "formatted": _LOOP.format(body="{{ '%s' % p.text }}"),
    "computed key": _LOOP.format(body="{{ p['te' ~ 'xt'] | upper }}"),
    "string content": "{% set ns = namespace(content='a') %}{% if ns.content is string %}"
    + _LOOP.format(body="{{ p.text | upper }}")
    + "{% endif %}",
    "clock": _LOOP.format(body="{{ strftime_now('%s') }}{{ p.text }}"),
    "broken": "{% for m in messages %}",
}


@pytest.mark.parametrize("template", PLAIN.values(), ids=PLAIN)
def test_templates_that_only_write_texts_are_plain(template):
    assert is_plain(template)


@pytest.mark.parametrize("template", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_templates_that_do_more_with_a_text_are_not_plain(template):
    assert not is_plain(template)


class Rendering:
    """As much of a loaded model as rendering needs."""

    def __init__(self, template):
        self.processor = build_processor(784, 784)
        self.processor.chat_template = template
        self.tokenizer, self.words_of_shape = self.processor.tokenizer, {}


TWICE = _LOOP.format(body="{{ p.text }}{{ p.text }}")
RENDERINGS = {
    name: Rendering(text) for name, text in {**PLAIN, "trimmed": NOT_PLAIN["trimmed"], "twice": TWICE}.items()
}
PARTS = st.lists(st.one_of(HOSTILE.map(text_part), st.just(IMAGE_PART).map(dict)), max_size=5)


@pytest.mark.parametrize("name", RENDERINGS)
@given(
    chat=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), PARTS), min_size=1, max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_a_chat_is_rendered_as_the_template_does(name, chat):
    loaded = RENDERINGS[name]
    messages = [{"role": role, "content": parts} for role, parts in chat]
    for opened in (True, False):
        expected = loaded.processor.apply_chat_template(
            messages, add_generation_prompt=opened, tokenize=False
        )
        for _ in range(2):
            assert apply_template(loaded, messages, "x", opened) == expected


def test_the_tokens_are_numbers_of_64_bits():
    ids = part_tokenizer(build_tokenizer()).ids("", special=False)
    assert ids.dtype == np.int64 and ids.shape == (0,)
