"""A modality removed: in training, where no item has it, and in scoring, where it is zero."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from recllm.cli import main as recllm_main
from recllm.data.candidates import CandidateOptions, full_ranking, make_candidates
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.evaluation.ranks import RankRecords
from recllm.files import read_json
from recllm.rankers.features import no_features
from recllm.rankers.ranker import Ranker, freeze_absent
from recllm.rankers.ranking import items_with_content, user_states
from recllm.rankers.run_folder import load_run
from recllm.rankers.training_data import TrainingData
from tests.rankers import worlds
from tests.rankers.small_rankers import (
    DATA,
    MODALITIES,
    loss_of,
    made,
    near,
    scores,
    small,
    training_batches,
)
from tests.rankers.test_runs import ITEMS, train, write_log

LISTS = "1+10-uniform-seed42"


def without(modality: str) -> TrainingData:
    nothing = no_features(worlds.ITEMS, "nothing")
    return replace(DATA, features={**DATA.features, modality: nothing})


# MLLMRec is made of texts alone, and refuses to be trained without.
REMOVABLE = [pair for pair in MODALITIES if not pair[0].startswith("mllmrec")]


@pytest.mark.parametrize(
    ("name", "modality"), [pair for pair in REMOVABLE if pair[0] != "missrec"]
)  # whose interests are of the items' features
def test_trained_without_a_modality_and_scored_without_it_mean_the_same(name: str, modality: str):
    """With equal weights, a ranker for which no item has images is one that is run without images."""
    full, less = made(name), small(name, without(modality))
    less.begin_epoch(np.random.default_rng(3))
    own = less.state_dict()
    parts = tuple(f"{part}." for part in full.modality_parts[modality])
    less.load_state_dict(
        {
            key: own[key] if f"{key}.".startswith(parts) and value.shape != own[key].shape else value
            for key, value in full.state_dict().items()
        }
    )
    if name == "mmsr":  # saved with the weights: which item is of which cluster
        less.get_submodule(modality).codes.zero_()
    assert near(scores(less.eval()), scores(full, without=(modality,)))
    if name != "mmsbr":  # which contrasts the modalities of the items that have both
        batch = next(training_batches(full))
        assert near(loss_of(less, batch), loss_of(full, batch, without=(modality,)))


@pytest.mark.parametrize(("name", "modality"), REMOVABLE)
def test_what_belongs_to_an_absent_modality_is_frozen_and_all_else_gets_gradients(name: str, modality: str):
    """Several processes would wait for a gradient that does not come."""
    data = without(modality)
    model = small(name, data).train()
    model.begin_epoch(np.random.default_rng(3))
    freeze_absent(model, data)
    own = {key for key, _ in model.parameters_of(modality)}
    loss_of(model, next(training_batches(model))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key not in own), key
        if key in own:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    dataset = write_log(tmp_path_factory.mktemp("log") / "data")
    made = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    make_candidates(made, CandidateOptions(made.folder, negatives=10))
    return made


@pytest.fixture(scope="module")
def files(split: Split) -> dict[str, str]:
    """Vectors of texts and images; the first ten items have no image."""
    random, paths = torch.Generator().manual_seed(0), {}
    for name, first in (("text", 0), ("image", 10)):
        paths[name] = str(split.folder / f"{name}.safetensors")
        rows = {f"i{item}": torch.randn(8, generator=random) for item in range(first, ITEMS)}
        save_file(rows, paths[name])
    return paths


@pytest.fixture(scope="module")
def runs(split: Split, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unisrec: of items by content alone. textless: HM4SR, trained without texts."""
    folder = tmp_path_factory.mktemp("runs")
    both = ("--modalities", "text", "image", "--text", files["text"], "--image", files["image"])
    content = train(split, folder / "unisrec", *both, "--no-transductive", ranker="unisrec")
    ablated = ("--without", "text", "--text", "nowhere.safetensors", "--image", files["image"])
    textless = train(split, folder / "textless", *ablated, ranker="hm4sr")
    assert content.returncode == textless.returncode == 0, content.stderr + textless.stderr
    return folder


@contextlib.contextmanager
def refused(told: str) -> Iterator[None]:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 1 and told in error.getvalue(), error.getvalue()


