"""Answer forms, and the output layer read at one position."""

from __future__ import annotations

from decimal import Decimal, localcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from recllm.errors import DataError
from recllm.mllm import load
from recllm.mllm.scoring.answers import (
    AnswerHead,
    Answers,
    check_head,
    paper_probability,
    paper_score,
)
from tests.mllm.small_models import save_small


@pytest.fixture
def small(tmp_path):
    return load(save_small("qwen2_vl", tmp_path / "model", seed=3))


def test_default_forms_are_the_first_tokens_of_the_completions(tiny_path):
    loaded = load(tiny_path)
    found = Answers.find(loaded)
    written = [loaded.tokenizer.decode([token]) for token in (*found.yes, *found.no)]
    assert written == ["Yes", "No"]
    several = Answers.find(loaded, yes=("Yes", "yes", " Yes"), no=("No", "no"))
    assert [loaded.tokenizer.decode([token]) for token in several.yes] == ["Yes", "yes", " Yes"]
    assert len({*several.yes, *several.no}) == 5


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "smolvlm"])
def test_default_forms_have_the_space_that_the_chat_template_writes(tmp_path, family):
    """Training rows say " Yes." after "ASSISTANT:", so a score must not ask for "Yes" without the space."""
    loaded = load(save_small(family, tmp_path / family))
    found = Answers.find(loaded)
    assert [loaded.tokenizer.decode([token]) for token in (*found.yes, *found.no)] == [" Yes", " No"]


def test_forms_that_are_not_one_token_or_stand_on_both_sides_are_refused(small):
    with pytest.raises(DataError, match=r"--no 'Nope nope' is \d+ tokens"):
        Answers.find(small, yes=("y",), no=("Nope nope",))
    with pytest.raises(DataError, match="'y' would count as yes and as no"):
        Answers.find(small, yes=("n", "y"), no=("y",))
    with pytest.raises(DataError, match="same token as a form before"):
        Answers.find(small, yes=("y", "y"), no=("n",))


def expected_of(model, hidden, answers):
    logits = model.get_output_embeddings()(hidden).float()
    margin = logits[:, answers.yes].logsumexp(1) - logits[:, answers.no].logsumexp(1)
    return margin, 1 - logits.softmax(1)[:, [*answers.yes, *answers.no]].sum(1)


@pytest.mark.parametrize("kind", ["plain", "lora", "saved", "disabled", "merged", "tied"])
def test_the_output_layer_is_read_as_it_acts(small, kind, monkeypatch):
    monkeypatch.setattr("recllm.mllm.scoring.answers._NORMALIZER_BYTES", 4 * 32 * 50)  # 50 rows at a time
    model, answers = small.model, Answers((5, 9), (7,))
    if kind == "tied":
        model.lm_head.weight = model.get_input_embeddings().weight
    elif kind != "plain":
        where = {"modules_to_save": ["lm_head"]} if kind == "saved" else {}
        targets = ["q_proj"] if kind == "saved" else ["lm_head", "q_proj"]
        wrapped = get_peft_model(
            model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **where)
        ).eval()
        model = wrapped.get_base_model()
        if kind == "saved":
            with torch.no_grad():
                model.lm_head.modules_to_save["default"].weight.add_(0.3)
        if kind == "disabled":
            wrapped.base_model.disable_adapter_layers()
        if kind == "merged":
            wrapped.merge_adapter()
    hidden = torch.randn(6, 32)
    with torch.no_grad(), AnswerHead.read(model) as head:
        margin, outside = head.margins(hidden, answers)
        expected = expected_of(model, hidden, answers)
    torch.testing.assert_close(margin, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outside, expected[1], atol=1e-5, rtol=1e-5)


def test_margins_are_float32_also_where_bfloat16_logits_tie(small):
    model = small.model.to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[5] = 1
        model.lm_head.weight[7] = 1
        model.lm_head.weight[5, 0] = 1.0078125  # the next bfloat16
    hidden = torch.full((1, 32), 3.0, dtype=torch.bfloat16)
    logits = model.lm_head(hidden)[0]
    assert logits[5] == logits[7]
    with torch.no_grad(), AnswerHead.read(model) as head:
        margin, _ = head.margins(hidden, Answers((5,), (7,)))
    assert margin.item() == pytest.approx(3 * 0.0078125, rel=1e-4)


