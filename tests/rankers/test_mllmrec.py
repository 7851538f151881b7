"""MLLMRec against its equations, and without the leak of its release: texts about users say what they saw."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import sparse

from recllm.builders import session
from recllm.builders.items import summarize_items
from recllm.builders.options import ItemOptions, UserOptions
from recllm.builders.users import summarize_users
from recllm.cli import COMMANDS, main
from recllm.config import parse_config, run_command
from recllm.data.dataset import Dataset, write_dataset
from recllm.data.origins import MADE
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.data.texts import METADATA_KEY, item_texts
from recllm.errors import DataError
from recllm.files import read_json
from recllm.rankers.criteria import Criterion
from recllm.rankers.models.mllmrec import MLLMRec, MLLMRecConfig
from recllm.rankers.options import class_of_arguments, options_class
from recllm.rankers.ranking import UserStates
from recllm.rankers.user_texts import UserFeatures, user_text_features
from tests.builders.worlds import RuleBackend, words_of, write_world
from tests.graphs.dense import BATCH, PAIRS, USERS, adjacency, array, nearest, symmetric, touched, world
from tests.graphs.test_refinement import dense_audience
from tests.rankers.worlds import histories

PRESENT = np.arange(USERS) != 2  # user 2 has no text; user 7 has one and no training interaction
RANDOM = np.random.default_rng(9)
TEXTS = UserFeatures(
    (RANDOM.normal(0, 1, (USERS, 5)) * PRESENT[:, None]).astype(np.float32), PRESENT, "drawn by a test"
)
DATA = replace(world(), user_features=TEXTS)


def made(**options: object) -> MLLMRec:
    torch.manual_seed(0)
    sizes = {"width": 4, "hidden": 6, "neighbors": 3, "threshold": 0.3, "audience_neighbors": 2}
    for switch, fields in (
        ("item_graph", ("neighbors", "threshold", "audience_neighbors")),
        ("denoising", ("threshold",)),
        ("enhancement", ("audience_neighbors",)),
    ):
        if not options.get(switch, True):
            sizes = {name: value for name, value in sizes.items() if name not in fields}
    model = MLLMRec(DATA, MLLMRecConfig(**{**sizes, "neighbors": 3, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def mapped(layers: torch.nn.Sequential, content: np.ndarray) -> np.ndarray:
    """Eq. 14."""
    inner = content @ array(layers[0].weight).T + array(layers[0].bias)
    outer = np.where(inner > 0, inner, 0.01 * inner) @ array(layers[2].weight).T
    return outer if layers[2].bias is None else outer + array(layers[2].bias)


def users_of(model: MLLMRec) -> np.ndarray:
    if model.user_table is not None:
        return array(model.user_table.weight)
    content = DATA.features["text"].vectors.astype(float)
    return np.where(
        PRESENT[:, None], TEXTS.vectors, touched() @ content / np.maximum(touched().sum(1), 1)[:, None]
    )


def dense(model: MLLMRec) -> tuple[np.ndarray, np.ndarray]:
    config, content = model.config, DATA.features["text"].vectors.astype(float)
    total = layer = content
    if config.item_graph:
        near = nearest(content, np.ones(len(content), bool))
        graph = (near >= config.threshold if config.denoising else near != 0).astype(float)
        if config.enhancement:
            graph = graph + dense_audience(touched() > 0, config.audience_neighbors)
        for _ in range(config.item_layers):
            layer = symmetric(graph) @ layer
            total = total + layer
    users, items = mapped(model.user_network, users_of(model)), mapped(model.item_network, total)
    if config.user_graph:
        unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (users, items)]
        walk = symmetric(adjacency(touched()))
        layers = sum(np.linalg.matrix_power(walk, n) @ np.concatenate(unit) for n in range(3))
        users, items = users + layers[:USERS], items + layers[USERS:]
    return users, items


ABLATIONS = [
    {},
    {"item_layers": 2},
    {"reasoning": False},
    {"enhancement": False},
    {"item_graph": False},
    {"user_graph": True},
    {"user_graph": True, "reasoning": False},
]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_scores_and_loss_are_those_of_the_equations(options: dict):
    model = made(**options)
    users, items = dense(model)
    for found, expected in zip(model.vectors(), (users, items), strict=True):
        np.testing.assert_allclose(array(found), expected, rtol=1e-4, atol=1e-5)
    differences = np.array([users[u] @ (items[i] - items[j]) for u, i, (j,) in PAIRS])
    loss = model.loss(BATCH, Criterion("bpr"))
    np.testing.assert_allclose(loss.item(), np.log1p(np.exp(-differences)).mean(), rtol=1e-5)


def test_without_denoising_no_edge_is_cut():
    plain, cut = made(denoising=False, enhancement=False), made(threshold=0.99, enhancement=False)
    same = made(threshold=0.0, enhancement=False)
    assert (plain.items - cut.items).abs().max() > 0.1
    near = nearest(DATA.features["text"].vectors.astype(float), np.ones(plain.items.shape[0], bool))
    assert (near > 0).sum() == near.shape[0] * 3, "all of this world's neighbors have a positive cosine"
    assert torch.equal(plain.items, same.items)


def test_users_are_served_by_their_text_else_by_the_texts_of_their_items():
    model = made()
    users, items = dense(model)
    nobody, by_text, by_items = USERS - 1, 0, 2
    assert nobody not in DATA.train.users
    later = histories([[3, 5]], users=np.array([nobody]))
    found = UserStates(model, DATA, later, np.array([nobody, by_text, by_items]))
    expected = users[[nobody, by_text, by_items]] @ items.T
    np.testing.assert_allclose(found.states.numpy() @ found.items.numpy().T, expected, rtol=1e-4, atol=1e-5)
    without = replace(TEXTS, present=PRESENT & (np.arange(USERS) != nobody))
    model = MLLMRec(replace(DATA, user_features=without), model.config).eval()
    found = UserStates(model, DATA, later, np.array([nobody])).states
    mean = DATA.features["text"].vectors[[2, 4]].mean(0, keepdims=True)
    np.testing.assert_allclose(found.numpy(), mapped(model.user_network, mean), rtol=1e-4, atol=1e-6)
    found = UserStates(model, DATA, histories([]), np.array([nobody])).states
    assert not found.any()


def test_folding_in_over_the_user_graph_is_as_for_a_user_that_nobody_reads():
    model = made(user_graph=True)
    marks = np.zeros((1, len(DATA.features["text"].vectors)), np.float32)
    marks[0, [2, 4]] = 1
    content = DATA.features["text"].vectors[[2, 4]].mean(0, keepdims=True)
    own = mapped(model.user_network, content)
    plain = made()
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in dense(plain)]
    walk, degrees = symmetric(adjacency(touched())), touched().sum(0)
    row = np.zeros(USERS + marks.shape[1])
    row[USERS:] = marks[0] * (degrees > 0) / np.sqrt(2 * np.maximum(degrees, 1))
    table = np.concatenate(unit)
    expected = own + own / np.linalg.norm(own) + row @ table + row @ walk @ table
    np.testing.assert_allclose(model.fold_in(sparse.csr_array(marks)).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_it_says_what_it_misses():
    with pytest.raises(DataError, match="--user-text preference"):
        MLLMRec(replace(DATA, user_features=None))
    narrow = replace(TEXTS, vectors=TEXTS.vectors[:, :3])
    with pytest.raises(DataError, match=r"width 3, those of items' texts 5"):
        MLLMRec(replace(DATA, user_features=narrow))
    for options, told in (
        ({"item_graph": False, "neighbors": 3}, "--neighbors has no effect with --no-item-graph"),
        ({"denoising": False, "threshold": 0.3}, "--threshold has no effect with --no-denoising"),
        ({"enhancement": False, "audience_neighbors": 3}, "--audience-neighbors has no effect"),
    ):
        with pytest.raises(DataError, match=told):
            MLLMRecConfig(**options).check()


# ---------------------------------------------------------------------------------------------- texts on disk


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """A world with what both builders write: honest texts, and leaky ones."""
    dataset = write_world(tmp_path_factory.mktemp("mllmrec") / "shop", users=10, mark={"test": "zqtestmark"})
    made_split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        backend = RuleBackend()
        patch.setattr(session, "make_backend", lambda options: backend)
        summarize_items(ItemOptions(dataset.folder, "rule", system="mllmrec"))
        backend.asked.clear()
        summarize_users(UserOptions(dataset.folder, "rule", system="mllmrec"))
        honest = " ".join(words_of(request.messages) for request in backend.asked)
        assert "zqtestmark" not in honest
        summarize_users(UserOptions(dataset.folder, "rule", system="mllmrec", leak_all_interactions=True))
        assert "zqtestmark" in words_of(backend.asked[-1].messages)
    return made_split


def test_honest_texts_are_embedded_user_by_user(split: Split):
    found = user_text_features(split, "preference")
    assert found.vectors.shape == (10, 384) and found.present.all() and not found.leak
    assert found.facts["texts"] == "preference" and found.facts["item_texts"] == "description"
    assert found.facts["model"] == {"model": "rule"}


def test_leaky_texts_are_refused_unless_the_leak_is_asked_for(split: Split):
    with pytest.raises(DataError, match=r"held-out ones included.*--allow-leak"):
        user_text_features(split, "preference-leaky")
    assert user_text_features(split, "preference-leaky", allow_leak=True).leak
    with pytest.raises(DataError, match="--allow-leak has no effect"):
        user_text_features(split, "preference", allow_leak=True)


def rewritten(split: Split, name: str, change) -> None:
    """Writes a copy of the honest texts with other rows or another say about itself."""
    import orjson

    path = split.dataset.folder / "texts" / "preference.parquet"
    frame, metadata = pl.read_parquet(path), orjson.loads(pl.read_parquet_metadata(path)[METADATA_KEY])
    frame = change(frame, metadata)
    frame = frame if isinstance(frame, pl.DataFrame) else pl.read_parquet(path)
    saved = {METADATA_KEY: orjson.dumps(metadata).decode()}
    frame.write_parquet(path.with_name(f"{name}.parquet"), metadata=saved)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda frame, metadata: metadata.update(split_hash="0" * 64), "another split"),
        (lambda frame, metadata: metadata.update(data_hash="0" * 64), "another state of the dataset"),
        (lambda frame, metadata: metadata.pop("split_hash"), "does not state the hash of the split"),
        (lambda frame, metadata: metadata.pop("leak"), "one text for each user"),
        (lambda frame, metadata: metadata.update(leak=0), "held-out ones included"),
        (lambda frame, metadata: metadata.update(part="test"), "one text for each user"),
        (lambda frame, metadata: frame.with_columns(user=pl.lit("user1")), "'user1' has several texts"),
        (lambda frame, metadata: frame.with_columns(user=pl.col("user") + "x"), "none of its 10 texts"),
    ],
)
def test_texts_that_do_not_say_that_they_are_honest_are_refused(split: Split, change, told: str):
    rewritten(split, "odd", change)
    with pytest.raises(DataError, match=told):
        user_text_features(split, "odd")


def test_texts_that_are_not_there_are_named_with_the_command(split: Split):
    with pytest.raises(DataError, match=r"recllm build users .* --system mllmrec --split loo"):
        user_text_features(split, "taste")


def train(split: Split, out: Path, *flags: str, status: int = 0) -> str:
    recipe = ["--config", "recipes/configs/rankers/mllmrec.yaml", "--split", str(split.folder)]
    recipe += ["--out", str(out), "--epochs", "1", "--width", "8", *flags]
    script = str(Path(__file__).parents[2] / "recipes" / "train_ranker.py")
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            run_command(class_of_arguments, runpy.run_path(script, run_name="recipe")["main"], recipe)
        except SystemExit as stop:
            assert int(stop.code or 0) == status, told.getvalue()
    return told.getvalue()


@pytest.mark.parametrize("leak", [False, True])
def test_a_run_and_its_scores_say_whether_the_texts_leak(split: Split, tmp_path: Path, leak: bool):
    texts = ("--user-text", "preference-leaky", "--allow-leak") if leak else ("--user-text", "preference")
    told = train(split, tmp_path / "run", *texts)
    assert "users: preference" in told and ("no prediction" in told) == leak
    manifest = read_json(tmp_path / "run" / "manifest.json", "a run")
    assert manifest["user_features"]["leak"] is leak
    main(["score", "ranker", str(tmp_path / "run"), "--out", str(tmp_path)])
    assert f'"leak":{str(leak).lower()}' in pl.read_parquet_metadata(tmp_path / "ranks/run.parquet")[MADE]


def test_options_about_texts_of_users_are_used_or_refused(split: Split, tmp_path: Path):
    assert "give --user-text preference" in train(split, tmp_path / "a", status=1)
    told = train(split, tmp_path / "a", "--user-text", "preference", "--no-reasoning", status=1)
    assert "mllmrec with --no-reasoning reads no texts about users" in told
    assert "--allow-leak is about" in train(split, tmp_path / "a", "--no-reasoning", "--allow-leak", status=1)
    assert not (tmp_path / "a").exists()


def of_items(folder: Path, items: pl.DataFrame) -> Dataset:
    log = pl.DataFrame({"user": ["u"], "item": ["a"]})
    return write_dataset(
        folder, items=items, interactions=log, users=log.select("user"), source={"made": "by a test"}
    )


def test_an_items_text_is_its_metadata_and_its_description(tmp_path: Path):
    items = pl.DataFrame(
        {
            "item": ["a", "b", "c"],
            "title": ["Mug", "Cup!", ""],
            "brand": ["Acme", None, None],
            "categories": [["home", "kitchen"], [], []],
            "text": ["Holds tea.", "", ""],
        }
    )
    dataset = of_items(tmp_path / "data", items)
    assert item_texts(dataset, "metadata") == ["Mug. Acme. home, kitchen. Holds tea.", "Cup!", ""]
    assert item_texts(dataset, "catalog+metadata")[1:] == ["Cup! Cup!", ""]
    with pytest.raises(DataError, match=r"description\.parquet does not exist"):
        item_texts(dataset, "metadata+description")


def test_the_prompt_about_a_user_says_the_same_of_items(tmp_path: Path):
    from recllm.builders.catalog import Catalog

    items = pl.DataFrame({"item": ["a"], "title": ["Mug"], "brand": ["<|im_end|>Acme"], "text": ["Tea."]})
    catalog = Catalog(of_items(tmp_path / "data", items), ("<|im_end|>",))
    assert "<|im_end|>" not in catalog.metadata(0)
    assert catalog.metadata(0).startswith("Mug. ") and catalog.metadata(0).endswith("Acme. Tea.")


def test_every_command_in_its_page_parses():
    page = (Path(__file__).parents[2] / "docs" / "mllmrec.md").read_text(encoding="utf-8")
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()
    ]
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line)
        if words[0] == "accelerate":
            arguments = words[words.index("recipes/train_ranker.py") + 1 :]
            parse_config(class_of_arguments(arguments), arguments).config()
            continue
        command = " ".join(words[1:3])
        module, options, _, _ = COMMANDS[command]
        parse_config(getattr(importlib.import_module(module), options), words[3:])
    flags = set(re.findall(r"`(--[\w-]+)", page))
    known = {name for kind in ("mllmrec", "freedom") for name in options_class(kind).__dataclass_fields__}
    known |= set(UserOptions.__dataclass_fields__)
    named = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    assert named <= known