def test_scores_without_a_modality_are_the_rankers_own_and_say_so(split: Split, runs: Path, tmp_path: Path):
    command = ["score", "ranker", str(runs / "unisrec"), "--without", "text", "--out", str(tmp_path)]
    recllm_main(command)
    recllm_main([*command, "--candidates", LISTS])
    ranker, run, _ = load_run(runs / "unisrec")
    assert items_with_content(ranker, run.data).all()
    present = items_with_content(ranker, run.data, without=("text",))
    assert present.sum() == ITEMS - 10
    ranking = full_ranking(split, "test", mask="seen")
    states = user_states(ranker, run.data, split, "test", ranking.users, without=("text",))
    matrix = (states.states @ states.items.T).numpy()
    assert not np.allclose(matrix, matrix_of(ranker, run.data, split), atol=1e-3)

    stored = pl.read_parquet(tmp_path / "scores" / "unisrec-without-text.parquet")
    user, item = (
        {each: code for code, each in enumerate(ids)} for ids in (ranking.user_ids, ranking.item_ids)
    )
    rows = [row for row in stored.iter_rows(named=True) if present[item[row["item"]]]]
    expected = [matrix[user[row["user"]], item[row["item"]]] for row in rows]
    assert len(rows) > 50 and np.allclose([row["score"] for row in rows], expected, atol=1e-5)
    metadata = pl.read_parquet_metadata(tmp_path / "scores" / "unisrec-without-text.parquet")
    assert any('"without":"text"' in value for value in metadata.values())
    records = RankRecords.load(tmp_path / "ranks" / "unisrec-without-text.parquet")
    assert records.made["without"] == "text" and records.system == "unisrec-without-text"
    assert records.made["coverage"]["items"] == ITEMS - 10


def matrix_of(ranker: Ranker, data: TrainingData, split: Split) -> np.ndarray:
    states = user_states(ranker, data, split, "test", full_ranking(split, "test").users)
    return (states.states @ states.items.T).numpy()


def test_a_run_without_a_modality_reads_none_of_it_and_is_scored_without_it(runs: Path, tmp_path: Path):
    run = runs / "textless"
    manifest = read_json(run / "manifest.json", "")
    assert manifest["settings"]["without"] == "text"
    text = manifest["features"]["text"]
    assert (text["items_without"], text["width"]) == (ITEMS, 1) and text["source"] == "none (--without text)"
    assert manifest["features"]["image"]["items_without"] == 10
    recllm_main(["score", "ranker", str(run), "--out", str(tmp_path)])
    recllm_main(["score", "ranker", str(run), "--without", "image", "--out", str(tmp_path)])  # numbers alone
    plain, less = (
        RankRecords.load(tmp_path / "ranks" / f"{name}.parquet")
        for name in ("textless", "textless-without-image")
    )
    assert "without" not in plain.made and less.made["without"] == "image"
    assert not np.array_equal(plain.above, less.above)
    with refused("was trained without it"):
        recllm_main(["score", "ranker", str(run), "--without", "text", "--out", str(tmp_path)])


def test_with_avl_a_run_without_texts_compares_images_with_numbers(
    split: Split, files: dict[str, str], tmp_path: Path
):
    flags = ("--without", "text", "--image", files["image"], "--avl", "gradients", "--epochs", "2")
    done = train(split, tmp_path / "run", *flags, ranker="m3srec")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["avl_loss_image"] != line["avl_loss_text"] for line in lines)


@pytest.mark.parametrize(
    ("ranker", "flags", "told"),
    [
        ("sasrec", ["--without", "image"], "--without image: sasrec reads no image"),
        ("unisrec", ["--without", "image"], "--without image: unisrec reads no image"),
        ("unisrec", ["--without", "text", "--no-transductive"], "knows items by their text alone"),
        ("mllmrec", ["--without", "text"], "knows items by their text alone"),
        ("vbpr", ["--without", "image", "--image", "none"], "give one of the two"),
        ("hm4sr", ["--without", "image", "--avl", "gradients"], "AVL would have no image to scale"),
        ("hm4sr", ["--without", "text", "--avl", "two-sided"], "AVL would have no text to scale"),
        ("vbpr", ["--without", "text", "--text", "x.npy", "--image", "x.safetensors", "--feature-order",
                  "dataset"], "vbpr reads --image x.safetensors; leave"),
    ],
)  # fmt: skip
def test_what_cannot_be_removed_is_refused(
    split: Split, ranker: str, flags: list[str], told: str, tmp_path: Path
):
    done = train(split, tmp_path / "run", *flags, ranker=ranker)
    assert done.returncode == 1 and told in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_scoring_refuses_to_leave_out_what_is_not_there_or_all_there_is(
    split: Split, files: dict[str, str], tmp_path: Path
):
    flags = ("--epochs", "1", "--no-transductive", "--text", files["text"])
    assert train(split, tmp_path / "one", *flags, ranker="unisrec").returncode == 0
    with refused("reads no image"):
        recllm_main(["score", "ranker", str(tmp_path / "one"), "--without", "image", "--out", str(tmp_path)])
    with refused("knows items by nothing else"):
        recllm_main(["score", "ranker", str(tmp_path / "one"), "--without", "text", "--out", str(tmp_path)])
