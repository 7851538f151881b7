"""Details that show only in results: spaces, ids of bad rows, images of unlisted items, odd types."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import time
from pathlib import Path

import polars as pl
import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import Table
from recllm.errors import DataError
from tests.data.imports import assert_refused, pairs, put, take


def test_spaces_around_numbers_do_not_matter(tmp_path: Path) -> None:
    dataset, findings = take(put(tmp_path / "log.csv", "user,item,timestamp,rating\nu, i, 5, 4.5\n"))
    assert dataset.interactions.row(0)[:4] == ("u", "i", 5, 4.5) and findings.left_out == {}


@pytest.mark.parametrize("with_images", [False, True])
def test_a_row_that_is_left_out_adds_no_item(tmp_path: Path, with_images: bool) -> None:
    path = put(tmp_path / "log.csv", "user,item,rating\nu,a,5\nu,b,4\n,zzz,5\n")
    for name in ("a", "zzz"):
        put(tmp_path / "images" / f"{name}.jpg", "jpeg")
    dataset, _ = take(path, images=tmp_path / "images" if with_images else None)
    assert dataset.items["item"].to_list() == ["a", "b"]


def test_an_item_that_the_items_table_lacks_keeps_its_image(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item\nu,a\nu,b\n")
    items = put(tmp_path / "items.csv", "item,title\na,A\n")
    for name in ("a", "b", "z"):
        put(tmp_path / "images" / f"{name}.jpg", "jpeg")
    dataset, findings = take(path, items_file=items, images=tmp_path / "images")
    assert dataset.items["images"].to_list() == [["images/a.jpg"], ["images/b.jpg"]]
    assert "1 of 3 images in images belong to no item and were not copied" in findings.notes


def test_images_of_an_item_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item\nu,a\n")
    for number in (*range(12), "²"):  # the last is a digit, but no number
        put(tmp_path / "images" / f"a_{number}.jpg", "jpeg")
    dataset, _ = take(path, images=tmp_path / "images")
    assert dataset.items["images"][0].to_list() == [f"images/a_{number}.jpg" for number in range(12)]


def test_long_numbers_stay_apart_in_json(tmp_path: Path) -> None:
    ids = ["9007199254740993", "9007199254740992", "12.0"]
    path = put(tmp_path / "log.jsonl", "".join(f'{{"user": 1, "item": {item}}}\n' for item in ids))
    assert pairs(path) == [("1", "9007199254740993"), ("1", "9007199254740992"), ("1", "12")]


def test_whole_numbers_lose_a_point_zero_wherever_they_stand(tmp_path: Path) -> None:
    rows = [f"u{row},1.0" for row in range(1001)] + ["u0,1"]
    path = put(tmp_path / "log.csv", "user,item\n" + "\n".join(rows) + "\n")
    assert set(pairs(path)) == {(f"u{row}", "1") for row in range(1001)}
    path = put(tmp_path / "log.csv", "user,item\n" + "\n".join(rows[:-1]) + "\n")
    assert set(pairs(path)) == {(f"u{row}", "1") for row in range(1001)}


def test_a_time_of_day_is_no_timestamp_and_a_categorical_rating_is_one(tmp_path: Path) -> None:
    log = pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": [time(12)]})
    log.write_parquet(tmp_path / "log.parquet")
    assert_refused(tmp_path / "log.parquet", "the timestamp column is of type Time")
    log = log.with_columns(rating=pl.Series(["4"], dtype=pl.Categorical)).drop("timestamp")
    log.write_parquet(tmp_path / "log.parquet")
    assert take(tmp_path / "log.parquet")[0].interactions["rating"].to_list() == [4.0]


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item\nu,a\n")
    with pytest.raises(DataError, match="bytes that are not UTF-8"):
        import_dataset(Table(path, tmp_path / os.fsdecode(b"o\xff")))
    with pytest.raises(DataError, match="bytes that are not UTF-8"):
        import_dataset(Table(path, tmp_path / os.fsdecode("\U0001f600".encode() + b"\xff")))
    assert import_dataset(Table(path, tmp_path / "\U0001f600"))[0].folder.exists()


def test_a_terminal_without_the_letters_of_an_id_does_not_end_the_run(tmp_path: Path) -> None:
    put(tmp_path / "log.csv", "user,item\nü,ä\nü,ä\n")
    command = [sys.executable, "-m", "recllm.cli", "data", "import", "table", "log.csv", "out"]
    surroundings = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0 and "\\xfc" in done.stdout