def test_output_layers_that_cannot_be_read_are_refused(small):
    quantized = torch.nn.Linear(32, 8)
    quantized.weight = torch.nn.Parameter(torch.zeros(8, 16, dtype=torch.uint8), requires_grad=False)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: quantized)
    with pytest.raises(DataError, match=r"lm_head is a Linear of torch\.uint8"):
        check_head(model)
    capped = SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=30.0))
    with pytest.raises(DataError, match="final_logit_softcapping"):
        check_head(SimpleNamespace(config=capped))
    dora = get_peft_model(small.model, LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(DataError, match="not a plain one"):
        check_head(dora.get_base_model())


def test_the_printed_equation_is_a_softmax_of_probabilities():
    yes, no = torch.tensor([0.7, 0.2, 0.45]), torch.tensor([0.1, 0.8, 0.45])
    found = paper_probability(torch.log(yes / no), 1 - yes - no)
    expected = torch.stack([yes, no]).softmax(0)[0]
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=1e-6)


def exact_difference(margin: float, outside: float) -> Decimal:
    """p_yes - p_no, to 60 digits."""
    with localcontext() as context:
        context.prec = 60
        odds, inside = Decimal(margin).exp(), 1 - Decimal(outside)
        return inside * (odds - 1) / (odds + 1)


def test_the_printed_equation_s_score_orders_without_ties_where_probabilities_saturate():
    draw = np.random.default_rng(0)
    margins = np.concatenate(
        [draw.normal(size=300) * 2, draw.normal(size=300) * 20, draw.normal(size=50) / 1e6]
    )
    outside = np.concatenate([draw.random(300), 10.0 ** -draw.uniform(1, 30, 300), np.zeros(50)])
    margins = np.append(margins, [0.0, 40.0, 40.000004, -40.0, -50.0]).astype(np.float32)
    outside = np.append(outside, np.zeros(5)).astype(np.float32)
    exact = [exact_difference(*pair) for pair in zip(margins.tolist(), outside.tolist(), strict=True)]
    expected = sorted(range(len(exact)), key=exact.__getitem__)
    tensors = torch.from_numpy(margins), torch.from_numpy(outside)
    in_float32 = torch.sigmoid((1 - tensors[1]) * torch.tanh(tensors[0] / 2))
    assert len(in_float32.unique()) < 0.9 * len(set(exact))  # as scores were before
    found = paper_score(*tensors).numpy()
    assert len(np.unique(found)) == len(set(exact)) == len(exact)
    assert np.argsort(found).tolist() == expected
    probability = paper_probability(*tensors).numpy()
    assert (np.diff(probability[np.argsort(found)]) >= 0).all()
    assert ((probability > 0.268) & (probability < 0.732)).all()


def test_a_tiny_mass_outside_is_exact_too(small):
    """1 minus a sum would round to multiples of 6e-8, and the printed equation would rank by that noise."""
    model, answers = small.model, Answers((5,), (7,))
    hidden = torch.randn(40, 32)
    with torch.no_grad():
        model.lm_head.weight[5] = 0
        model.lm_head.weight[7] = 0
        model.lm_head.weight[[5, 7], 0] = torch.tensor([9.0, 8.0])
        hidden[:, 0] = torch.linspace(3, 6, 40)
        with AnswerHead.read(model) as head:
            _, outside = head.margins(hidden, answers)
        exact = model.lm_head.weight.double() @ hidden.double().T
    others = torch.ones(len(exact), dtype=torch.bool)
    others[[5, 7]] = False
    mass = (exact[others].logsumexp(0) - exact.logsumexp(0)).exp()
    assert mass.max() < 1e-4 and mass.min() < 1e-12
    torch.testing.assert_close(outside.double(), mass, rtol=1e-4, atol=0)
