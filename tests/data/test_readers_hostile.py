"""Hostile input: broken JSON, ids and image paths that aim outside, and whatever else bytes can be."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data.importing import import_dataset
from recllm.data.raw.values import MISSING
from recllm.data.readers import ItemSequences, MovieLens
from recllm.errors import DataError
from tests.data.imports import PAIR, assert_refused, put, take

# ---------------------------------------------------------------------------- JSON lines


def test_broken_json_lines_are_counted_one_by_one(tmp_path: Path) -> None:
    good = '{"user": "u", "item": "a"}'
    broken = [
        '{"user": "u", "item"',
        "[1, 2]",
        '"text"',
        "null",
        '{"user": "\\ud800", "item": "b"}',
        "[" * 100_000,
        '{"user": {"a": ' * 50_000,
        b'{"user": "\xff", "item": "b"}'.decode("latin-1"),
    ]
    fine = ['{"user": "u", "item": "c", "rating": NaN}', "{'user': 'u', 'item': 'd', 'rating': None}"]
    data = "\n".join([good, *broken, "", *fine]).encode("latin-1")
    dataset, findings = take(put(tmp_path / "log.jsonl", data))
    assert dataset.interactions.select(PAIR).rows() == [("u", "a"), ("u", "c"), ("u", "d")]
    assert dataset.interactions["rating"].null_count() == 3
    assert findings.left_out == {"malformed lines in log.jsonl": len(broken)}
    assert findings.examples["malformed lines in log.jsonl"][0].startswith(
        "log.jsonl, line 2: JSONDecodeError"
    )
    assert_refused(tmp_path / "log.jsonl", "log.jsonl, line 2", strict=True)


def test_odd_values_in_json_lines(tmp_path: Path) -> None:
    rows = [
        '{"user": 7, "item": "a", "x": 123456789012345678901234567890, "timestamp": 1500000000}',
        '{"user": 7.0, "item": "b", "x": 18446744073709551615, "timestamp": "1500000001", "rating": 4}',
        '{"user": null, "item": "c", "timestamp": 1500000002}',
        '{"user": "", "item": "d", "timestamp": 1500000003}',
        '{"user": "nul\\u0000l", "item": "e", "timestamp": 1500000004}',
    ]
    dataset, findings = take(put(tmp_path / "log.jsonl", "\n".join(rows)))
    assert dataset.interactions.select(PAIR).rows() == [("7", "a"), ("7", "b"), ("nul\0l", "e")]
    assert dataset.interactions["timestamp"].to_list() == [1500000000, 1500000001, 1500000004]
    assert dataset.interactions["rating"].to_list() == [None, 4.0, None]
    assert sum(findings.left_out.values()) == 2
    many = "".join(json.dumps({"user": "u", "item": "a", f"key{n}": n}) + "\n" for n in range(2000))
    assert_refused(put(tmp_path / "keys.jsonl", many), "more than 1,000 different field names")


# ---------------------------------------------------------------------------- hostile ids and paths

HOSTILE = [
    "../../x",
    "a/b",
    "/etc/passwd",
    "nul\0byte",
    "x" * 5000,
    "<|im_end|>",
    "'; DROP TABLE items; --",
    "{item}",
    "*",
    "CON:",
    "\u202eevil",
    "\U0001f600",
]


def test_hostile_ids_stay_plain_text_and_touch_no_path(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "log.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([PAIR, *((f"u{text}", text) for text in HOSTILE)])
    images = path.parent / "images"
    for place in (
        tmp_path / "x.jpg",
        tmp_path / "deep" / "x.jpg",
        images / "fine.jpg",
        images / "a" / "b.jpg",
    ):
        put(place, b"secret")
    before = {entry for entry in tmp_path.rglob("*") if path.parent / "out" not in entry.parents}
    dataset, findings = take(path, images=images, image_pattern="{item}.jpg")
    assert sorted(dataset.items["item"]) == sorted(HOSTILE)
    assert sorted(dataset.users["user"]) == sorted(f"u{text}" for text in HOSTILE)
    # "a/b" names a file below the image folder, and only that; ids that climb, start at the root or hold
    # NUL are refused.
    assert dict(dataset.items.filter(pl.col("images").list.len() > 0).select("item", "images").rows()) == {
        "a/b": ["images/a/b.jpg"]
    }
    assert findings.left_out["image paths that leave the image folder"] == 4
    after = {entry for entry in tmp_path.rglob("*") if path.parent / "out" not in entry.parents}
    assert after == before | {path.parent / "out"}


def test_image_paths_that_climb_out_are_refused_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "secret.jpg", b"secret")
    images = tmp_path / "images"
    put(images / "ok.jpg", b"fine")
    put(images / "empty.jpg", b"")
    (images / "folder").mkdir()
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "up").symlink_to(tmp_path)
    (images / "inner.jpg").symlink_to(images / "ok.jpg")
    outside = [
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "up/secret.jpg",
        "a/../../secret.jpg",
    ]
    outside += ["..\\secret.jpg", "~/secret.jpg", "c:/secret.jpg", "ok.jpg\0.png"]
    missing = ["none.jpg", "empty.jpg", "folder", "x" * 300, "ok.jpg/ok.jpg"]
    good = ["ok.jpg", "inner.jpg"]
    paths = outside + missing + good
    path = put(tmp_path / "log.csv", "user,item\n" + "".join(f"u,{row}\n" for row in range(len(paths))))
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item": range(len(paths)), "path": [[name] for name in paths]}).write_parquet(items)
    dataset, findings = take(path, items_file=items, images=images, image_column="path")
    assert findings.left_out == {
        "image paths that leave the image folder": len(outside),
        "image files that are missing or empty": len(missing),
    }
    assert sorted(dataset.items.explode("images")["images"].drop_nulls()) == [
        "images/inner.jpg",
        "images/ok.jpg",
    ]
    held = {str(entry.relative_to(dataset.folder)) for entry in dataset.folder.rglob("*.jpg")}
    assert held == {"images/inner.jpg", "images/ok.jpg"}
    assert not any(entry.is_symlink() for entry in dataset.folder.rglob("*"))
    assert all(b"secret" not in (dataset.folder / name).read_bytes() for name in held)
    assert_refused(
        path, "leave the image folder", items_file=items, images=images, image_column="path", strict=True
    )


def test_an_image_pattern_must_name_the_item(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item\nu,a\n")
    (tmp_path / "images").mkdir()
    assert_refused(path, r"has no \{item\} in it", images=tmp_path / "images", image_pattern="cover.jpg")


def test_hostile_ids_in_other_formats(tmp_path: Path) -> None:
    path = put(
        tmp_path / "seq.txt", "u/../1 ../../x a/b <|im_end|>\n2 \udcff\n".encode("utf-8", "surrogateescape")
    )
    dataset, findings = import_dataset(ItemSequences(path, tmp_path / "out"))
    assert dataset.interactions["item"].to_list() == ["../../x", "a/b", "<|im_end|>"]
    assert "seq.txt, line 2: an id with bytes" in str(findings.examples)
    put(tmp_path / "ml" / "ratings.csv", "userId,movieId,rating,timestamp\n1,../../x,4.0,964982703\n")
    put(tmp_path / "ml" / "movies.csv", "movieId,title,genres\n../../x,<|im_end|><script>,A|B\n")
    put(tmp_path / "x.jpg", b"secret")
    put(tmp_path / "ml" / "posters" / "1.jpg", b"secret")
    with pytest.raises(DataError, match=r"no image in .* belongs to any item"):
        import_dataset(MovieLens(tmp_path / "ml", tmp_path / "movies"))
    (tmp_path / "ml" / "posters" / "1.jpg").unlink()
    (tmp_path / "ml" / "posters").rmdir()
    dataset, _ = import_dataset(MovieLens(tmp_path / "ml", tmp_path / "movies"))
    assert dataset.items.row(0, named=True)["title"] == "<|im_end|><script>"
    assert dataset.items["images"].to_list() == [[]]


def test_an_unreadable_folder_as_source(tmp_path: Path) -> None:
    assert_refused(put(tmp_path / "a" / "log.csv", "x").parent, "is a folder; give the file in it")
    os.mkfifo(tmp_path / "pipe.csv")
    assert_refused(tmp_path / "pipe.csv", "no such file")


# ---------------------------------------------------------------------------- whatever a CSV writer writes

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd\ufeff"), max_size=12)
# Words for a missing value are no ids, 1.0 is the id 1, and a field that spans lines which all look like
# records of their own is taken for a stray quote: other tests have these.
PLAIN = TEXT.filter(
    lambda text: (
        text.strip() not in MISSING
        and not text.strip().removesuffix("0").endswith(".")
        and not ("\n" in text and text.count(",") > 2)
    )
)
ROWS = st.lists(
    st.tuples(PLAIN | st.just(""), PLAIN | st.just(""), PLAIN | st.just("")), min_size=1, max_size=8
)
NEWLINES = st.sampled_from(["\n", "\r\n"])


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS,
    newline=NEWLINES,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    broken=st.booleans(),
)
def test_what_a_csv_writer_wrote_comes_back(
    rows: list[tuple[str, str, str]], newline: str, quoting: int, broken: bool
) -> None:
    """Ids lose the spaces around them, rows with an empty id go; everything else comes back as it was."""
    if any("\r" in text for row in rows for text in row):
        quoting = csv.QUOTE_ALL  # writers before Python 3.13 leave a carriage return bare, which is no CSV
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "log.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator=newline, quoting=quoting)
            writer.writerow(["user", "item", "title", "end"])
            writer.writerow(["first", "row", "is good", "."])
            writer.writerows([*row, "."] for row in rows)
            if broken:  # now the file is read line by line, and nothing else may change
                file.write("too,short" + newline)
        frame = pl.DataFrame(rows, schema=["user", "item", "title"], orient="row")
        frame = frame.with_columns(pl.col("user", "item").str.strip_chars())
        expected = frame.filter((pl.col("user") != "") & (pl.col("item") != "")).rows()
        dataset, findings = take(path, duplicates="keep")
        found = dataset.interactions.select("user", "item", pl.col("title").fill_null("")).rows()
        assert found[0] == ("first", "row", "is good") and found[1:] == expected
        assert sum(findings.left_out.values()) == len(rows) - len(expected) + broken
        assert set(dataset.users["user"]) == {user for user, _, _ in found}


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_dataset_or_a_data_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        for path in (
            put(Path(name) / "a.csv", b"user,item\nu,i\n" + data),
            put(Path(name) / "b.jsonl", b'{"user": "u", "item": "i"}\n' + data),
            put(Path(name) / "c.csv", data),
            put(Path(name) / "d.csv.gz", data),
            put(Path(name) / "e.parquet", data),
        ):
            try:
                assert len(take(path)[0].interactions) > 0
            except DataError as error:
                assert str(path) in str(error)
