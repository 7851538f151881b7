"""The wire format of chat completions: what is asked, what comes back, and how images travel."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recllm.mllm.chat import IMAGE_PART, Decoding, Request, Result, text_part
from recllm.mllm.generation.server_format import (
    PassingFaultError,
    RefusedError,
    data_url,
    read_answer,
    request_seed,
    retry_after,
)
from tests.mllm.fake_server import FakeServer, answer_from, completion
from tests.mllm.test_server_backend import GREEDY, answers, ask, backend_for


def test_retry_after_reads_seconds_and_dates():
    assert retry_after("12") == 12
    assert retry_after(" 1.5 ") == 1.5
    assert 50 < retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) < 61
    for nonsense in (
        "",
        "soon",
        "-3",
        "nan",
        "inf",
        "1e9",
        "9" * 400,
        "Thu, 99 Foo 2020",
        "Mon, 01 Jan 1900",
    ):
        assert retry_after(nonsense) == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (completion("a", finish="stop"), ("a", 7, 3, "stop")),
        (completion("a", finish="length"), ("a", 7, 3, "length")),
        (completion("a", finish=None), ("a", 7, 3, "stop")),
        (completion("a", finish=None, usage=(7, 8)), ("a", 7, 8, "length")),
        (completion("a", usage=None), ("a", 0, 0, "stop")),
        (completion("a", usage={"prompt_tokens": "7", "completion_tokens": -1}), ("a", 0, 0, "stop")),
        (completion("a", usage=[1]), ("a", 0, 0, "stop")),
        (completion(None, finish="length"), ("", 7, 3, "length")),
    ],
)
def test_servers_that_leave_things_out(content: dict[str, Any], expected: tuple[str, int, int, str]):
    result = read_answer(json.dumps(content).encode(), b"k", 8)
    assert (result.text, result.prompt_tokens, result.completion_tokens, result.finish) == expected


def test_withheld_text_is_a_refusal():
    with pytest.raises(RefusedError, match="content_filter"):
        read_answer(json.dumps(completion(None, finish="content_filter")).encode(), b"k", 8)


def test_halves_of_surrogate_pairs_become_text_that_files_can_hold():
    raw = json.dumps(completion("TEXT")).replace("TEXT", r"a\ud800b\udc00c\ud83d\ude00").encode()
    assert read_answer(raw, b"k", 8).text == "a\ufffdb\ufffdc😀"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "finish_reason"]), inner)
    ),
    max_leaves=12,
)


@given(
    json_values | st.builds(lambda v, u: {"choices": [{"message": v}], "usage": u}, json_values, json_values)
)
def test_any_json_is_an_answer_or_a_named_fault(value: Any):
    try:
        result = read_answer(json.dumps(value).encode(), b"k", 8)
    except (PassingFaultError, RefusedError):
        return
    assert isinstance(value["choices"][0]["message"]["content"], str | None)
    result.text.encode("utf-8")


def test_what_is_asked_of_the_server():
    system = {"role": "system", "content": [text_part("be short")]}
    request = Request("x", (system, *ask("hello").messages))
    with FakeServer(answer=lambda _: completion("a")) as fake:
        answers(backend_for(fake.base_url), [(b"k0", request)])
        sampled = Decoding(max_new_tokens=16, temperature=0.5, top_p=0.9, seed=3)
        options = {"length_field": "max_completion_tokens"}
        answers(backend_for(fake.base_url, **options), [(b"k0", request)], sampled)
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]
    common = {"model": "m", "messages": messages, "stream": False}
    assert fake.bodies == [
        {**common, "max_tokens": 16, "temperature": 0.0},
        {
            **common,
            "max_completion_tokens": 16,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": request_seed(3, b"k0"),
        },
    ]


def test_seeds_differ_by_request_and_by_job_and_fit_every_server():
    seeds = {request_seed(seed, b"%d" % key) for seed in range(20) for key in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)


def decoded(url: str) -> tuple[bytes, Image.Image]:
    head, data = url.split(",")
    raw = base64.b64decode(data, validate=True)
    image = Image.open(io.BytesIO(raw))
    assert head == f"data:image/{image.format.lower()};base64"
    return raw, image


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_small_images_are_sent_byte_for_byte(suffix: str, tmp_path: Path):
    path = tmp_path / f"a.{suffix}"
    Image.linear_gradient("L").convert("RGB").resize((60, 40)).save(path)
    assert decoded(data_url(path, 2400))[0] == path.read_bytes()
    raw, image = decoded(data_url(path, 2399))
    assert raw != path.read_bytes()
    assert image.width * image.height <= 2399
    assert image.width / image.height == pytest.approx(1.5, rel=0.05)


def test_images_that_servers_show_otherwise_are_sent_as_plain_rgb(tmp_path: Path):
    rotated, clear, cmyk, palette = (tmp_path / name for name in ("r.jpg", "c.png", "k.jpg", "p.png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), "red").save(rotated, exif=exif)
    upside_down, original = tmp_path / "u.png", Image.new("RGB", (30, 30))
    original.putpixel((0, 0), (9, 9, 9))
    exif[0x0112] = 3
    original.save(upside_down, exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear)
    Image.new("CMYK", (30, 30), (0, 255, 255, 0)).save(cmyk)
    Image.new("P", (30, 30), 3).save(palette)
    shown = {path.name: decoded(data_url(path, 10**6))[1] for path in (rotated, clear, cmyk, palette)}
    assert {image.mode for image in shown.values()} == {"RGB"}
    assert shown["r.jpg"].size == (40, 60)
    assert 0x0112 not in shown["r.jpg"].getexif()
    assert shown["c.png"].getpixel((0, 0)) == (255, 255, 255)
    assert decoded(data_url(upside_down, 10**6))[1].getpixel((29, 29)) == (9, 9, 9)


class Describer:
    """Answers with what it sees: roles, texts and the first pixel of each image."""

    special_tokens: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {}

    def generate(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> Iterator[list[Result]]:
        for key, request in requests:
            pixels = [Image.open(path).convert("RGB").getpixel((0, 0)) for path in request.images]
            text = json.dumps([request.messages, pixels, decoding.max_new_tokens, decoding.temperature])
            yield [Result(key, text, 11, 5, "length")]

    def count_tokens(self, request: Request) -> None:
        return None


def test_a_served_backend_sees_what_it_would_see_here(tmp_path: Path):
    paths = []
    for color in ("red", "lime", "blue"):
        paths.append(tmp_path / f"{color}.png")
        Image.new("RGB", (20, 20), color).save(paths[-1])
    torn = tmp_path / "torn.jpg"
    Image.effect_noise((80, 80), 90).save(torn)
    torn.write_bytes(torn.read_bytes()[:-400])
    turns = (
        {"role": "system", "content": [text_part("look")]},
        {"role": "user", "content": [text_part("one"), dict(IMAGE_PART), text_part("two"), dict(IMAGE_PART)]},
        {"role": "assistant", "content": [text_part("seen")]},
        {"role": "user", "content": [dict(IMAGE_PART), text_part("three")]},
    )
    pairs = [(b"a", Request("a", turns, tuple(paths))), (b"b", ask("plain")), (b"c", ask("broken", torn))]
    with FakeServer(answer=answer_from(Describer())) as fake:
        found = answers(backend_for(fake.base_url), pairs)
    expected = [result for batch in Describer().generate(pairs[:2], GREEDY) for result in batch]
    assert [found[b"a"], found[b"b"]] == expected
    assert found[b"c"].error.startswith("image: ")
    assert str(torn) in found[b"c"].error
    assert "broken" not in fake.tries


def test_a_served_model_answers_as_it_does_here(tmp_path: Path):
    from recllm.mllm.generation.in_process import InProcessBackend
    from recllm.mllm.loading import load
    from tests.mllm.small_models import save_small

    backend = InProcessBackend(load(save_small("qwen2_vl", tmp_path / "model"), dtype="float32"))
    paths = []
    for number, size in enumerate([(56, 56), (90, 40), (120, 130)]):
        paths.append(tmp_path / f"{number}.{('png', 'jpg')[number % 2]}")
        Image.effect_noise(size, 90).convert("RGB").save(paths[-1])
    pairs = [(b"%d" % number, ask(f"what is in image {number}", *paths[: number % 4])) for number in range(9)]
    with FakeServer(answer=answer_from(backend)) as fake:
        assert answers(backend_for(fake.base_url, timeout_s=60.0), pairs) == answers(backend, pairs)
