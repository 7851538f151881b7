"""The loss: plain cross-entropy of the completions, however the vocabulary is saved and batches are cut."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from recllm.mllm.vision.store import build_visual_store
from recllm.training import sft as steps
from recllm.training.collate import Collator
from recllm.training.folder import open_run
from tests.mllm import small_models
from tests.training.recipe import run_recipe


def trainer_of(options):
    """Goes through the steps of a run up to its trainer."""
    run = open_run(options)
    model = steps.load_model(options)
    return steps.make_trainer(options, run, model, steps.load_data(options, run, model))


@pytest.fixture
def trainer(sft):
    return trainer_of(sft("mixed", lora_dropout=0.0, share_prefixes=False))


def batch_of(trainer, count: int = 6) -> dict:
    return trainer.data_collator([trainer.train_dataset[place] for place in range(count)])


def test_it_is_the_cross_entropy_of_all_logits_at_the_labels(trainer):
    batch = batch_of(trainer)
    own = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert abs(own - plain) < 1e-6


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_it_is_so_in_every_family(sft, tmp_path, family):
    model = str(small_models.save_small(family, tmp_path / family))
    trainer = trainer_of(sft("mixed", model=model, lora_dropout=0.0, share_prefixes=False))
    batch = batch_of(trainer, 4)
    assert len(batch["labels"]) == 4
    own = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert abs(own - plain) < 1e-5


def test_it_is_that_of_trl(trainer):
    batch = batch_of(trainer)
    own = trainer.compute_loss(trainer.model, dict(batch))
    trl = super(type(trainer), trainer).compute_loss(trainer.model, dict(batch))
    assert abs(own - trl) < 1e-5
    labels = (batch["labels"][:, 1:] != -100).sum()
    counted = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=2 * labels)
    assert abs(counted - own / 2) < 1e-6


def test_the_vocabulary_is_computed_at_label_positions_alone(trainer):
    batch = batch_of(trainer)
    seen = []
    head = trainer.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    trainer.compute_loss(trainer.model, dict(batch))
    hook.remove()
    assert seen == [((batch["labels"] != -100).sum(), head.weight.shape[0])]
    full = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert full.shape[:2] == batch["input_ids"].shape  # nothing is left behind


def test_gradients_are_those_of_the_plain_loss(trainer):
    batch = batch_of(trainer)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    own = torch.autograd.grad(trainer.compute_loss(trainer.model, dict(batch)), weights)
    logits = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    for ours, theirs in zip(own, torch.autograd.grad(plain, weights), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_visual_store_gives_the_loss_of_the_pixels(sft, tmp_path):
    trainer = trainer_of(sft("mixed", lora_dropout=0.0, share_prefixes=False))
    rows = [trainer.train_dataset[place] for place in range(6)]
    loaded = trainer.data_collator._loaded
    paths = sorted({path for row in rows for path in row["images"]})
    store = build_visual_store(loaded.model, loaded.processor, paths, tmp_path / "store", dtype="float32")
    pixels = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    trainer._store = store
    batch = Collator(loaded, visual_store=store)(rows)
    stored = trainer.compute_loss(trainer.model, batch)
    assert "pixel_values" not in batch
    assert abs(stored - pixels) < 1e-5


def test_accumulated_batches_equal_one_large_batch(sft):
    weights = []
    for name, size, accumulation in (("large", 8, 1), ("small", 2, 4)):
        options = sft(
            "mixed", out=name, batch_size=size, accumulation=accumulation, max_steps=3, lora_dropout=0.0
        )
        run = run_recipe(options)
        weights.append(load_file(run / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=2e-5), name


def test_checkpointed_activations_and_workers_change_nothing(sft):
    weights = []
    for name, changes in (("plain", {}), ("frugal", {"gradient_checkpointing": True, "workers": 1})):
        run = run_recipe(sft("mixed", out=name, max_steps=2, lora_dropout=0.0, **changes))
        weights.append(load_file(run / "adapter_model.safetensors"))
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-6), name
