"""Which parts train: what was asked for changes, and nothing else does."""

from __future__ import annotations

import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model

from recllm.errors import DataError
from recllm.mllm.loading import load
from recllm.training import sft as steps
from recllm.training.options import SFTOptions
from recllm.training.parts import EMBEDDINGS, LANGUAGE, PROJECTOR, VISION, Parts, lora_pattern
from tests.mllm import small_models
from tests.training.test_loss import trainer_of


def state(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("qlora", {LANGUAGE}),
        ("qlora", {LANGUAGE, PROJECTOR, VISION}),
        ("lora", {PROJECTOR}),
        ("full", {LANGUAGE}),
        ("full", {PROJECTOR, VISION}),
        ("full", {LANGUAGE, EMBEDDINGS}),
    ],
)
def test_what_trains_changes_and_what_is_frozen_does_not(sft, method, parts):
    options = sft(
        method=method,
        max_steps=2,
        train_language=LANGUAGE in parts,
        train_projector=PROJECTOR in parts,
        train_vision=VISION in parts,
        train_embeddings=EMBEDDINGS in parts,
    )
    trainer = trainer_of(options)
    before = state(trainer.model)
    parts_of = Parts(trainer.model)
    trainer._validation.measure = lambda model: {"valid_auc": 0.5}
    trainer.train()
    changed = set()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        core = name.removeprefix("base_model.model.")
        part = parts_of.of(core.replace(".base_layer", ""))
        trains = part in parts and (method == "full" or ".lora_" in name)
        assert not moved or trains, f"{name} was frozen and changed"
        if moved:
            changed.add(part)
    assert changed == parts
    four_bits = {name for name, module in trainer.model.named_modules() if isinstance(module, Linear4bit)}
    assert not [name for name in four_bits if ".visual." in name or "lm_head" in name]
    assert bool(four_bits) == (method == "qlora")


def test_parameters_in_4_bits_count_as_what_they_stand_for(tiny_path):
    plain = {each.part: each.parameters for each in Parts(load("tiny").model).counts()}
    quantized = {
        each.part: each.parameters for each in Parts(load("tiny", quantization="nf4").model).counts()
    }
    assert quantized == plain
    assert all(plain.values())


def test_an_adapter_s_numbers_are_trained_and_not_the_model_s(tiny_path):
    model = load("tiny").model
    before = {each.part: each.parameters for each in Parts(model).counts()}
    layers = Parts(model).linear_layers((LANGUAGE, VISION))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=lora_pattern(layers)))
    counts = {each.part: each for each in Parts(wrapped).counts()}
    assert {part: each.parameters for part, each in counts.items()} == before
    assert counts[LANGUAGE].trained > 0
    assert counts[PROJECTOR].trained == counts[EMBEDDINGS].trained == 0
    assert sum(each.trained for each in counts.values()) == wrapped.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_lora_layers_are_those_of_the_parts_in_every_family(family, tmp_path):
    model = load(small_models.save_small(family, tmp_path / family)).model
    parts = Parts(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    trainable = [LANGUAGE, VISION]
    if family == "gemma3":  # its projector is a bare matrix
        with pytest.raises(DataError, match="no linear layers in its projector"):
            parts.linear_layers((PROJECTOR,))
    else:
        trainable.append(PROJECTOR)
    for part in trainable:
        chosen = {name for name in linear if parts.of(name) == part}
        assert chosen
        pattern = lora_pattern(parts.linear_layers((part,)))
        assert {name for name in linear if re.fullmatch(pattern, name)} == chosen


def test_a_frozen_or_forgotten_parameter_is_noticed(sft):
    trainer = trainer_of(sft())
    parts = Parts(trainer.model)
    weight = next(each for name, each in trainer.model.named_parameters() if "visual" in name)
    weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"visual.*should not train"):
        parts.check((LANGUAGE,), adapter=True)
    weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="nothing trains in the projector"):
        parts.check((LANGUAGE, PROJECTOR), adapter=True)


def test_the_table_is_printed_before_training(sft, capsys):
    steps.load_model(sft(method="qlora"))
    table = capsys.readouterr().out
    assert re.search(r"vision tower +560,256 +0\n", table)
    assert re.search(r"language model +788,608 +[1-9]", table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_language": False}, "nothing is to train"),
        ({"train_embeddings": True}, "--train-embeddings goes with --method full"),
        ({"visual_store": "auto", "train_vision": True}, "leave it out where they train"),
        ({"method": "full", "adapter": "runs/x"}, "--adapter goes with"),
        ({"batch_size": 0}, "--batch-size 0: expected 1"),
        ({"valid_every": 0.0}, "--valid-every"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        SFTOptions(**changes)
