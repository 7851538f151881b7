"""Shared prompts and pictures give TRL's losses and gradients."""

from __future__ import annotations

import pytest
import torch

from recllm.training.grpo.folder import open_run
from recllm.training.grpo.steps import load_data, load_model, make_trainer
from tests.training.grpo.conftest import Options

DIFFERS = "tests.training.grpo.planted:differs"


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"visual_store": "auto"}])
def test_losses_and_gradients_are_those_of_trl(grpo: Options, kind, changes, monkeypatch):
    """On one batch of sampled answers, with a reference and an adapter that does something."""
    if kind == "text" and changes:
        pytest.skip("without images nothing else happens")
    options = grpo(prompts=(kind,), rewards=(DIFFERS,), temperature=1.5, **changes)
    with open_run(options) as run:
        model = load_model(options)
        trainer = make_trainer(options, run, model, load_data(options, model))
        generator = torch.Generator().manual_seed(0)
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
        trainer.current_gradient_accumulation_steps = 1
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        packed, measured = trainer._packed, []
        for way in (packed, None):
            trainer._packed, trainer._buffered_inputs = way, None
            torch.manual_seed(5)  # the same answers
            monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda inputs: inputs)
            inputs = trainer._prepare_inputs(batch)
            trainer.model.zero_grad()
            with trainer._backward:
                loss = trainer._compute_loss(trainer.model, dict(inputs))
                loss.backward()
            gradients = [w.grad.clone() for w in trainer.model.parameters() if w.grad is not None]
            measured.append((loss, gradients, inputs))
    ours, theirs = measured
    assert packed is not None and abs(ours[0].item()) > 1e-4
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-4, abs=1e-6)
    assert len(ours[1]) == len(theirs[1]) > 10
    scale = max(float(gradient.abs().max()) for gradient in theirs[1])
    for own, their in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(own, their, rtol=1e-3, atol=1e-4 * scale)
    own, their = (each[2] for each in measured)
    assert torch.equal(own["completion_ids"], their["completion_ids"])
    mask = own["completion_mask"].bool()
    references = [each["ref_per_token_logps"][mask] for each in (own, their)]
    torch.testing.assert_close(*references, rtol=1e-4, atol=1e-4)
