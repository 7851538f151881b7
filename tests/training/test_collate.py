"""Batches: exactly the template's tokens, labels on completions alone, as many image tokens as features."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recllm.data.instructions import open_part
from recllm.errors import DataError
from recllm.mllm.loading import load
from recllm.mllm.vision.store import build_visual_store
from recllm.training.collate import IMAGE_KEYS, Collator
from recllm.training.conversations import encode_conversation
from recllm.training.packing import IGNORED
from recllm.training.rows import training_rows
from recllm.training.sampling import EpochSampler
from tests.mllm.small_models import save_small


@pytest.fixture(scope="module")
def rows(world, loaded, tmp_path_factory):
    cache = tmp_path_factory.mktemp("rows")
    part = open_part(world / "instructions" / "plain", "train")
    return training_rows(loaded, part, cache)


def instruction_row(world: Path, name: str = "plain") -> dict:
    return pl.read_parquet(world / "instructions" / name / "train.parquet").row(0, named=True)


def test_tokens_are_those_of_the_processor_for_the_whole_conversation(world, loaded):
    for name in ("plain", "text"):
        row = instruction_row(world, name)
        chat = [
            {
                "role": turn["role"],
                "content": [{k: v for k, v in part.items() if v} for part in turn["content"]],
            }
            for turn in row["prompt"] + row["completion"]
        ]
        pictures = [Image.open(world / path).convert("RGB") for path in row["images"]]
        text = loaded.processor.apply_chat_template(chat, tokenize=False)
        expected = loaded.processor(text=[text], images=pictures or None)["input_ids"][0]
        encoded = encode_conversation(loaded, row, world)
        assert encoded.tokens == list(expected)


def test_labels_are_the_completion_with_the_end_of_its_turn(rows, loaded):
    batch = Collator(loaded)([rows[place] for place in range(6)])
    for tokens, labels, attended in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        labeled = labels != IGNORED
        assert loaded.tokenizer.decode(labels[labeled]) in ("Yes.<|im_end|>", "No.<|im_end|>")
        assert torch.equal(labels[labeled], tokens[labeled])
        assert attended[labeled].all()
        behind = tokens[int(labeled.nonzero()[-1]) + 1 : int(attended.sum())]
        assert loaded.tokenizer.decode(behind).strip() == ""  # what the template writes after a turn
        assert (attended.diff() <= 0).all()  # padded on the right


@pytest.mark.parametrize(
    "family, ending",
    [
        ("llava", "</s>"),
        ("llava_next", "</s>"),
        ("smolvlm", "<end_of_utterance>"),
        ("gemma3", "<end_of_turn>"),
    ],
)
def test_every_family_learns_to_end_its_answer(world, tmp_path, family, ending):
    """LLaVA-1.5's template ends an answer with a space alone: a model trained so would never stop."""
    model = load(save_small(family, tmp_path / family))
    encoded = encode_conversation(model, instruction_row(world), world)
    said = model.tokenizer.decode(encoded.tokens[encoded.start : encoded.end])
    assert said.strip() in [f"{answer}{model.tokenizer.eos_token}" for answer in ("Yes.", "No.")]
    assert encoded.tokens[encoded.end - 1] in model.stop_token_ids


def test_turns_of_words_in_a_completion_are_refused(world, tmp_path):
    model, row = load(save_small("llava", tmp_path / "llava")), instruction_row(world)
    row["completion"][0]["content"][0]["text"] = "Yes. USER: and this one? ASSISTANT: No."
    with pytest.raises(DataError, match=r"completion holds the turn mark 'ASSISTANT:'"):
        encode_conversation(model, row, world)


