"""Processors that cannot say what stands for an image are refused when a model is loaded, not on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recllm.errors import DataError
from recllm.mllm.loading import load, load_processor
from recllm.mllm.prefix.groups import contents_of
from recllm.mllm.processor import join
from recllm.mllm.scoring.scorer import can_share_prefix
from recllm.training.parts import PROJECTOR, Parts
from tests.mllm.small_models import save_small


def change_processor(folder: Path, **changes) -> None:
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        settings[name] = value
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_processor_without_a_needed_setting_is_refused_by_name(tmp_path, family):
    """Checkpoints of LLaVA saved before 2025 have no patch_size."""
    folder = save_small(family, tmp_path / family)
    change_processor(folder, patch_size=None)
    for read in (load, load_processor):
        with pytest.raises(DataError, match=r"Processor cannot say .*patch_size.*processor_config"):
            read(folder)


def test_a_pixel_budget_is_refused_where_there_is_none_and_not_read_from_sides(tmp_path):
    for family in ("llava", "smolvlm"):  # a shortest and a longest edge in pixels of length
        folder = save_small(family, tmp_path / family)
        assert (load(folder).identity["min_pixels"], load(folder).identity["max_pixels"]) == (None, None)
        with pytest.raises(DataError, match=r"no pixel budget.*leave min_pixels and max_pixels"):
            load(folder, max_pixels=100_000)


def test_a_prefix_is_not_shared_where_attention_slides(tmp_path):
    model = load(save_small("llava_next", tmp_path / "model")).model
    assert can_share_prefix(model)
    model.config.text_config.sliding_window = 16  # as Mistral 7B of 2023 has
    assert not can_share_prefix(model)


def test_an_image_of_several_tiles_is_one_image():
    tokens = np.array([1, 9, 9, 2, 9, 3, 9, 4])
    contents, ends = contents_of(tokens, 9, [5, 6], [3, 1])
    assert contents.tolist() == [1, -6, -6, -6, -6, 3, -7, 4]
    assert ends.tolist() == [5, 7]
    side_by_side, ends = contents_of(np.array([9, 9, 9]), 9, [0, 1], [2, 1])  # with nothing between them
    assert side_by_side.tolist() == [-1, -1, -2]
    assert ends.tolist() == [2, 3]
    with pytest.raises(RuntimeError, match="4 image tokens for 5"):
        contents_of(tokens, 9, [5, 6], [3, 2])


def test_images_of_unequal_tiles_are_joined_with_zeros_behind():
    one, two = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    joined = join([{"pixels": one, "rows": one}, {"pixels": two, "rows": two}], {"pixels"})
    assert set(joined) == {"pixels"}
    assert joined["pixels"].sum((1, 2)).tolist() == [6, 12]
    assert joined["pixels"][0, 2:].abs().sum() == 0


def test_what_llava_next_writes_after_a_row_of_patches_is_of_its_projector(tmp_path):
    model = load(save_small("llava_next", tmp_path / "model")).model
    assert Parts(model).of("model.image_newline") == PROJECTOR
    Parts(model).freeze_all_but((PROJECTOR,))
    assert model.model.image_newline.requires_grad
