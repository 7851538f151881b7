"""Scores with a shared prefix against one prompt at a time through `model(**inputs).logits`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

from recllm.errors import DataError
from recllm.mllm import load
from recllm.mllm.prefix.groups import plan, plan_padded, share
from recllm.mllm.scoring import YesNoScorer, score_table
from recllm.mllm.scoring.prompts import PromptReader, image_sizes
from recllm.mllm.scoring.scorer import FULL_PROMPTS, SHARED_PREFIX, Session
from recllm.mllm.vision.store import build_visual_store
from tests.mllm.scoring.worlds import make_images, make_rows, one_by_one
from tests.mllm.small_models import FAMILIES, save_adapter, save_small

FORMS = {"yes": ("y", "s"), "no": ("n",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_small(family, root / family, seed=2) for family in FAMILIES}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("world")
    return folder, make_images(folder, 8)


@pytest.fixture
def small(models):
    return load(models["qwen2_vl"])


def expect_equal(scorer: YesNoScorer, rows: pl.DataFrame, folder: Path, tolerance: float = 1e-4) -> None:
    found = score_table(scorer, rows, folder)
    answers = scorer.answers
    margin, outside = one_by_one(scorer.loaded, rows, folder, list(answers.yes), list(answers.no))
    assert found["id"].to_list() == rows["id"].to_list()
    np.testing.assert_allclose(found["margin"], margin, atol=tolerance)
    np.testing.assert_allclose(found["outside"], outside, atol=tolerance)
    np.testing.assert_allclose(found["probability"], 1 / (1 + np.exp(-margin)), atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("about_target", [False, True])
def test_every_family_scores_as_one_by_one(models, world, family, about_target):
    folder, images = world
    scorer = YesNoScorer(load(models[family]), **FORMS)
    assert scorer.method == (FULL_PROMPTS if family == "gemma3" else SHARED_PREFIX)
    rows = make_rows(images, users=8, seed=5, about_target=about_target)
    expect_equal(scorer, rows, folder)


@pytest.mark.parametrize("seed", range(4))
def test_any_budget_and_order_of_rows_gives_the_same_scores(small, world, seed):
    folder, images = world
    rows = make_rows(images, users=7, seed=seed)
    expected = score_table(YesNoScorer(small, **FORMS), rows, folder)
    for budget in (1, 90, 300, 100_000):
        shuffled = rows.sample(fraction=1, shuffle=True, seed=budget)
        found = score_table(YesNoScorer(small, **FORMS, batch_tokens=budget), shuffled, folder)
        both = found.join(expected, on="id", how="inner")
        assert both.height == rows.height
        np.testing.assert_allclose(both["margin"], both["margin_right"], atol=1e-4)
    expect_equal(YesNoScorer(small, **FORMS, batch_tokens=200), rows, folder)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_a_visual_store_changes_no_score_and_spares_the_tower(models, world, tmp_path, family, monkeypatch):
    folder, images = world
    loaded = load(models[family])
    paths = [(folder / image).resolve() for image in images]
    store = build_visual_store(
        loaded.model, loaded.processor, paths, tmp_path / "store", dtype="float32", progress=False
    )
    rows = make_rows(images, users=6)
    expected = score_table(YesNoScorer(loaded, **FORMS), rows, folder)["margin"]
    monkeypatch.setattr("recllm.mllm.scoring.scorer.EncodedImages", None)  # nothing is encoded any more
    stored = YesNoScorer(loaded, visual_store=store, **FORMS)
    expect_equal(stored, rows, folder)
    found = score_table(stored, rows, folder)["margin"]
    assert expected.std() > 0
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_adapters_and_four_bits_score_as_one_by_one(models, world, tmp_path):
    folder, images = world
    rows = make_rows(images, users=6, seed=1)
    base = save_small("qwen2_vl", tmp_path / "base", hidden=64)  # what 4-bit blocks need
    adapter = save_adapter(base, tmp_path / "adapter")
    found = []
    for options in ({}, {"adapter": adapter}, {"quantization": "nf4"}):
        scorer = YesNoScorer(load(base, **options), **FORMS)
        # Some CPUs multiply 4-bit weights in bfloat16, and round by the shape of a batch.
        expect_equal(scorer, rows, folder, tolerance=0.05 if "quantization" in options else 1e-4)
        found.append(score_table(scorer, rows, folder)["margin"])
    assert all((found[0] - other).abs().max() > 1e-2 for other in found[1:])


def test_training_goes_on_after_scoring_with_the_same_gradients_in_four_bits(world, tmp_path):
    folder, images = world
    base = save_small("qwen2_vl", tmp_path / "base", hidden=64)
    loaded = load(base, quantization="nf4", dtype="float32", training=True)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(loaded.model, lora).train()
    tokens = torch.arange(20)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]

    before = gradients()
    expect_equal(YesNoScorer(replace(loaded, model=model), **FORMS), make_rows(images, users=4), folder)
    assert any(gradient.any() for gradient in before)
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_ranks_as_one_by_one_in_float32(models, world):
    folder, images = world
    rows = make_rows(images, users=20, seed=2)
    scorer = YesNoScorer(load(models["qwen2_5_vl"], dtype="bfloat16"), **FORMS)
    found = score_table(scorer, rows, folder)["margin"]
    exact, _ = one_by_one(
        load(models["qwen2_5_vl"]), rows, folder, list(scorer.answers.yes), list(scorer.answers.no)
    )
    assert found.dtype == pl.Float32
    assert spearmanr(found, exact).statistic > 0.98


def test_images_are_told_apart_by_content_not_by_size_or_name(small, tmp_path):
    images = make_images(tmp_path, 8)  # 0, 3 and 6 are 56 x 56; copy is 0
    row = make_rows([images[0]], users=1, seed=3, most_history=0)[:1].to_dicts()[0]
    turn = [{"type": "image"}, {"type": "text", "text": "mug"}]
    rows = pl.DataFrame(
        [
            row | {"id": name, "prompt": [{"role": "user", "content": turn}], "images": [name]}
            for name in (images[0], images[3], images[-1])
        ]
    )
    scorer = YesNoScorer(small, **FORMS)
    with scorer.session() as session:
        reader = PromptReader(small, tmp_path, image_sizes(rows, tmp_path), session.key_of)
        first, other, copy = (reader.read(0, content) for content in rows.to_dicts())
    assert (first.tokens == other.tokens).all()
    place = int(np.flatnonzero(first.tokens == small.image_token_id)[0])
    assert share([first, other]).shared == place  # the prefix ends before the image
    assert share([first, copy]).shared == len(first.tokens) - 1
    expect_equal(scorer, rows, tmp_path)
    margins = score_table(scorer, rows, tmp_path)["margin"]
    assert margins[0] == pytest.approx(margins[2], abs=1e-4)
    assert abs(margins[0] - margins[1]) > 1e-3


def test_batches_hold_each_prompt_once_and_keep_to_the_budget(small, world):
    folder, images = world
    rows = make_rows(images, users=12, seed=9)
    scorer = YesNoScorer(small, **FORMS)
    with scorer.session() as session:
        reader = PromptReader(small, folder, image_sizes(rows, folder), session.key_of)
        prompts = [reader.read(row, content) for row, content in enumerate(rows.to_dicts())]
    groups = [share(prompts[start : start + 5]) for start in range(0, len(prompts), 5)]
    for form in (plan, plan_padded):
        for budget in (1, 150, 400, 10**6):
            batches = form(groups, budget)
            taken = [prompt.row for batch in batches for group in batch for prompt in group.prompts]
            assert sorted(taken) == list(range(rows.height))
            for batch in batches:
                alone = sum(len(group.prompts) for group in batch) == 1
                assert alone or sum(group.tokens for group in batch) <= budget


def test_scoring_leaves_the_model_as_it_was_and_reads_its_weights_anew(small, world):
    folder, images = world
    rows = make_rows(images, users=3)
    model = get_peft_model(
        small.model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    )
    training = replace(small, model=model)
    scorer = YesNoScorer(training, **FORMS)
    model.train()
    frozen = model.get_base_model().model.visual.eval()
    before = {name: module.training for name, module in model.named_modules()}
    implementation = model.get_base_model().get_decoder().config._attn_implementation
    first = score_table(scorer, rows, folder)["margin"]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not frozen.training
    assert model.get_base_model().get_decoder().config._attn_implementation == implementation
    assert torch.is_grad_enabled()
    assert first.equals(score_table(scorer, rows, folder)["margin"])  # no dropout
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    model.eval()
    assert (first - score_table(scorer, rows, folder)["margin"]).abs().max() > 1e-3
    expect_equal(scorer, rows, folder)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_too_little_memory_halves_batches_down_to_one_prompt(models, world, monkeypatch, family):
    folder, images = world
    rows = make_rows(images, users=6, seed=4)
    scorer = YesNoScorer(load(models[family]), **FORMS)
    run, sizes, limit = Session._run, [], 3

    def small_memory(self, batch, pixels):
        sizes.append(sum(len(group.prompts) for group in batch))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, batch, pixels)

    before = scorer.batch_tokens
    monkeypatch.setattr(Session, "_run", small_memory)
    expect_equal(scorer, rows, folder)
    assert max(sizes) > limit
    assert scorer.batch_tokens < before
    limit = 0
    with pytest.raises(DataError, match=r"sample '.*tokens need more memory"):
        score_table(scorer, rows, folder)


def test_bad_samples_are_named(small, world, tmp_path):
    folder, images = world
    rows = make_rows(images, users=3, seed=6)
    scorer = YesNoScorer(small, **FORMS)
    with pytest.raises(DataError, match=r"sample '0/u0/i0'.*1,0\d\d tokens|sample '.*the model takes 1,024"):
        long = [{"role": "user", "content": [{"type": "text", "text": "mug " * 1100}]}]
        row = {**rows.row(0, named=True), "id": "0/u0/i0", "prompt": long, "images": []}
        score_table(scorer, pl.DataFrame([row], schema=rows.schema, strict=False), folder)
    missing = rows.with_columns(images=pl.lit(["images/none.png"], pl.List(pl.String)))
    with pytest.raises(DataError, match=r"1 images cannot be read: sample '.*none.png"):
        score_table(scorer, missing, folder)
    outside = rows.with_columns(images=pl.lit(["../secret.png"], pl.List(pl.String)))
    with pytest.raises(DataError, match="leaves the folder"):
        score_table(scorer, outside, folder)
    forged = rows.row(0, named=True) | {
        "images": [],
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}],
    }
    with pytest.raises(DataError, match=f"{forged['id']}.*special token"):
        score_table(scorer, pl.DataFrame([forged], schema=rows.schema, strict=False), folder)
    with pytest.raises(DataError, match="no column 'target'"):
        score_table(scorer, rows.drop("target"), folder)


def test_an_image_that_only_decoding_shows_to_be_cut_off_is_named(small, tmp_path):
    images = make_images(tmp_path, 3)
    data = (tmp_path / images[1]).read_bytes()
    (tmp_path / images[1]).write_bytes(data[: len(data) // 2])
    rows = make_rows([images[1]], users=3, seed=6)
    with pytest.raises(DataError, match=r"sample '\d/u\d/i\d': image .*1\.png"):
        score_table(YesNoScorer(small, **FORMS), rows, tmp_path)