def test_pixels_are_those_of_the_processor(rows, loaded, world):
    some = [rows[place] for place in range(3)]
    batch = Collator(loaded)(some)
    pictures = [Image.open(path).convert("RGB") for row in some for path in row["images"]]
    expected = loaded.processor.image_processor(images=pictures, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
    images = batch["input_ids"] == loaded.image_token_id
    assert torch.equal(batch["mm_token_type_ids"].bool(), images)


@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_special_tokens_in_data_are_refused(world, loaded, where):
    row = instruction_row(world)
    for part in row[where][0]["content"]:
        if part["type"] == "text":
            part["text"] += "<|im_end|>\n<|im_start|>assistant\nYes."
    with pytest.raises(DataError, match=r"special token '<\|im_"):
        encode_conversation(loaded, row, world)


def test_rows_longer_than_the_model_are_refused_not_cut(world, loaded):
    row = instruction_row(world)
    row["prompt"][0]["content"][0]["text"] += " word" * loaded.max_positions
    with pytest.raises(DataError, match=rf"sample '{row['id']}'.*nothing is cut"):
        encode_conversation(loaded, row, world)


def test_an_image_that_changed_size_is_named(rows, loaded, tmp_path):
    row = dict(rows[0])
    path = tmp_path / "grown.png"
    Image.new("RGB", (224, 112)).save(path)
    with pytest.raises(DataError, match=f"sample '{row['id']}'.*4 image tokens for 10 visual features"):
        Collator(loaded)([{**row, "images": [str(path)]}])


def test_a_visual_store_names_the_images_instead(rows, loaded, tmp_path):
    some = [rows[place] for place in range(4)]
    paths = [Path(path) for row in some for path in row["images"]]
    store = build_visual_store(loaded.model, loaded.processor, paths, tmp_path / "store", dtype="float32")
    batch = Collator(loaded, visual_store=store)(some)
    assert batch[IMAGE_KEYS] == store.keys_of(paths)
    assert "pixel_values" not in batch


def test_a_blank_image_changes_no_value_and_reaches_the_tower(world, loaded, tmp_path):
    part = open_part(world / "instructions" / "text", "train")
    some = list(training_rows(loaded, part, tmp_path, limit=3))
    plain, blank = Collator(loaded)(some), Collator(loaded, blank_image=True)(some)
    assert "pixel_values" not in plain
    assert blank["attention_mask"].sum() == plain["attention_mask"].sum()
    weight = loaded.model.model.visual.patch_embed.proj.weight
    with torch.no_grad():
        losses = [loaded.model(**batch).loss for batch in (plain, blank)]
    assert abs(losses[0] - losses[1]) < 1e-6
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loaded.model(**blank).loss, weight)
    assert gradient.abs().max() == 0


def test_a_batch_with_images_gets_no_blank_one(rows, loaded):
    some = [rows[0], rows[1]]
    assert len(Collator(loaded, blank_image=True)(some)["image_grid_thw"]) == 2


def test_rows_are_read_once_and_again_when_the_pixel_budget_changes(world, loaded, tmp_path):
    part = open_part(world / "instructions" / "plain", "train")
    training_rows(loaded, part, tmp_path, limit=2)
    (file,) = tmp_path.glob("*.arrow")
    written = file.stat().st_mtime_ns
    training_rows(loaded, part, tmp_path, limit=2)
    assert file.stat().st_mtime_ns == written
    other = replace(loaded)
    before = other.processor.image_processor.size
    try:
        other.processor.image_processor.size = {"shortest_edge": 784 * 16, "longest_edge": 784 * 16}
        larger = training_rows(other, part, tmp_path, limit=2)
    finally:
        other.processor.image_processor.size = before
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    assert larger["length"][0] == training_rows(loaded, part, tmp_path, limit=2)["length"][0] + 12


def test_a_part_that_is_not_the_manifest_s_is_refused(world, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    for name in ("manifest.json", "train.parquet"):
        (folder / name).write_bytes((world / "instructions" / "plain" / name).read_bytes())
    rows = pl.read_parquet(folder / "train.parquet")
    rows.head(3).write_parquet(folder / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet is not the file"):
        open_part(folder, "train")


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 500, 97).tolist()

    def order(seed: int, epoch: int, step: int = 8) -> list[int]:
        torch.rand(3)  # dropout moves the global generator on; the order must not depend on it
        sampler = EpochSampler(range(97), step, seed, lengths)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3) != order(2, 3)
    assert sorted(order(1, 2)) == list(range(97))
    batches = [order(1, 2)[place : place + 8] for place in range(0, 96, 8)]
    spread = np.mean([np.ptp([lengths[row] for row in batch]) for batch in batches])
    unsorted = EpochSampler(range(97), 8, 1)
    shuffled = list(unsorted)
    random = np.mean(
        [np.ptp([lengths[row] for row in shuffled[place : place + 8]]) for place in range(0, 96, 8)]
    )
    assert spread < random / 2


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.integers(1, 16), st.booleans())
def test_rows_of_one_group_stay_together(sizes, step, by_length):
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    lengths = [7 * group % 5 + 1 for group in groups] if by_length else None
    order = list(EpochSampler(groups, step, 0, lengths))
    assert sorted(order) == list(range(len(groups)))
    assert len(list(groupby(groups[row] for row in order))) == len(sizes)


def test_a_lazy_column_is_read_once_and_not_row_by_row():
    """Each index into a column of a `datasets.Dataset` formats a row: a minute for 50,000 rows."""

    class Column(list):
        def __getitem__(self, index):
            assert isinstance(index, slice), "a single row was looked up"
            return list(self)[index]

    groups, lengths = [3, 3, 1, 1, 1, 3], [5, 9, 2, 2, 2, 7]
    lazy = EpochSampler(Column(groups), 2, 0, Column(lengths))
    assert list(lazy) == list(EpochSampler(groups, 2, 0, lengths))
    assert sorted(lazy) == list(range(6)) and len(lazy) == 6
    assert "".join(map(str, lazy)).count("01") == "".join(map(str, lazy)).count("234") == 1
    assert list(EpochSampler([], 2, 0)) == []
