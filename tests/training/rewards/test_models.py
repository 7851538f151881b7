"""Parts that a model judges: against plain forward passes, and without a look at what is held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recllm.builders.catalog import Catalog
from recllm.data.dataset import Dataset
from recllm.mllm.chat import message
from recllm.mllm.embedding import embed_texts
from recllm.mllm.loading import LoadedModel, load
from recllm.prompts import mmsrarec
from recllm.prompts.safe_text import IMAGE_MARK
from recllm.training.rewards import Answer, RewardSettings, Source, make_rewards
from recllm.training.rewards.information import Information
from recllm.training.rewards.likelihood import RECONSTRUCTION, Agreement, FrozenModel, Reconstruction
from recllm.training.rewards.utility import Utility, training_contexts
from tests.builders.worlds import split_of, write_world

REFERENCE = "A red steel mug for warm tea."


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from recllm.data.toyworld import generate

    return generate(users=30, items=60).write(tmp_path_factory.mktemp("rewards") / "toys").folder


@pytest.fixture(scope="module")
def loaded(tiny_path: Path) -> LoadedModel:
    return load("tiny")


def source(item: str = "i00000", reference: str = REFERENCE, images: tuple[str, ...] = ()) -> Source:
    asked = message("user", IMAGE_MARK * len(images) + mmsrarec.IMAGE_KEYWORDS.text)
    kind = "image" if images else "text"
    return Source(f"{item}/{kind}", item, kind, (asked,), images, reference=reference)


def answers(texts: list[str], of: Source) -> list[Answer]:
    return [Answer(of, text) for text in texts]


def test_information_is_the_cosine_bounded_and_capped():
    written = answers(
        ["red, steel, mug", "red mug, warm tea, steel", "prime numbers, algebra, proof"], source()
    )
    vectors = embed_texts([each.content for each in written] + [REFERENCE]).vectors.astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors[:3] @ vectors[3]
    assert Information()(written) == pytest.approx(np.maximum(cosines, 0), abs=1e-5)
    capped = Information(cap=0.5)(written)
    assert capped == pytest.approx(np.clip(cosines, 0, 0.5) / 0.5, abs=1e-5)
    assert Information()(answers(["red"], source(reference=""))) == [None]


def plain_log_probability(loaded: LoadedModel, prompt: str, completion: str) -> float:
    """The mean of the completion's token log-probabilities, its end included, in one unpadded pass."""
    chat = [message("user", prompt), message("assistant", completion)]
    begin = loaded.processor.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = loaded.processor.apply_chat_template(chat, tokenize=False)
    one, all_tokens = (loaded.tokenizer(text, return_tensors="pt")["input_ids"] for text in (begin, whole))
    with torch.no_grad():
        logits = loaded.model(all_tokens).logits[0].log_softmax(-1)
    tokens = all_tokens[0]
    values = []
    for place in range(one.shape[1], len(tokens)):
        values.append(logits[place - 1, tokens[place]].item())
        if tokens[place] in loaded.stop_token_ids:
            break
    return float(np.mean(values))


@pytest.mark.parametrize("paper", [False, True])
def test_reconstruction_is_the_mean_likelihood_of_the_reference(loaded, toys, paper):
    texts = ["Tarn, mug, steel", "a, b, c"]
    losses = [
        -plain_log_probability(loaded, RECONSTRUCTION.fill({"keywords": text}), REFERENCE) for text in texts
    ]
    clip = max(losses) + 1
    judge = FrozenModel(loaded, toys)
    found = Reconstruction(judge, clip=clip, paper=paper)(answers(texts, source()))
    if paper:
        expected = [(np.exp(clip) - np.exp(loss)) / (np.exp(clip) - 1) for loss in losses]
    else:
        expected = [1 - loss / clip for loss in losses]
    assert found == pytest.approx(expected, abs=1e-4)
    low = min(losses) - 1
    assert Reconstruction(judge, clip=low, paper=paper)(answers(texts, source())) == pytest.approx([0, 0])


def test_agreement_prefers_what_the_picture_shows(loaded, toys):
    from recllm.data.toyworld.world import ToyWorld

    looks = ToyWorld.open(toys).item_answers
    ids = looks["item"].to_list()
    others = dict(zip(ids, [f"images/{item}.png" for item in ids[1:] + ids[:1]], strict=True))
    part = Agreement(FrozenModel(loaded, toys), others)
    right, wrong = [], []
    for row, other in zip(looks[:8].to_dicts(), looks[1:9].to_dicts(), strict=True):
        of = source(row["item"], images=(f"images/{row['item']}.png",))
        said = [", ".join(str(each[key]) for key in ("color", "pattern", "shape")) for each in (row, other)]
        if said[0] != said[1]:
            values = part(answers(said, of))
            right.append(values[0])
            wrong.append(values[1])
    assert min(right) > 0.6 and max(wrong) < 0.4
    assert part(answers(["red"], source())) == [None]


