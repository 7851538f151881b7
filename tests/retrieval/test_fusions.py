"""Fusions without training: equal to their formulas, blind to scale, and chosen without the test part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.config import run_command
from recllm.data.candidates import full_ranking
from recllm.data.origins import read_made
from recllm.data.splits import Split
from recllm.data.tables import read_table
from recllm.data.texts import item_texts
from recllm.errors import DataError
from recllm.evaluation import RankRecords, compute_metrics, rank_catalog
from recllm.rankers.commands import PopularityOptions, popularity
from recllm.rankers.features import Features
from recllm.retrieval.commands import ProfileOptions, profile
from recllm.retrieval.fusions import READS, fuse, principal_axes
from recllm.retrieval.profiles import MeanProfiles
from tests.builders.worlds import split_of, write_world
from tests.conftest import make_dataset

ITEMS = 51
IDS = pl.Series([f"i{number}" for number in range(ITEMS)])


def vectors(seed: int, width: int, missing: tuple[int, ...]) -> Features:
    rng = np.random.default_rng(seed)
    present = ~np.isin(np.arange(ITEMS), missing)
    values = rng.normal(size=(ITEMS, width)) * rng.uniform(0.1, 9, (ITEMS, 1)) * present[:, None]
    return Features(values.astype(np.float32), present, "drawn by a test")


TEXT, IMAGE = vectors(0, 6, (3, 4)), vectors(1, 6, (4, 5))


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.linalg.norm(row)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("fusion", READS)
def test_each_fusion_equals_its_formula_item_by_item(fusion, raw):
    found = fuse(TEXT, IMAGE, fusion, IDS, weight=0.3, raw=raw)
    share = 0.3 if fusion == "weighted" else 0.5
    for item in range(ITEMS):
        has_text, has_image = TEXT.present[item], IMAGE.present[item]
        t, v = (each.vectors[item].astype(float) for each in (TEXT, IMAGE))
        if not raw:
            t, v = (unit(each) if has else each for each, has in ((t, has_text), (v, has_image)))
        expected = {
            "text": t,
            "image": v,
            "concat": np.concatenate([t, v]),
        }.get(fusion, share * t + (1 - share) * v if has_text and has_image else t + v)
        assert np.allclose(found.vectors[item], expected, atol=1e-5)
        reads = {"text": has_text, "image": has_image}.get(fusion, has_text or has_image)
        assert found.present[item] == reads


def test_the_longer_modality_does_not_rule_the_cosine():
    """As it does in the released scripts, which concatenate vectors as they come."""
    longer = Features(1000 * IMAGE.vectors, IMAGE.present, "longer")
    for fusion in ("average", "weighted", "concat"):
        same = fuse(TEXT, IMAGE, fusion, IDS).vectors
        assert np.allclose(fuse(TEXT, longer, fusion, IDS).vectors, same, atol=1e-5)
        raw = fuse(TEXT, longer, fusion, IDS, raw=True).vectors[0]
        image = IMAGE.vectors[0] if fusion != "concat" else np.r_[np.zeros(6), IMAGE.vectors[0]]
        assert unit(raw) @ unit(image) > 0.999


def test_unequal_widths_meet_on_principal_axes():
    rng = np.random.default_rng(3)
    wide = rng.normal(size=(ITEMS, 6)) @ np.linalg.qr(rng.normal(size=(20, 6)))[0].T
    image = Features(wide.astype(np.float32), np.ones(ITEMS, bool), "wide, of rank 6")
    axes = principal_axes(image.vectors, 6)
    reference = np.linalg.svd(wide)[2][:6].T
    assert np.allclose(np.abs((axes * reference).sum(0)), 1, atol=1e-4)
    for fusion in ("average", "weighted"):
        assert fuse(TEXT, image, fusion, IDS).vectors.shape == (ITEMS, 6)
    assert fuse(TEXT, image, "concat", IDS).vectors.shape == (ITEMS, 26)
    # Nothing of these vectors lies outside the axes, so cosines do not change.
    alone = fuse(TEXT, image, "weighted", IDS, weight=0).vectors
    cosines = np.array([[unit(a) @ unit(b) for b in wide] for a in wide])
    kept = np.array([[unit(a) @ unit(b) for b in alone] for a in alone])
    assert np.allclose(kept, cosines, atol=1e-4)


def test_a_zero_vector_and_a_weight_that_is_no_share_are_named():
    zero = Features(TEXT.vectors * (np.arange(ITEMS) != 7)[:, None], TEXT.present, "a.npy")
    with pytest.raises(DataError, match=r"the text vector of item 'i7' is zero \(a\.npy\)"):
        fuse(zero, IMAGE, "concat", IDS)
    with pytest.raises(DataError, match=r"--weights 1\.5: expected a share"):
        fuse(TEXT, IMAGE, "weighted", IDS, weight=1.5)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """12 users and 51 items: of each user's items the last two are hers alone."""
    monkeypatch.chdir(tmp_path)
    world = write_world(tmp_path / "world")
    split = split_of(world)
    for name, features in (("text", TEXT), ("image", IMAGE)):
        kept = np.flatnonzero(features.present)
        np.save(f"{name}.npy", features.vectors[kept])
        ids = split.dataset.items["item"].gather(kept)
        Path(f"{name}.items.txt").write_text("".join(f"{each}\n" for each in ids))
    return split


def run(split: Split, *options: str) -> Path:
    command = [str(split.folder), "--texts", "text.npy", *options]
    run_command(ProfileOptions, profile, command)
    (newest,) = [Path("ranks") / f"{options[options.index('--name') + 1]}.parquet"]
    return newest


