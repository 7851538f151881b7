"""Tokens counted beforehand are the tokens that appear, and histories are cut between items, never inside."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from recllm.errors import DataError
from recllm.mllm.vision.token_budget import ImageTokens, image_settings

from .small_models import FAMILIES, save_small

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns (model, processor) of a family, made once."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    @cache
    def load(family: str):
        folder = save_small(family, tmp_path_factory.mktemp(family))
        return (
            AutoModelForImageTextToText.from_pretrained(folder).eval(),
            AutoProcessor.from_pretrained(folder),
        )

    return load


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tokens_in_prompt(processor, images) -> list[int]:
    """Tokens that the processor makes of each image, counted in `input_ids`."""
    mark = processor.image_token
    out = []
    for image in images:
        ids = processor(text=[f"a {mark} b"], images=[image], return_tensors="pt")["input_ids"]
        out.append(int(np.isin(ids.numpy(), processor.image_token_ids).sum()))
    return out


sizes = st.tuples(st.integers(1, 450), st.integers(1, 450)).filter(lambda size: max(size) <= 200 * min(size))


@pytest.mark.parametrize("family", QWEN)
@settings(max_examples=25, deadline=None)
@given(
    images=st.lists(sizes, min_size=1, max_size=4), budget=st.tuples(st.integers(1, 40), st.integers(1, 9))
)
def test_image_tokens_equal_visual_features_equal_the_count(loaded, tmp_path_factory, family, images, budget):
    model, processor = loaded(family)
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    tokens = ImageTokens(processor, side**2 * budget[1] // 2, side**2 * (budget[0] + budget[1]))
    assert processor.image_processor.size["longest_edge"] == side**2 * (budget[0] + budget[1])
    path = tmp_path_factory.getbasetemp() / f"{family}.png"
    raw = [noise(*size) for size in images]
    fitted = []
    for image in raw:
        image.save(path, compress_level=1)
        fitted.append(tokens.load(path))
        assert tokens.count_file(path) == tokens.count(*image.size)
    expected = [tokens.count(*size) for size in images]
    for pictures in (raw, fitted):
        text = "x" + "<|image_pad|>y" * len(pictures)
        inputs = processor(text=[text], images=pictures, return_tensors="pt")
        with torch.inference_mode():
            features = model.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            ).pooler_output
        assert [len(one) for one in features] == expected
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == sum(expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in QWEN])
def test_processors_without_a_pixel_budget_count_for_themselves_and_refuse_one(loaded, family):
    _, processor = loaded(family)
    images = [noise(*size) for size in ((30, 30), (200, 60), (60, 200), (500, 480))]
    tokens = ImageTokens(processor)
    assert [tokens.count(*image.size) for image in images] == tokens_in_prompt(processor, images)
    assert tokens.size(200, 60) == (200, 60)
    with pytest.raises(DataError, match="no pixel budget"):
        image_settings(processor, None, 50_000)


@given(sizes)
def test_a_usual_image_is_resized_within_the_budget_by_qwens_rule(loaded, size):
    from qwen_vl_utils.vision_process import smart_resize

    width, height = size
    assume(min(size) >= 28 and max(size) <= 8 * min(size))
    _, processor = loaded("qwen2_vl")
    tokens = ImageTokens(processor, 56 * 56, 28 * 28 * 64)
    fitted = tokens.size(width, height)
    assert fitted == smart_resize(height, width, 28, 56 * 56, 28 * 28 * 64)[::-1]
    assert tokens.count(width, height) * 28 * 28 == fitted[0] * fitted[1]
    assert tokens.size(*fitted) == fitted


def test_a_large_photograph_is_counted_as_it_is_loaded(loaded, tmp_path):
    """JPEGs shrink while they are decoded; odd sizes would round to other tokens if the result were kept."""
    _, processor = loaded("qwen2_vl")
    tokens = ImageTokens(processor, 28 * 28, 28 * 28 * 30)
    for width, height in ((1001, 667), (1599, 203), (333, 2000), (1023, 1025)):
        path = tmp_path / f"{width}.jpg"
        noise(width, height).save(path)
        image = tokens.load(path)
        assert image.size == tokens.size(width, height)
        assert tokens_in_prompt(processor, [image]) == [tokens.count_file(path)]


@pytest.mark.parametrize("low, high", [(0, 10_000), (10_000, 9_000), (1, 28 * 28 - 1), (None, 100)])
def test_an_impossible_pixel_budget_is_refused(tmp_path, low, high):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(save_small("qwen2_vl", tmp_path))
    before = dict(processor.image_processor.size)
    with pytest.raises(DataError, match="max_pixels"):
        image_settings(processor, low, high)
    assert dict(processor.image_processor.size) == before


def test_a_budget_survives_saving(tmp_path: Path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(save_small("qwen2_vl", tmp_path))
    image_settings(processor, None, 28 * 28 * 6)
    processor.save_pretrained(tmp_path / "again")
    again = AutoProcessor.from_pretrained(tmp_path / "again")
    assert ImageTokens(again).count(900, 900) == ImageTokens(processor).count(900, 900) <= 6


def test_slivers_are_refused_before_any_pixel_is_decoded(loaded):
    tokens = ImageTokens(loaded("qwen2_vl")[1])
    with pytest.raises(DataError, match="200 times"):
        tokens.count(2010, 10)
