"""What a GRPO run is put together from: options, order of prompts, spreads, inputs, and the prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trl.data_utils import prepare_multimodal_messages

from recllm.errors import DataError
from recllm.mllm.loading import LoadedModel, load
from recllm.mllm.rendering import encode
from recllm.training.grpo.encoding import PathEncoder
from recllm.training.grpo.judging import Judge, dead_shares, settle
from recllm.training.grpo.options import GRPOOptions
from recllm.training.grpo.rows import as_dataset, read_rows
from recllm.training.grpo.sampling import GroupSampler
from recllm.training.rewards import RewardSettings, Source, make_rewards
from tests.training.grpo.conftest import Options


@pytest.fixture(scope="module")
def loaded(tiny_path: Path) -> LoadedModel:
    return load("tiny")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iterations": 2, "valid_every": 5}, "--valid-every 5.*multiple of 2"),
        ({"iterations": 4, "valid_every": 8, "save_every": 6}, "--save-every 6.*multiple of 4"),
        ({"iterations": 4, "valid_every": 8, "max_steps": 10}, "--max-steps 10.*multiple of 4"),
        ({"rewards": ("lenght",)}, "nearest is 'length'"),
        ({"rewards": ("length=much",)}, "expected NAME or NAME=WEIGHT"),
        ({"rewards": ("length", "length=2")}, "named twice"),
        ({"rewards": ("length",), "metric": "utility"}, "expected reward, or one of the parts"),
        ({"rewards": ("length",), "encoder": "other"}, "--encoder has no effect without information"),
        ({"rewards": ("length",), "judge": "other"}, "--judge has no effect"),
        ({"rewards": ("utility",)}, "give --split"),
        ({"task": "viu", "prompts": ("image",)}, "--prompts has no effect with --task viu"),
        ({"task": "viu", "rewards": ("form",)}, "judges lists of keywords"),
        ({"visual": "other"}, "--visual has no effect"),
        ({"scale": "batch"}, "--scale has no effect"),
        ({"vllm_memory": 0.5}, "--vllm-memory has no effect"),
        ({"adapter": "x", "lora_rank": 4}, "--lora-rank has no effect"),
        ({"group": 1}, "--group 1: expected 2"),
        ({"least": 9}, "band 9 to 6"),
        ({"epsilon_high": 0.0}, "--epsilon-high 0.0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        GRPOOptions(**given)


def test_the_defaults_are_those_of_the_recipe():
    options = GRPOOptions()
    assert (options.group, options.max_new_tokens, options.beta, options.epsilon_high) == (8, 96, 0.04, 0.28)
    assert (options.loss, options.lora_dropout, options.learning_rate) == ("dapo", 0.0, 1e-5)
    assert options.reward_settings.weights["agreement"] == 1
    assert (options.reward_settings.least, options.reward_settings.most) == (3, 6)
    assert GRPOOptions(task="viu").reward_settings.most == 60


def test_blocks_hold_one_kind_and_depend_on_seed_and_epoch_alone():
    kinds = ["image", "text"] * 10 + ["image"]
    sampler = GroupSampler(kinds, block=3, group=4, repeats=2, seed=5)
    first = list(sampler)
    assert len(first) == len(sampler) == 6 * 3 * 4 * 2
    blocks = np.array(first).reshape(6, 2, 3, 4)
    assert (blocks[:, 0] == blocks[:, 1]).all()
    assert (blocks == blocks[..., :1]).all()
    assert all(len({kinds[row] for row in block.ravel()}) == 1 for block in blocks)
    assert len(np.unique(first)) == 18
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = GroupSampler(kinds, block=3, group=4, repeats=2, seed=5)
    again.set_epoch(1)
    assert list(again) == second


def test_parts_that_hardly_differ_push_nothing():
    nan = float("nan")
    rewards = torch.tensor(
        [[0.5, 0.2, nan], [0.505, 0.8, nan], [0.1, nan, 0.3], [0.9, nan, 0.3]], dtype=torch.float64
    )
    settled, dead = settle(rewards, 2, 0.01)
    assert settled[:2, 0].tolist() == pytest.approx([0.5025, 0.5025])
    assert settled[2:, 0].tolist() == [0.1, 0.9]
    assert settled[:2, 1].tolist() == [0.2, 0.8]
    assert torch.equal(settled.isnan(), rewards.isnan())
    np.testing.assert_array_equal(dead.numpy(), [[1, 0, np.nan], [0, np.nan, 1]])
    shares = dead_shares(dead, ["a", "b", "c"], {"a": 1, "b": 0, "c": 1})
    assert shares == {"a": 0.5, "b": 0.0, "c": 1.0, "all": 0.5}  # b teaches nothing: its weight is 0


def test_a_spread_of_zero_is_dead_whatever_the_floor():
    assert settle(torch.full((4, 1), 0.3), 4, 0.0)[1].tolist() == [[1.0]]


def test_the_judge_tells_cut_off_from_finished_by_the_last_token():
    rewards = make_rewards(RewardSettings({"length": 1.0}))
    judge = Judge(rewards, [Source("i/text", "i", "text", ())], ends=[2])
    said = [[{"content": text}] for text in ("a, b, c", "a, b, c", "", "a, a, b")]
    table = judge.judge(said, [[5, 2], [5, 7], [2], [5, 2]], [0, 0, 0, 0])
    assert table[0, 0] == 1 and np.isnan(table[1, 0]) and table[2, 0] == 0
    (column,) = judge.functions()
    assert column.__name__ == "length"
    assert column(completions=said, completion_ids=[], row=[], prompts=[])[:3] == [1.0, None, 0.0]
    assert judge.faults() == {"answers": 4, "empty": 1, "truncated": 1, "repeating": 1, "copied": 0}


def test_held_out_items_are_never_trained_on(loaded, grpo: Options):
    rows = read_rows(grpo(prompts=("image", "text")), loaded)
    held = {source.item for source in rows.valid}
    assert len(held) == 4 and len(rows.valid) == 8
    assert not held & {source.item for source in rows.train}
    other = read_rows(grpo(prompts=("image", "text"), seed=1), loaded)
    assert {source.item for source in other.valid} != held


def test_references_are_of_text_prompts_unless_other_texts_are_named(loaded, grpo: Options):
    rows = read_rows(grpo(prompts=("image", "text"), rewards=("information", "length")), loaded)
    assert all(bool(source.reference) == (source.kind == "text") for source in rows.train)
    assert all(source.shown for source in rows.train if source.kind == "text")
    assert set(rows.others) == {s.item for s in (*rows.train, *rows.valid) if s.images}
    assert all(f"images/{item}.png" != other for item, other in rows.others.items())


def test_a_prompt_that_is_too_long_is_refused_before_training(loaded, grpo: Options):
    with pytest.raises(
        DataError, match=r"i\d+/image: its prompt has \d+ tokens, images included; at most 20"
    ):
        read_rows(grpo(max_prompt_tokens=20), loaded)


def test_items_without_a_usable_image_have_no_image_prompt(loaded, grpo: Options, toys, tmp_path):
    import shutil

    copy = tmp_path / "broken"
    shutil.copytree(toys, copy)
    (copy / "images" / "i00003.png").write_bytes(b"no picture")
    rows = read_rows(replace(grpo(), dataset=copy), loaded)
    assert "i00003" in rows.unusable
    assert "i00003" not in {source.item for source in (*rows.train, *rows.valid)}
    with pytest.raises(DataError, match="nothing is left to train on"):
        read_rows(grpo(valid_items=24), loaded)


def test_inputs_of_paths_are_those_of_decoded_images(loaded, grpo: Options, toys):
    rows = read_rows(grpo(prompts=("image", "text")), loaded)
    table = as_dataset(rows.train, toys)
    images = [row for row, source in enumerate(rows.train) if source.kind == "image"][:2]
    encoder = PathEncoder(loaded)
    batch = [table[row] for row in [images[0], images[1], images[0]]]
    assert all(isinstance(path, str) for row in batch for path in row["images"])
    prompts = [prepare_multimodal_messages(row["prompt"], row["images"]) for row in batch]
    texts, paths = encoder.texts(prompts)
    found = encoder.processor()(images=paths, text=texts, padding=True, return_tensors="pt")
    requests = [rows.request(rows.train[row["row"]]) for row in batch]
    expected = encode(loaded, requests, [[loaded.images.load(each.images[0])] for each in requests])
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_right_padding_is_refused(tiny_path):
    loaded = load("tiny")
    loaded.tokenizer.padding_side = "right"
    with pytest.raises(RuntimeError, match="left padding"):
        PathEncoder(loaded).processor()
