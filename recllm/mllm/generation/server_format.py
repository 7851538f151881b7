"""The wire format of chat completions: requests with images as data URLs, and what comes back."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from recllm.mllm.chat import Decoding, Message, Request, Result
from recllm.mllm.vision.images import load_image, read_image_bytes
from recllm.prompts.safe_text import safe_text

_SENT_AS_IT_IS = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")}
_EXIF_ORIENTATION = 0x0112


class PassingFaultError(Exception):
    """A try failed for a reason that can pass; the text says which."""

    def __init__(self, reason: str, *, wait_s: float = 0.0, connected: bool = True) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.connected = connected


class RefusedError(Exception):
    """The server will not answer this request; the text says why."""

    def __init__(self, reason: str, *, misaddressed: bool = False) -> None:
        super().__init__(reason)
        self.misaddressed = misaddressed


def request_body(
    key: bytes, request: Request, decoding: Decoding, *, model: str, max_pixels: int, length_field: str
) -> bytes:
    """Returns a chat completion request as JSON, with images as data URLs.

    Raises:
        ImageError: An image cannot be read.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": _messages(request, max_pixels),
        length_field: decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "stream": False,
    }
    if decoding.temperature > 0:
        body |= {"top_p": decoding.top_p, "seed": request_seed(decoding.seed, key)}
    return orjson.dumps(body)


def request_seed(seed: int, key: bytes) -> int:
    """Returns a seed of 31 bits (llama.cpp takes no more) from the job's seed and a request's key."""
    return int.from_bytes(hashlib.sha256(b"%d:" % seed + key).digest()[:4]) >> 1


def _messages(request: Request, max_pixels: int) -> list[Message]:
    paths = iter(request.images)
    messages = []
    for turn in request.messages:
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(next(paths), max_pixels)}}
            if part["type"] == "image"
            else part
            for part in turn["content"]
        ]
        # Some servers take a list of parts from users only.
        plain = len(parts) == 1 and parts[0]["type"] == "text"
        messages.append({"role": turn["role"], "content": parts[0]["text"] if plain else parts})
    return messages


def data_url(path: Path, max_pixels: int) -> str:
    """Returns an image as a `data:` URL; a JPEG or PNG that needs no change is sent byte for byte.

    Everything else (more than `max_pixels`, other formats, transparency, rotation by EXIF) becomes JPEG of
    high quality where the file is one, and PNG otherwise. Ours.

    Raises:
        ImageError: The image cannot be read.
    """
    # Decoded also where the file itself is sent: a server may take a torn one and show it half gray.
    image = load_image(path, max_pixels=max_pixels)
    original = read_image_bytes(path)
    with Image.open(io.BytesIO(original)) as opened:
        file_format = opened.format
        upright = opened.getexif().get(_EXIF_ORIENTATION, 1) == 1
        as_it_is = (file_format, opened.mode) in _SENT_AS_IT_IS and upright and opened.size == image.size
    if as_it_is:
        return _as_url(original, file_format)
    encoded = io.BytesIO()
    if file_format in ("JPEG", "MPO"):
        image.save(encoded, "JPEG", quality=95, subsampling=0)
        return _as_url(encoded.getvalue(), "JPEG")
    image.save(encoded, "PNG")
    return _as_url(encoded.getvalue(), "PNG")


def _as_url(content: bytes, file_format: str) -> str:
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(content).decode('ascii')}"


def read_answer(raw: bytes, key: bytes, max_new_tokens: int) -> Result:
    """Reads a chat completion.

    Args:
        raw: The body of an answer with status 200.
        key: The request's key.
        max_new_tokens: Tells `length` from `stop` for servers that give no finish reason.

    Raises:
        PassingFaultError: The body is no chat completion.
        RefusedError: The server withheld the text.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise PassingFaultError("an answer that is not JSON") from None
    try:
        choice = content["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise PassingFaultError("an answer that is no chat completion") from None
    if reason in ("content_filter", "refusal", "tool_calls", "function_call"):
        raise RefusedError(f"no text, but {reason}")
    if reason not in (None, "stop", "length", "eos", "eos_token"):
        raise PassingFaultError(f"an answer that ended with {safe_text(str(reason), limit=60)!r}")
    if text is not None and not isinstance(text, str):
        raise PassingFaultError("an answer whose content is not text")
    usage = content.get("usage")
    prompt_tokens, completion_tokens = (_count(usage, f"{name}_tokens") for name in ("prompt", "completion"))
    cut = reason == "length" or (reason is None and completion_tokens >= max_new_tokens)
    # JSON can spell halves of surrogate pairs, which no file in UTF-8 can hold.
    whole = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Result(key, whole, prompt_tokens, completion_tokens, "length" if cut else "stop")


def _count(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 2**31 else 0


def retry_after(value: str) -> float:
    """Returns the wait that a `Retry-After` header asks for, given in seconds or as a date; else 0."""
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
