"""A visual store holds what rows use, grows by what is new, and is left out where it does not pay."""

from __future__ import annotations

import hashlib
import os
import time
from collections import namedtuple
from pathlib import Path

import polars as pl
import pytest
import torch

from recllm.errors import DataError
from recllm.mllm.loading import load
from recllm.mllm.vision import of_dataset as visual_folder
from recllm.mllm.vision.images import resolve_image
from recllm.mllm.vision.of_dataset import open_visual_store
from recllm.mllm.vision.store import build_visual_store, image_key
from tests.mllm.small_models import save_small
from tests.mllm.test_visual_store import save_pictures

OLD = time.time() - 3600


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(save_small("qwen2_vl", tmp_path_factory.mktemp("model")))


@pytest.fixture
def dataset(tmp_path):
    """A dataset's folder with eight items, each with an image."""
    folder = tmp_path / "dataset"
    (folder / "images").mkdir(parents=True)
    paths = save_pictures(folder / "images", 8)
    for path in paths:
        os.utime(path, (OLD, OLD))
    images = [f"images/{path.name}" for path in paths]
    items = pl.DataFrame(
        {"item": [f"i{number}" for number in range(8)], "images": [[each] for each in images]}
    )
    items.write_parquet(folder / "items.parquet")
    return folder


def images_of(dataset: Path) -> list[str]:
    return pl.read_parquet(dataset / "items.parquet")["images"].explode().to_list()


def uses(*images: str) -> pl.Series:
    return pl.Series([image for image in images for _ in range(2)])


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_only_what_rows_use_is_encoded(loaded, dataset):
    images = images_of(dataset)
    store = open_visual_store("auto", loaded, dataset, uses(*images[:3]))
    assert store.manifest["images"] == 3
    store.keys_of([dataset / image for image in images[:3]])
    with pytest.raises(DataError, match="`auto` adds such images"):
        store.keys_of([dataset / images[3]])
    assert open_visual_store("auto", loaded, dataset).manifest["images"] == 8  # all of all items


def test_it_grows_by_what_is_new_and_changes_nothing_that_is_there(loaded, dataset):
    images = images_of(dataset)
    first = open_visual_store("auto", loaded, dataset, uses(*images[:3]))
    before = files_of(first.folder)
    grown = open_visual_store("auto", loaded, dataset, uses(*images[2:6]))
    after = files_of(grown.folder)
    assert {name: after[name] for name in before} == before and len(after) == 2 * len(before)
    assert grown.manifest["images"] == 6
    again = open_visual_store("auto", loaded, dataset, uses(*images[:6]))
    assert files_of(again.folder) == after  # nothing was missing
    paths = [resolve_image(dataset, image) for image in images[:6]]
    whole = build_visual_store(
        loaded.model, loaded.processor, paths, dataset / "whole", dtype="float32", progress=False
    )
    for key in whole.keys_of(paths):
        assert torch.allclose(again.features(key), whole.features(key), atol=1e-5)
        assert again.notes([key])["image_grid_thw"].tolist() == whole.notes([key])["image_grid_thw"].tolist()


def test_a_store_that_was_made_whole_is_extended(loaded, dataset):
    images = images_of(dataset)
    made = open_visual_store("auto", loaded, dataset, uses(*images[:2]))
    (part,) = made.folder.glob("part-*")
    for path in part.iterdir():  # as earlier versions laid it out
        path.rename(made.folder / path.name)
    part.rmdir()
    grown = open_visual_store("auto", loaded, dataset, uses(*images[:4]))
    assert grown.manifest["images"] == 4 and len(list(made.folder.glob("part-*"))) == 1


def test_a_changed_image_is_encoded_again(loaded, dataset):
    images = images_of(dataset)
    open_visual_store("auto", loaded, dataset, uses(*images))
    (dataset / images[0]).write_bytes((dataset / images[1]).read_bytes())
    os.utime(dataset / images[0], (OLD + 1, OLD + 1))
    store = open_visual_store("auto", loaded, dataset, uses(*images))
    assert store.keys_of([dataset / images[0]]) == [image_key(dataset / images[1])]


@pytest.mark.parametrize("passes", [1, 2])
def test_images_that_are_used_once_do_not_pay(loaded, dataset, capsys, passes):
    store = open_visual_store("auto", loaded, dataset, pl.Series(images_of(dataset)), passes=passes)
    told = capsys.readouterr().out
    assert (store is None) == (passes == 1)
    assert ("used less than 2 times each; images are encoded when they are needed" in told) == (passes == 1)
    assert (dataset / "visual").exists() == (passes == 2)


def test_what_is_there_already_is_used_whatever_it_would_have_paid(loaded, dataset):
    open_visual_store("auto", loaded, dataset)
    assert open_visual_store("auto", loaded, dataset, pl.Series(images_of(dataset)), passes=1) is not None


def test_a_store_that_does_not_fit_on_the_disk_is_not_begun(loaded, dataset, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(visual_folder.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 100))
    assert open_visual_store("auto", loaded, dataset) is None
    assert "8 images would take about" in (told := capsys.readouterr().out) and "100 B of the disk" in told
    with pytest.raises(DataError, match="8 images would take about"):
        open_visual_store("auto", loaded, dataset, required=True)
    assert not (dataset / "visual").exists()


def test_the_estimate_is_what_is_written(loaded, dataset):
    paths = [resolve_image(dataset, image) for image in images_of(dataset)]
    store = open_visual_store("auto", loaded, dataset)
    written = sum(path.stat().st_size for path in store.folder.rglob("tokens.bin"))
    assert visual_folder._bytes(loaded, paths, "float32") == written


def test_ranks_share_the_images(loaded, dataset, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("recllm.processes.sum_over_ranks", list)
    for rank, have in ((1, 4), (0, 6)):  # one after the other here, so that the second shares what is left
        monkeypatch.setenv("RANK", str(rank))
        assert open_visual_store("auto", loaded, dataset).manifest["images"] == have


def test_a_rank_whose_disk_is_full_stops_all(loaded, dataset, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("recllm.processes.sum_over_ranks", lambda numbers: [numbers[0] + 1])
    assert open_visual_store("auto", loaded, dataset) is None
    with pytest.raises(DataError, match="disk of another rank"):
        open_visual_store("auto", loaded, dataset, required=True)


def test_unusable_images_are_named_and_taken_once_they_are_mended(loaded, dataset):
    images = images_of(dataset)
    path, content = dataset / images[2], (dataset / images[2]).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    os.utime(path, (OLD, OLD))
    store = open_visual_store("auto", loaded, dataset)
    assert store.manifest["images"] == 7 and list(store.manifest["unusable"]) == [str(path)]
    before = files_of(store.folder)
    again = open_visual_store("auto", loaded, dataset)
    assert files_of(again.folder) == before and list(again.manifest["unusable"]) == [str(path)]
    path.write_bytes(content)
    mended = open_visual_store("auto", loaded, dataset)
    assert mended.manifest["images"] == 8
    mended.keys_of([path])


def test_a_catalog_without_a_usable_image(loaded, dataset):
    for image in images_of(dataset):
        (dataset / image).write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 8 images can be used"):
        open_visual_store("auto", loaded, dataset)
