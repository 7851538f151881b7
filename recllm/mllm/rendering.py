"""From chats to model inputs: the chat template, the guard against forged turns and images, and padding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from recllm.errors import DataError
from recllm.mllm.chat import IMAGE_PART, Message, Request, text_part
from recllm.mllm.generation.reasoning import opens_reasoning
from recllm.mllm.plain_templates import is_plain, with_texts, words_of
from recllm.mllm.processor import fill, join, prepare, token_kinds
from recllm.mllm.tokens import part_tokenizer

if TYPE_CHECKING:
    from PIL import Image

    from recllm.mllm.loading import LoadedModel

Shape = tuple[tuple[str, tuple[str, ...]], ...]
"""A chat without its words: role and kinds of parts of each message."""


def render(loaded: LoadedModel, request: Request) -> str:
    """Returns a chat as the text that the processor takes, one placeholder for each image.

    The guard: the text must have as many special tokens of each kind (those that open and close turns and
    stand for images among them) as the same chat in which every text is "x". Text from data can then neither
    open a turn nor add an image, whatever it holds. Turn marks without special tokens (LLaVA's "ASSISTANT:")
    are counted, too. Ours.

    Raises:
        DataError: The guard found special tokens or turn marks in a text, or the chat template refuses the
            chat.
    """
    return render_tokens(loaded, request)[0]


def render_tokens(loaded: LoadedModel, request: Request) -> tuple[str, np.ndarray]:
    """Does what `render` does; returns the text and its tokens, (tokens,) int64."""
    text = apply_template(loaded, request.messages, request.id)
    tokens = token_array(loaded, text)
    expected = _special_tokens_of_shape(loaded, _shape_of(request.messages))
    found = _special_tokens(loaded, text, tokens)
    if found != expected:
        odd = next(token for token in {**found, **expected} if found.get(token) != expected.get(token))
        what = (
            f"turn mark {odd.strip()!r}"
            if isinstance(odd, str)
            else f"special token {loaded.tokenizer.decode([odd])!r}"
        )
        raise DataError(
            f"request {request.id!r}: a text holds the {what}, which would change the chat's turns or "
            "images; put text from data through safe_text"
        )
    if text.count(loaded.processor.image_token) != len(request.images):
        raise DataError(f"request {request.id!r}: the chat template does not show each of its images once")
    return text, tokens


def encode(
    loaded: LoadedModel, requests: Sequence[Request], images: Sequence[Sequence[Image.Image]]
) -> dict[str, Any]:
    """Returns the model's inputs for a batch: padded on the left, never cut, on the CPU.

    Args:
        loaded: The model.
        requests: The chats.
        images: The decoded images of each, in the order of its image parts.

    Raises:
        DataError: See `render`; or a chat has not as many images as image parts.
    """
    for request, shown in zip(requests, images, strict=True):
        if len(shown) != len(request.images):
            raise DataError(
                f"request {request.id!r}: {len(shown)} images for {len(request.images)} image parts"
            )
    return encode_texts(loaded, [render(loaded, request) for request in requests], images)


def encode_texts(
    loaded: LoadedModel, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> dict[str, Any]:
    """Does what `encode` does for texts that `render` returned."""
    processor = loaded.processor
    shown = [[prepare(processor, image) for image in each] for each in images]
    expanded = [
        fill(processor, text, [picture.text for picture in each])
        for text, each in zip(texts, shown, strict=True)
    ]
    tensors = [picture.tensors for each in shown for picture in each]
    return {**encode_expanded(loaded, expanded), **join(tensors, loaded.forward_names)}


def expand(loaded: LoadedModel, text: str, image_sizes: Sequence[tuple[int, int]]) -> str:
    """Returns a rendered chat with as many image tokens as the processor will put there; no file is read.

    Args:
        loaded: The model.
        text: What `render` returned.
        image_sizes: (width, height) of each image, in pixels.
    """
    return fill(loaded.processor, text, [loaded.images.text(*size) for size in image_sizes])


def encode_expanded(loaded: LoadedModel, expanded: Sequence[str]) -> dict[str, Any]:
    """Returns the inputs of a batch without pixels: the visual tokens come from a visual store.

    Args:
        loaded: The model.
        expanded: What `expand` returned.
    """
    inputs = loaded.tokenizer(
        list(expanded),
        padding=True,
        truncation=False,
        return_tensors="pt",
        add_special_tokens=_adds_special_tokens(loaded, expanded[0]),
    )
    return {**inputs, **token_kinds(loaded.processor, inputs["input_ids"])}


def count_tokens(loaded: LoadedModel, expanded: str) -> int:
    """Returns the exact length in tokens of what `expand` returned, image tokens included."""
    return len(token_array(loaded, expanded))


def token_ids(loaded: LoadedModel, text: str) -> list[int]:
    """Returns the tokens of a text that the chat template wrote, as `encode_expanded` has them."""
    return token_array(loaded, text).tolist()


def token_array(loaded: LoadedModel, text: str) -> np.ndarray:
    """Does what `token_ids` does; returns (tokens,) int64."""
    return part_tokenizer(loaded.tokenizer).ids(text, _adds_special_tokens(loaded, text))


def find_turn_marks(loaded: LoadedModel) -> tuple[str, ...]:
    """Returns what a chat template writes between turns where it writes no special token there.

    LLaVA-1.5's are " ASSISTANT:" and " USER:". Most templates have none: their turns begin and end with
    special tokens.
    """
    said = ("alpha", "beta", "gamma")
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": [text_part(word)]} for role, word in zip(roles, said, strict=True)]
    try:
        text = apply_template(loaded, chat, "turn marks")
    except DataError:  # a template that takes no answers has no turns after the first
        return ()
    pieces = re.split("|".join(said), text)[1:]
    if len(pieces) != len(said):
        return ()
    plain = [
        piece.rstrip()
        for piece in pieces
        if not loaded.special_token_ids.intersection(_tokens(loaded, piece))
    ]
    return tuple(dict.fromkeys(mark for mark in plain if any(map(str.isalpha, mark))))


def probe_inputs(loaded: LoadedModel) -> dict[str, Any]:
    """Returns inputs of a fixed prompt with an image, on the model's device: does an adapter act on it?"""
    from PIL import Image

    image = Image.linear_gradient("L").resize((112, 112)).convert("RGB")
    messages = ({"role": "user", "content": [dict(IMAGE_PART), text_part("What is in the image?")]},)
    text = apply_template(loaded, messages, "probe")
    return to_model(loaded, encode_texts(loaded, [text], [[image]]))


def to_model(loaded: LoadedModel, inputs: Any) -> dict[str, Any]:
    """Returns inputs on the model's device, pixels in its number type."""
    device, dtype = loaded.model.device, loaded.model.dtype
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def apply_template(loaded: LoadedModel, messages: Sequence[Message], name: str, opened: bool = True) -> str:
    """Returns a chat as the chat template writes it, unguarded; see `render`.

    Args:
        loaded: The model.
        messages: The chat.
        name: Names the chat in errors.
        opened: Open the assistant's turn behind it.
    """
    template = loaded.processor.chat_template
    form = template, opened, (shape := _shape_of(messages))
    if form not in loaded.words_of_shape:
        plain = isinstance(template, str) and is_plain(template)
        count = sum(kind == "text" for _, kinds in shape for kind in kinds)
        loaded.words_of_shape[form] = (
            words_of(lambda texts: _rendered(loaded, _chat_of(shape, texts), name, opened), count)
            if plain
            else None
        )
    if (words := loaded.words_of_shape[form]) is None:
        return _rendered(loaded, messages, name, opened)
    return with_texts(
        words, [part["text"] for turn in messages for part in turn["content"] if "text" in part]
    )


def _rendered(loaded: LoadedModel, messages: Sequence[Message], name: str, opened: bool) -> str:
    from jinja2 import TemplateError

    try:
        return loaded.processor.apply_chat_template(
            list(messages), add_generation_prompt=opened, tokenize=False, **_without_thinking(loaded)
        )
    except (TemplateError, TypeError) as error:
        raise DataError(f"request {name!r}: the model's chat template refuses the chat: {error}") from None


def _without_thinking(loaded: LoadedModel) -> dict[str, bool]:
    """Returns the chat template's switches of reasoning (enable_thinking of Qwen3 and GLM, thinking), off."""
    template = loaded.processor.chat_template
    names = ("enable_thinking", "thinking") if isinstance(template, str) else ()
    return {name: False for name in names if re.search(rf"(?<![\w.'\"]){name}\b(?![\w'\"])", template)}


def refuse_open_reasoning(text: str, name: str) -> None:
    """Checks that a rendered prompt does not end within a reasoning block, where an answer would not be one.

    Raises:
        DataError: It does.
    """
    if opens_reasoning(text):
        raise DataError(
            f"request {name!r}: the prompt ends in {text.strip()[-20:]!r}: the model's chat template opens a "
            "reasoning block, and has no switch that is known (enable_thinking), so yes and no would be read "
            "inside the reasoning; use the model's instruct version, or a template that closes the block"
        )


def _adds_special_tokens(loaded: LoadedModel, text: str) -> bool:
    bos = loaded.tokenizer.bos_token
    return bos is None or not text.startswith(bos)  # the template wrote it already


def _tokens(loaded: LoadedModel, text: str) -> list[int]:
    return part_tokenizer(loaded.tokenizer).ids(text, special=False).tolist()


def _special_tokens(loaded: LoadedModel, text: str, tokens: np.ndarray) -> dict[int | str, int]:
    """How often each special token stands in a text, by its id, and each turn mark, by its spelling."""
    known = loaded.special_token_ids
    near = tokens[(tokens >= min(known)) & (tokens <= max(known))]  # mostly far from a vocabulary's words
    counts = {token: count for token, count in Counter(near.tolist()).items() if token in known}
    return counts | {mark: count for mark in loaded.turn_marks if (count := text.count(mark))}


def _special_tokens_of_shape(loaded: LoadedModel, shape: Shape) -> dict[int | str, int]:
    if shape not in loaded.special_tokens_of_shape:
        messages = _chat_of(shape, repeat("x"))
        text = apply_template(loaded, messages, "x")
        loaded.special_tokens_of_shape[shape] = _special_tokens(loaded, text, token_array(loaded, text))
    return loaded.special_tokens_of_shape[shape]


def _chat_of(shape: Shape, texts: Iterable[str]) -> list[Message]:
    left = iter(texts)
    return [
        {
            "role": role,
            "content": [text_part(next(left)) if kind == "text" else dict(IMAGE_PART) for kind in kinds],
        }
        for role, kinds in shape
    ]


def _shape_of(messages: Sequence[Message]) -> Shape:
    return tuple((turn["role"], tuple(part["type"] for part in turn["content"])) for turn in messages)
