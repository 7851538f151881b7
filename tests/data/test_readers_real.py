"""Every reader that real data is there for, with the counts that the data's own descriptions give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import Amazon, ItemSequences, MovieLens, PreSplit, Table

pytestmark = pytest.mark.data


def counts(manifest: dict, *names: str) -> tuple[int, ...]:
    return tuple(manifest["counts"][name] for name in names)


SIZES = ("users", "items", "interactions")


def test_movielens_with_posters(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("ml-latest-small-posters")
    dataset, findings = import_dataset(MovieLens(folder, tmp_path / "out", link_images=True))
    assert counts(dataset.manifest, *SIZES) == (610, 9742, 100836)
    assert counts(dataset.manifest, "items_with_image", "items_with_text", "timestamps") == (
        3605,
        7089,
        100835,
    )
    assert findings.kept == {"interactions without a readable time": 1} and not findings.left_out
    assert "ratings.csv, line 522" in findings.examples["interactions without a readable time"][0]
    assert dataset.items.filter(item="6")["title"][0] == "Heat (1995)"
    assert dataset.items.filter(item="114335")["categories"][0].to_list() == []


def test_any_csv_gives_what_the_own_reader_gives(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("ml-latest-small-posters")
    own, _ = import_dataset(MovieLens(folder, tmp_path / "own", link_images=True))
    options = Table(
        folder / "ratings.csv",
        tmp_path / "table",
        user="userId",
        item="movieId",
        items_file=folder / "movies.csv",
        categories="genres",
        images=folder / "posters",
        link_images=True,
    )
    table, _ = import_dataset(options)
    assert table.interactions.equals(own.interactions)
    assert table.items.select("item", "title", "images").equals(own.items.select("item", "title", "images"))


@pytest.mark.parametrize(
    ("name", "reviews", "distinct"),
    [
        ("All_Beauty_5.json.gz", 5269, (991, 85, 4092)),
        ("AMAZON_FASHION_5.json.gz", 3176, (406, 31, 3042)),
        ("Gift_Cards_5.json.gz", 2972, (458, 148, 2965)),
        ("Musical_instruments_reviews.csv.zip", 10261, (1429, 900, 10261)),
    ],
)
def test_amazon(
    shared_data: Callable[[str], Path], tmp_path: Path, name: str, reviews: int, distinct: tuple[int, ...]
) -> None:
    source = shared_data("amazon-reviews") / name
    everything, findings = import_dataset(Amazon(source, tmp_path / "keep", duplicates="keep", strict=True))
    assert counts(everything.manifest, "interactions", "timestamps", "ratings") == (reviews,) * 3
    assert not findings.left_out and not findings.kept
    assert (everything.interactions["review"] != "").all()
    dataset, _ = import_dataset(Amazon(source, tmp_path / "out"))
    assert counts(dataset.manifest, *SIZES) == distinct
    if name.startswith("Gift"):
        assert counts(dataset.manifest, "items_with_title", "items_with_text") == (148, 147)
        assert dataset.items["image_urls"].drop_nulls().list.first().str.starts_with("https://").all()


def test_beauty_sequences(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("amazon-beauty-sequences")
    dataset, findings = import_dataset(ItemSequences(folder, tmp_path / "out", strict=True))
    assert counts(dataset.manifest, *SIZES) == (22363, 12101, 198502)
    assert counts(dataset.manifest, "items_with_title", "timestamps") == (12094, 0)
    assert not findings.left_out
    line = (folder / "sequences.txt").read_text().splitlines()[41].split()
    assert dataset.interactions.filter(user=line[0])["item"].to_list() == line[1:]


def test_baby_parts(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    options = PreSplit(shared_data("amazon-baby-interactions"), tmp_path / "out", strict=True)
    dataset, findings = import_dataset(options)
    assert counts(dataset.manifest, *SIZES) == (19445, 7050, 160792)
    parts = dict(dataset.interactions["part"].value_counts().rows())
    assert parts == {"train": 118551, "valid": 21682, "test": 20559}
    assert not findings.left_out