@pytest.mark.parametrize("fusion", ["average", "concat"])
def test_the_command_ranks_by_the_fused_vectors(world, fusion):
    records = RankRecords.load(run(world, "--fusion", fusion, "--image", "image.npy", "--name", "f"))
    fused = fuse(TEXT, IMAGE, fusion, world.dataset.items["item"])
    model = MeanProfiles(world, "test", fused.vectors, fused.present, history=10)
    ranking = full_ranking(world, "test")
    scores = model.of_users(ranking.users) @ model.item_vectors.T
    for row, target in enumerate(ranking.positives):
        masked = ranking.masked[ranking.masked_offsets[row] : ranking.masked_offsets[row + 1]]
        others = np.setdiff1d(np.flatnonzero(fused.present), masked)
        above = (scores[row, others] > scores[row, target]).sum()
        if fused.present[target]:  # the item without a vector ranks as one of the others
            assert records.above[row] in (above, above + 1)


def test_the_weight_is_chosen_by_validation_lists_alone(world, monkeypatch, capsys):
    opened = []
    original = Split.rows
    monkeypatch.setattr(
        Split, "rows", lambda self, part, **kw: opened.append(part) or original(self, part, **kw)
    )
    options = ("--fusion", "weighted", "--image", "image.npy", "--part", "valid", "--name", "swept")
    run(world, *options, "--weights", "0.0", "0.4", "1.0")
    assert "test" not in opened
    made = read_made(read_table(Path("ranks/swept-valid.parquet"))[1], Path("ranks/swept-valid.parquet"))
    ranking, best = full_ranking(world, "valid"), {}
    for weight in (0.0, 0.4, 1.0):
        each = fuse(TEXT, IMAGE, "weighted", world.dataset.items["item"], weight=weight)
        model = MeanProfiles(world, "valid", each.vectors, each.present, history=10)
        records = rank_catalog(ranking, model.for_ranking(ranking.users), system="w")
        best[str(weight)] = compute_metrics(records, names=["ndcg@10"]).mean()["ndcg@10"]
    assert made["weight"] == float(max(best, key=best.get)) and set(made["sweep"]) == set(best)
    assert f"w = {made['weight']} is taken" in capsys.readouterr().out
    assert max(made["sweep"], key=made["sweep"].get) == str(made["weight"])


def test_text_image_and_popularity_stand_in_one_table_on_one_pool(world):
    shared = ("--pool", "covered", "--covered-by", "text.npy", "image.npy")
    paths = [
        run(world, "--name", "by-text", *shared),
        run(world, "--fusion", "average", "--image", "image.npy", "--name", "by-both", *shared),
        popularity(PopularityOptions(world.folder, pool="covered", covered_by=("text.npy", "image.npy"))),
    ]
    records = [RankRecords.load(path) for path in paths]
    assert len({each.protocol for each in records}) == len({each.candidates for each in records}) == 1
    assert len({tuple(each.item) for each in records}) == 1 and "covered-" in records[0].protocol
    with pytest.raises(DataError, match="no content for 1 of the 49 items of the pool"):
        options = {"pool": "covered", "covered_by": ("image.npy",), "name": "other"}
        profile(ProfileOptions(world.folder, texts="text.npy", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "attention", "image": "image.npy"}, "has to be trained: recipes/train_ranker.py"),
        ({"fusion": "average"}, "--fusion average reads images"),
        ({"image": "image.npy"}, "--image is not read by --fusion text"),
        ({"fusion": "image", "image": "image.npy", "texts": "text.npy"}, "--texts text.npy is not read"),
        ({"fusion": "concat", "image": "image.npy", "weights": (0.2,)}, "--weights is for --fusion weighted"),
        ({"fusion": "weighted", "image": "image.npy", "weights": (0.2, 0.2)}, "different shares"),
    ],
)
def test_options_without_effect_are_refused(world, options, message):
    with pytest.raises(DataError, match=message):
        profile(ProfileOptions(world.folder, **options))


def test_raw_vectors_are_averaged_as_they_come(tmp_path):
    """The released scripts' order, which a flag asks for; profiles are ranked block by block alike."""
    dataset = make_dataset(tmp_path / "d")
    from recllm.data.splits import SplitOptions, make_split

    split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(40, 6)) * rng.uniform(0.1, 9, (40, 1))).astype(np.float32)
    model = MeanProfiles(split, "test", values, np.ones(40, bool), history=3, raw=True)
    ranking = full_ranking(split, "test")
    for place, user in enumerate(ranking.users[:8]):
        rows = split.history_rows("test")
        rows = rows[dataset.user_codes[rows] == user]
        rows = rows[np.argsort(dataset.timestamps[rows], kind="stable")][-3:]
        mean = values[dataset.item_codes[rows]].mean(0)
        assert np.allclose(model.of_users(ranking.users[place : place + 1])[0], unit(mean), atol=1e-5)
    eager = rank_catalog(ranking, (model.of_users(ranking.users), model.item_vectors), system="p", block=7)
    lazy = rank_catalog(ranking, model.for_ranking(ranking.users), system="p", block=7)
    assert np.array_equal(eager.above, lazy.above) and np.array_equal(eager.tied, lazy.tied)


def test_titles_alone_and_texts_joined(world):
    dataset = world.dataset
    titles, texts = item_texts(dataset, "title"), item_texts(dataset, "text")
    assert titles == [title.strip() for title in dataset.items["title"]]
    assert texts == [text.strip() for text in dataset.items["text"]]
    assert item_texts(dataset, "title+text") == item_texts(dataset) != titles
    swapped = item_texts(dataset, "text+title")
    both = next(row for row in range(ITEMS) if titles[row] and texts[row])
    assert swapped[both].startswith(texts[both]) and swapped[both].endswith(titles[both])
    for wrong in ("title+", "title+title"):
        with pytest.raises(DataError, match="different names joined by"):
            item_texts(dataset, wrong)
