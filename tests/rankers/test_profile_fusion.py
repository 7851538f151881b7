"""Trained fusions: equal to their formulas in NumPy, true positives, something that averages cannot learn."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from recllm.cli import main as recllm_main
from recllm.config import run_command
from recllm.data.dataset import write_dataset
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.evaluation import RankRecords, compute_metrics
from recllm.rankers.batches import Epochs, history_batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.features import Features
from recllm.rankers.models.profile_fusion import FUSIONS, Cross, ProfileFusion, ProfileFusionConfig
from recllm.rankers.options import class_of_arguments
from recllm.rankers.ranking import items_with_content
from recllm.rankers.training_data import TrainingData
from tests.rankers import worlds
from tests.rankers.small_rankers import DATA, shake

ROOT = Path(__file__).parents[2]
WIDTH = 8


def made(fusion: str = "attention", data: TrainingData = DATA, **options: object) -> ProfileFusion:
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "length": 16, **options}
    return shake(ProfileFusion(data, ProfileFusionConfig(fusion=fusion, **sizes))).eval()


def reference(model: ProfileFusion, item: int) -> np.ndarray:
    """The vector of one item code, by the formulas of the module's docstring, in NumPy."""
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum()

    def filtered(x: np.ndarray, name: str) -> np.ndarray:
        real, imaginary = weights[f"fusion.{name}"].T
        return np.fft.irfft(np.fft.rfft(x, norm="ortho") * (real + 1j * imaginary), n=WIDTH, norm="ortho")

    h = {}
    for modality in ("text", "image"):
        features = DATA.features[modality]
        h[modality] = np.zeros(WIDTH)
        if features.present[item] and f"{modality}.linear.weight" in weights:
            vector = features.vectors[item].astype(float)
            h[modality] = linear(f"{modality}.linear", vector / np.linalg.norm(vector))
    t, v = h["text"], h["image"]
    both = np.concatenate([t, v])
    fusion = model.config.fusion
    if fusion in h:
        x = h[fusion]
    elif fusion == "average":
        x = (t + v) / 2
    elif fusion == "concat":
        x = both
    elif fusion == "attention":
        a = softmax(linear("fusion.shares.2", np.maximum(linear("fusion.shares.0", both), 0)))
        x = a[0] * t + a[1] * v
    elif fusion == "gating":
        g = 1 / (1 + np.exp(-linear("fusion.gate.2", np.maximum(linear("fusion.gate.0", both), 0))))
        x = g * t + (1 - g) * v
    elif fusion == "cross":
        x = np.concatenate([linear("fusion.to_text", v), linear("fusion.to_image", t)])
    else:
        product = np.fft.irfft(
            np.fft.rfft(t, norm="ortho") * np.fft.rfft(v, norm="ortho"), n=WIDTH, norm="ortho"
        )
        views = [filtered(t, "of_text"), filtered(v, "of_image"), filtered(product, "of_both")]
        x = softmax(linear("fusion.shares", np.concatenate(views))) @ np.stack(views)
    x = linear("output.0", x)
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights["output.1.weight"] + weights["output.1.bias"]
    x = np.maximum(x, 0)
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_fusion_equals_its_formulas_item_by_item(fusion):
    model = made(fusion)
    vectors = model.item_vectors().detach().numpy()
    for item in range(worlds.ITEMS):
        if not model.known[item + 1]:
            assert fusion in ("text", "image") and not vectors[item].any()
            continue
        assert np.allclose(vectors[item], reference(model, item), atol=1e-4), item


def test_cross_is_the_attention_of_one_token_on_another():
    """The release's two multi-head attentions over sequences of one token, with equal maps."""
    torch.manual_seed(0)
    cross, text, image = Cross(WIDTH), torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    found = []
    for query, key in ((text, image), (image, text)):
        attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        found.append(attention(query[:, None], key[:, None], key[:, None])[0][:, 0])
        value, out = attention.in_proj_weight[2 * WIDTH :], attention.out_proj
        linear = cross.to_text if key is image else cross.to_image
        with torch.no_grad():
            linear.weight.copy_(out.weight @ value)
            linear.bias.copy_(out.weight @ attention.in_proj_bias[2 * WIDTH :] + out.bias)
    assert torch.allclose(cross(text, image), torch.cat(found, -1), atol=1e-5)


@pytest.mark.parametrize("recent", [1, 3, 10])
def test_a_state_is_the_mean_of_the_latest_items_with_content(recent):
    model = made("image", recent=recent)  # of which one item has none
    batch = history_batch(DATA, DATA.train, DATA.train.users, 16, "cpu")
    states, vectors = model(batch).detach().numpy(), model.item_vectors().detach().numpy()
    for row, items in enumerate(batch.items.numpy()):
        for place in range(int((items > 0).sum())):
            codes = [code for code in items[: place + 1] - 1 if DATA.features["image"].present[code]]
            mean = vectors[codes[-recent:]].mean(0) if codes else np.zeros(WIDTH)
            length = np.linalg.norm(mean) or 1
            assert np.allclose(states[row, place], mean / length / 0.07, atol=1e-4)


