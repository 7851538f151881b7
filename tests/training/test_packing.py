"""Rows that share what their prompts begin with: the loss and the gradients of whole rows, for less work."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from recllm.mllm.vision.store import build_visual_store
from recllm.training.collate import Collator
from recllm.training.packing import IGNORED
from tests.mllm import small_models
from tests.training.recipe import run_recipe
from tests.training.test_loss import trainer_of

SHARING = [family for family in small_models.FAMILIES if not family.startswith("gemma")]


def some_rows(trainer, count: int = 9) -> list[dict]:
    """Rows of three targets, of which one has five rows, one alone, and one three with another image."""
    step = len(trainer.train_dataset) // count
    rows = [dict(trainer.train_dataset[place * step]) for place in range(count)]
    for place, row in enumerate(rows):
        row["group"] = (0, 0, 0, 0, 0, 1, 2, 2, 2)[place]
    return rows


def loss_and_gradients(trainer, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    return loss.detach(), torch.autograd.grad(loss, weights)


def assert_equal(one, other, tolerance: float) -> None:
    assert abs(one[0] - other[0]) < tolerance
    largest = max(float(gradient.abs().max()) for gradient in one[1])
    assert largest > 0
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert (ours - theirs).abs().max() < tolerance * max(1.0, largest)


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("name", ["mixed", "text"])
def test_loss_and_gradients_are_those_of_whole_rows(sft, tmp_path, family, name):
    model = str(small_models.save_small(family, tmp_path / family))
    trainer = trainer_of(sft(name, model=model, lora_dropout=0.0))
    rows = some_rows(trainer)
    whole = Collator(trainer.data_collator._loaded)(rows)
    packed = trainer.data_collator(rows)
    assert "layout" in packed
    assert packed["input_ids"].numel() < whole["attention_mask"].sum()
    assert (packed["labels"] != IGNORED).sum() == (whole["labels"] != IGNORED).sum()
    shared = loss_and_gradients(trainer, packed)
    assert_equal(shared, loss_and_gradients(plainly(trainer), whole), 1e-5)


def plainly(trainer):
    trainer._shared_decoder = None
    return trainer


def test_a_model_whose_attention_is_not_causal_throughout_gets_whole_rows(sft, tmp_path):
    (family,) = set(small_models.FAMILIES) - set(SHARING)
    trainer = trainer_of(sft("mixed", model=str(small_models.save_small(family, tmp_path / family))))
    assert "layout" not in trainer.data_collator(some_rows(trainer))


def test_a_visual_store_and_a_blank_image_change_nothing(sft, tmp_path):
    trainer = trainer_of(sft("mixed", lora_dropout=0.0))
    loaded, rows = trainer.data_collator._loaded, some_rows(trainer)
    expected = loss_and_gradients(trainer, trainer.data_collator(rows))
    paths = sorted({path for row in rows for path in row["images"]})
    trainer._store = build_visual_store(
        loaded.model, loaded.processor, paths, tmp_path / "store", dtype="float32"
    )
    stored = Collator(loaded, visual_store=trainer._store, share_prefixes=True)(rows)
    assert "pixel_values" not in stored
    assert_equal(loss_and_gradients(trainer, stored), expected, 1e-5)
    texts = [row for row in rows if not row["images"]]
    blank = Collator(loaded, blank_image=True, share_prefixes=True)(texts)
    assert len(blank["image_grid_thw"]) == 1
    plain = loss_and_gradients(trainer, Collator(loaded, share_prefixes=True)(texts))
    assert_equal(loss_and_gradients(trainer, blank), plain, 1e-5)


def test_a_training_ends_where_that_of_whole_rows_ends(sft):
    weights = []
    for name, changes in (
        ("shared", {}),
        ("frugal", {"gradient_checkpointing": True}),
        ("whole", {"share_prefixes": False}),
    ):
        run = run_recipe(sft("mixed", out=name, max_steps=3, lora_dropout=0.0, **changes))
        weights.append(load_file(run / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors"))
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-6), name
        assert torch.allclose(weight, weights[2][name], atol=2e-5), name
