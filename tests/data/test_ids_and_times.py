"""Ids in several spellings, parts and tables that match nobody, dates as people write them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import Amazon, ItemSequences, PreSplit
from recllm.errors import DataError
from tests.data.imports import assert_refused, pairs, put, take

# ---------------------------------------------------------------------------- ids


def test_markers_of_missing_values_are_no_ids(tmp_path: Path) -> None:
    text = "user,item\n" + "".join(f"{mark},i\n" for mark in ("NA", "nan", "None", "NULL", "\\N", "", "77"))
    dataset, findings = take(put(tmp_path / "log.csv", text))
    assert dataset.users["user"].to_list() == ["77"]
    assert sum(findings.left_out.values()) == 6


def test_float_and_negative_ids(tmp_path: Path) -> None:
    log = pl.DataFrame({"user": [-1.0, 2.5, float("nan")], "item": [1.0, 2.0, 3.0]})
    log.write_parquet(tmp_path / "log.parquet")
    assert pairs(tmp_path / "log.parquet") == [("-1", "1"), ("2.5", "2")]
    assert pairs(put(tmp_path / "log.csv", "user,item\n-1.0,1.0\n2.5,2\n")) == [("-1", "1"), ("2.5", "2")]


def test_a_users_table_that_matches_nobody_is_an_error(tmp_path: Path) -> None:
    users = put(tmp_path / "users.csv", "user,age\nU-1,30\n")
    log = put(tmp_path / "log.csv", "user,item\nu1,i1\n")
    assert_refused(
        log, r"no user id of log.csv \(such as 'u1'\) is in users.csv \(such as 'U-1'\)", users_file=users
    )


def test_parts_have_one_spelling_of_ids(tmp_path: Path) -> None:
    put(tmp_path / "s" / "train.csv", "user,item\n1.0,10\n2.0,11\n")
    put(tmp_path / "s" / "valid.csv", "user,item\n1,12\n")
    put(tmp_path / "s" / "test.csv", "user,item\n2,13.0\n")
    dataset, _ = import_dataset(PreSplit(tmp_path / "s", tmp_path / "out"))
    assert dataset.users["user"].to_list() == ["1", "2"]
    put(tmp_path / "s" / "test.csv", "user,item\nU2,13\n")
    with pytest.raises(
        DataError, match=r"no user of test.csv \(such as 'U2'\) is in train.csv.*--disjoint-users"
    ):
        import_dataset(PreSplit(tmp_path / "s", tmp_path / "two"))
    dataset, _ = import_dataset(PreSplit(tmp_path / "s", tmp_path / "two", disjoint_users=True))
    assert dataset.users["user"].to_list() == ["1", "2", "U2"]


def test_commas_inside_sequences(tmp_path: Path) -> None:
    path = put(tmp_path / "seq.txt", "5\t112,110,108\n7\t14,238\n")
    with pytest.raises(DataError, match="most item ids have commas"):
        import_dataset(ItemSequences(path, tmp_path / "out"))
    dataset, _ = import_dataset(ItemSequences(path, tmp_path / "out", separator=","))
    assert dataset.interactions.select("user", "item").rows() == [
        *(("5", "112"), ("5", "110"), ("5", "108"), ("7", "14"), ("7", "238"))
    ]


def test_metadata_given_as_reviews(tmp_path: Path) -> None:
    for name in ("X.jsonl", "meta_X.jsonl"):
        put(tmp_path / name, '{"parent_asin": "A1", "title": "T"}\n')
    for variants in (False, True):
        with pytest.raises(DataError, match="no line of it is an object with the fields expected"):
            import_dataset(Amazon(tmp_path / "X.jsonl", tmp_path / "out", variants=variants))


# ---------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("2011/11/05 10:30", "%Y/%m/%d %H:%M"),
        ("05.11.2011 10:30:00", "%d.%m.%Y %H:%M:%S"),
        ("Sat Nov 05 10:30:00 +0000 2011", "%a %b %d %H:%M:%S %z %Y"),
        ("Sat Nov 05 02:30:00 -0800 2011", "%a %b %d %H:%M:%S %z %Y"),
        ("Posted November 5, 2011.", "%B %d, %Y"),
        ("5 Nov 2011", "%d %b %Y"),
        ("20111105", "%Y%m%d"),
        ("20111105103000", "%Y%m%d%H%M%S"),
    ],
)
def test_common_dates_are_found_and_named(tmp_path: Path, text: str, form: str) -> None:
    path = put(tmp_path / "log.csv", f'user,item,timestamp\na,1,"{text}"\n')
    dataset, findings = take(path)
    assert dataset.interactions["timestamp"][0] in (1320489000, 1320451200)
    assert any(form in note for note in findings.notes)


def test_day_and_month_are_found_over_the_whole_column(tmp_path: Path) -> None:
    few = "".join(f'a,{n},"05/11/2011 8:30:00 AM"\n' for n in range(1200))
    path = put(tmp_path / "log.csv", "user,item,timestamp\n" + few)
    assert_refused(path, "may begin with the day or the month; say --time-format")
    path = put(tmp_path / "log.csv", "user,item,timestamp\n" + few + 'a,x,"11/15/2011 8:30:00 PM"\n')
    dataset, findings = take(path)
    assert dataset.interactions["timestamp"].null_count() == 0
    assert any("%m/%d/%Y %I:%M:%S %p" in note for note in findings.notes)
    dataset, _ = take(path, time_format="%d/%m/%Y %I:%M:%S %p")
    assert dataset.interactions["timestamp"].null_count() == 1
    assert_refused(path, "no time has the format", time_format="%Y")
    assert_refused(put(tmp_path / "log.csv", "user,item,timestamp\na,b,soon\n"), "--time-format names it")


# ---------------------------------------------------------------------------- images


def test_images_in_folders_and_of_many_suffixes(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user,item\nu,i1\nu,i2\nu,i3\nu,i4\nu,i5\nu,i6\n")
    for name in (
        "010/i1.jpg",
        "i2.jfif",
        "i3.avif",
        "i4.JPE",
        "i5.heic",
        "i6/0.webp",
        "i6/1.png",
        "other.png",
    ):
        put(tmp_path / "images" / name, "x")
    dataset, findings = take(log, images=tmp_path / "images")
    assert dataset.items["images"].to_list() == [
        *(["images/010/i1.jpg"], ["images/i2.jfif"], ["images/i3.avif"], ["images/i4.JPE"], []),
        ["images/i6/0.webp", "images/i6/1.png"],
    ]
    assert findings.left_out == {"images in a format that cannot be read (convert them to JPEG)": 1}
    assert any("1 of 7 images in images belong to no item" in note for note in findings.notes)


def test_no_image_of_any_item_is_an_error(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user,item\nu,i1\n")
    put(tmp_path / "images" / "x.jpg", "x")
    assert_refused(log, "no image in .*images belongs to any item.*such as 'i1'", images=tmp_path / "images")
    assert_refused(
        log, "names none that is there", images=tmp_path / "images", image_pattern="{item}_cover.jpg"
    )