@pytest.mark.parametrize("anchor", ["profile", "item"])
def test_the_loss_compares_what_follows_with_items_that_the_user_never_took(anchor):
    """InfoNCE with the next item as positive (the release: the anchor itself), by hand in NumPy."""
    model = made("attention", anchor=anchor, recent=3)
    vectors, total, count = model.item_vectors().detach().numpy().astype(float), 0.0, 0
    (batch, _), *_ = list(Epochs(DATA, "positions", batch_size=64, length=16, negatives=3).epoch(0))
    for row in range(len(batch)):
        items = batch.items[row][batch.items[row] > 0].numpy() - 1
        row_of_user = np.flatnonzero(DATA.train.users == int(batch.users[row]))[0]
        own = DATA.train.items[DATA.train.offsets[row_of_user] : DATA.train.offsets[row_of_user + 1]] - 1
        for place in range(len(items)):
            target = int(batch.targets[row, place]) - 1
            negatives = batch.negatives[row, place].numpy() - 1
            assert target in own and not set(negatives) & set(own)
            assert place + 1 == len(items) or target == items[place + 1]  # it follows
            last = 1 if anchor == "item" else 3
            profile = vectors[items[: place + 1][-last:]].sum(0)
            logits = vectors[[target, *negatives]] @ (profile / np.linalg.norm(profile)) / 0.07
            total += np.log(np.exp(logits).sum()) - logits[0]
            count += 1
    assert model.loss(batch, Criterion("sampled-ce")).item() == pytest.approx(total / count, rel=1e-4)


def test_targets_without_content_teach_nothing():
    data = replace(DATA, features={name: replace_none(each) for name, each in DATA.features.items()})
    model = made("attention", data)
    for loss in model.losses:
        drawn = 0 if loss == "ce" else 2
        batch, _ = next(Epochs(data, "positions", batch_size=64, length=16, negatives=drawn).epoch(0))
        value = model.loss(batch, Criterion(loss))
        value.backward()
        assert value.item() == 0


def replace_none(features: Features) -> Features:
    return Features(features.vectors * 0, np.zeros_like(features.present), "none")


def test_items_without_a_training_interaction_are_ranked_and_those_without_content_are_named():
    model = made("text")
    assert model.item_vectors()[worlds.UNTOUCHED_ITEM].norm().item() == pytest.approx(1, abs=1e-5)
    content = items_with_content(model, DATA)
    assert np.array_equal(content, DATA.features["text"].present) and not content[worlds.WITHOUT_TEXT]
    assert items_with_content(made("attention"), DATA).all()


# -- A world to learn in -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """Each of 60 users takes items of one of 6 kinds. Four of an image's 24 numbers say the kind; the others,
    and the texts, say nothing."""
    rng = np.random.default_rng(0)
    kind = np.arange(90) % 6
    log = [
        (f"u{user:02d}", f"i{item:02d}", time)
        for user in range(60)
        for time, item in enumerate(rng.permutation(np.flatnonzero(kind == user % 6))[:9])
    ]
    folder = tmp_path_factory.mktemp("fusion")
    dataset = write_dataset(
        folder / "shop",
        items=pl.DataFrame({"item": [f"i{item:02d}" for item in range(90)]}),
        interactions=pl.DataFrame(log, schema=["user", "item", "timestamp"], orient="row"),
        users=pl.DataFrame({"user": [f"u{user:02d}" for user in range(60)]}),
        source={"made": "by a test"},
    )
    image = rng.normal(size=(90, 24))
    image[:, :4] = rng.normal(size=(6, 4))[kind]
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "text.npy", rng.normal(size=(90, 10)).astype(np.float32))
    for name in ("image", "text"):
        (folder / f"{name}.items.txt").write_text("".join(f"i{item:02d}\n" for item in range(90)))
    return make_split(dataset, SplitOptions(dataset.folder, "loo"))


@pytest.mark.parametrize("fusion", ["image", "attention"])
def test_training_finds_what_the_untrained_fusion_cannot_weigh(split, fusion, tmp_path, monkeypatch, capsys):
    """The real commands: train, score, and the untrained one on the same lists."""
    monkeypatch.chdir(tmp_path)
    folder = split.dataset.folder.parent
    config = ["--config", str(ROOT / "recipes/configs/rankers/profile_fusion.yaml"), "--width", "32"]
    files = ["--image", str(folder / "image.npy")]
    files += [] if fusion == "image" else ["--text", str(folder / "text.npy")]
    command = [*config, "--split", str(split.folder), "--fusion", fusion, "--batch-size", "16", *files]
    main = runpy.run_path(str(ROOT / "recipes/train_ranker.py"))["main"]
    run_command(class_of_arguments, main, command)
    recllm_main(["score", "ranker", "runs/profile_fusion", "--name", "trained"])
    texts = [] if fusion == "image" else ["--texts", str(folder / "text.npy")]
    untrained = "image" if fusion == "image" else "average"
    plain = ["--fusion", untrained, "--image", str(folder / "image.npy"), "--name", "untrained"]
    recllm_main(["score", "profile", str(split.folder), *texts, *plain])
    trained, plain = (RankRecords.load(Path(f"ranks/{name}.parquet")) for name in ("trained", "untrained"))
    assert trained.candidates == plain.candidates
    found = [compute_metrics(each, names=["ndcg@10"]).mean()["ndcg@10"] for each in (trained, plain)]
    assert found[0] > found[1] + 0.1, found
    recllm_main(["eval", "ranks", "ranks/trained.parquet", "ranks/untrained.parquet"])
    assert "loo/full/mask-seen" in capsys.readouterr().out