def test_values_do_not_depend_on_batch_or_order(loaded, toys):
    others = {"i00000": "images/i00001.png"}
    judge = FrozenModel(loaded, toys)
    rewards = make_rewards(
        RewardSettings({"reconstruction": 1.0, "agreement": 1.0, "information": 1.0}, clip=20.0, least=1),
        judge=judge,
        others=others,
    )
    of = source(images=("images/i00000.png",))
    written = [
        *answers(["red, dotted, circle", "mug, blue", "red, dotted, circle"], of),
        *answers(["a, b, c, d", "round, red"], source("i00002")),
    ]
    together = rewards(written)
    assert np.isnan(together[3:, 1]).all() and not np.isnan(together[:3]).any()
    np.testing.assert_allclose(together[::-1], rewards(written[::-1]), atol=2e-4)
    alone = np.concatenate([rewards([each]) for each in written])
    np.testing.assert_allclose(together, alone, atol=2e-4)


def test_a_policy_judges_without_its_adapter(loaded, toys, tiny_path):
    from peft import LoraConfig, get_peft_model

    other = load("tiny")
    model = get_peft_model(other.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.train()
    policy = replace(other, model=model)
    written = answers(["red, dotted, circle"], source())
    base = Reconstruction(FrozenModel(loaded, toys), clip=20.0)(written)
    assert Reconstruction(FrozenModel(policy, toys, policy=True), clip=20.0)(written) == pytest.approx(
        base, abs=1e-4
    )
    assert Reconstruction(FrozenModel(policy, toys), clip=20.0)(written) != pytest.approx(base, abs=1e-2)
    assert model.training and all(w.requires_grad for n, w in model.named_parameters() if "lora_" in n)


def test_utility_never_sees_what_is_held_out(tmp_path, loaded):
    dataset = write_world(tmp_path / "world")
    split = split_of(dataset)
    catalog = Catalog(dataset, loaded.special_tokens)
    contexts = training_contexts(split, catalog, users=3, history=4)
    assert contexts.takers
    assert all(item.startswith("common") for item in contexts.takers)
    assert not any("later" in line or "latest" in line for line in contexts.lines)
    assert any("Thing" in line for line in contexts.lines)
    train = split.scan("train").collect()
    taken = {item: set(rows["user"]) for (item,), rows in train.group_by("item")}
    for item, places in contexts.takers.items():
        assert len(places) == len(contexts.others[item]) <= min(3, len(taken[item]))
        assert not set(places) & set(contexts.others[item])


def test_utility_is_a_smooth_auc_of_margins(tmp_path, loaded, monkeypatch):
    dataset = write_world(tmp_path / "world")
    contexts = training_contexts(split_of(dataset), Catalog(dataset), users=2, history=3)
    item = next(iter(contexts.takers))
    part = Utility(loaded, contexts, dataset.folder)
    of = source(item)
    real = part(answers(["red, mug, steel", "a, b, c"], of))
    assert all(0 < value < 1 for value in real) and real[0] != real[1]
    margins = dict.fromkeys(contexts.takers[item], 2.0) | dict.fromkeys(contexts.others[item], -1.0)
    monkeypatch.setattr(part, "_margins", lambda asked: {each: margins[each[1]] for each in asked})
    assert part(answers(["red"], of)) == pytest.approx([1 / (1 + np.exp(-3.0))])
    assert part(answers(["red"], source("later-of-1"))) == [None]


def test_contexts_of_an_item_do_not_depend_on_the_held_out_part(tmp_path):
    """Held-out interactions that are replaced by others change nothing."""
    made = []
    for mark in ("later", "another"):
        dataset = write_world(tmp_path / mark, mark={"valid": mark})
        made.append(training_contexts(split_of(dataset), Catalog(dataset), users=2, history=3))
    assert made[0].lines == made[1].lines
    assert made[0].takers == made[1].takers and made[0].others == made[1].others
    assert Dataset.open(tmp_path / "later").data_hash != Dataset.open(tmp_path / "another").data_hash
