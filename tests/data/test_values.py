"""Values as sources spell them: one bad field costs no row, lists in any form, files of any packing."""

from __future__ import annotations

import bz2
import gzip
import json
import zipfile
from pathlib import Path

import polars as pl
import pytest

from recllm.data.importing import import_dataset
from recllm.data.raw.values import as_flag, as_id, as_number, as_texts
from recllm.data.readers import Amazon, RecBole, Yelp
from tests.data.imports import assert_refused, pairs, put, take

LOG = "user,item\nu1,r1\nu1,r2\nu2,r3\n"


# ---------------------------------------------------------------------------- single values


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4,5", 4.5),
        ("1,234", 1234.0),
        ("1,234.5", 1234.5),
        ("1.234,5", 1234.5),
        ("2.5K", 2500.0),
        ("1.2万", 12000.0),
        ("3 млн", 3e6),
        ("NaN", None),
        ("", None),
        (float("nan"), None),
    ],
)
def test_numbers_as_people_write_them(text: object, number: float | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize("value", ["five", True, [1], {"a": 1}, "1e999", "4,5,6"])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        as_number(value)


def test_ids_flags_and_lists() -> None:
    assert [as_id(value) for value in (" 12.0 ", 12.0, 12, "12", "-3.0", "1.5", "v1.0")] == [
        *["12"] * 4,
        *("-3", "1.5", "v1.0"),
    ]
    assert [as_id(value) for value in ("NA", "\\N", None, "null", float("nan"), " ")] == [None] * 6
    assert [as_flag(value) for value in (True, "true", "False", 1, 0, None, "NA")] == [
        *(True, True, False, True, False, None, None)
    ]
    assert as_texts([["a"], [], {"id": 1, "name": "b"}, None, 3.0]) == ["a", "b", "3"]


def test_a_bad_field_costs_no_row(tmp_path: Path) -> None:
    rows = [
        '{"user":"u1","item":"i1","rating":NaN,"review":"caf\u00e9"}',
        '{"user":"u2","item":"i2","rating":"4,5","review":"cut \\ud83d"}',
        '{"user":"u3","item":"i3","rating":true,"review":{"text":"deep"}}',
        '{"user":"u4","item":"i4","rating":Infinity}',
        '{"user":"NA","item":"i5","rating":1}',
    ]
    dataset, findings = take(put(tmp_path / "log.jsonl", "\n".join(rows).encode("latin-1")))
    assert dataset.interactions["user"].to_list() == ["u1", "u2", "u3", "u4"]
    assert dataset.interactions["rating"].to_list() == [None, 4.5, None, None]
    assert dataset.interactions["review"].to_list()[:2] == ["caf\ufffd", "cut \ufffd"]
    assert sum(findings.left_out.values()) == 1
    assert findings.kept == {"interactions without a readable rating": 1}
    dataset, _ = take(tmp_path / "log.jsonl", encoding="latin-1")
    assert dataset.interactions["review"][0] == "caf\u00e9"


def test_missing_ratings_of_parquet_and_ratings_that_are_flags(tmp_path: Path) -> None:
    log = pl.DataFrame({"user": ["a", "b", "c"], "item": ["x"] * 3, "rating": [1.5, None, float("nan")]})
    log.write_parquet(tmp_path / "log.parquet")
    dataset, findings = take(tmp_path / "log.parquet")
    assert dataset.interactions["rating"].to_list() == [1.5, None, None]
    assert not findings.left_out and not findings.kept
    dataset, findings = take(put(tmp_path / "log.csv", "user,item,rating\na,x,True\nb,x,False\n"))
    assert dataset.interactions["rating"].to_list() == [1.0, 0.0]
    assert any("are true and false" in note for note in findings.notes)


def test_a_column_found_by_its_name_can_be_switched_off(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item,rating,timestamp\na,x,good,yesterday\n")
    dataset, findings = take(path, rating="", timestamp="")
    assert dataset.interactions.row(0, named=True)["rating_source"] == "good" and not findings.kept


def test_words_for_true_in_amazon_and_old_yelp(tmp_path: Path) -> None:
    review = {
        "reviewerID": "U1",
        "asin": "A1",
        "overall": 5.0,
        "verified": True,
        "unixReviewTime": 15 * 10**8,
    }
    lines = [
        review,
        {**review, "reviewerID": "U2", "verified": "false"},
        {**review, "reviewerID": "U3", "verified": 7},
    ]
    path = put(tmp_path / "Toys_5.json", "\n".join(map(json.dumps, lines)))
    dataset, findings = import_dataset(Amazon(path, tmp_path / "toys"))
    assert dataset.interactions["verified"].to_list() == [True, False, None]
    assert findings.kept == {"fields of Toys_5.json that cannot be read": 1}
    business = {"business_id": "b", "name": "Shop", "open": True, "full_address": "1 Main St"}
    business["categories"] = "Food, Beer, Wine & Spirits, Books, Mags, Music & Video"
    votes = {"useful": 2, "funny": 1, "cool": 3}
    review = {"user_id": "u", "business_id": "b", "stars": 4, "date": "2011-01-26", "votes": votes}
    put(tmp_path / "yelp" / "business.json", json.dumps(business))
    put(tmp_path / "yelp" / "review.json", json.dumps(review))
    dataset, _ = import_dataset(Yelp(tmp_path / "yelp", tmp_path / "out"))
    item = dataset.items.row(0, named=True)
    assert (item["is_open"], item["address"]) == (1, "1 Main St")
    assert item["categories"] == ["Food", "Beer, Wine & Spirits", "Books, Mags, Music & Video"]
    assert dataset.interactions.select("useful", "funny", "cool").row(0) == (2, 1, 3)


# ---------------------------------------------------------------------------- lists


def categories_of(
    tmp_path: Path, name: str, text: str, **options: object
) -> tuple[list[list[str]], list[str]]:
    items = put(tmp_path / name, text)
    dataset, findings = take(put(tmp_path / "log.csv", LOG), items_file=items, **options)
    return dataset.items["categories"].to_list(), findings.lines()


def test_one_odd_item_does_not_change_the_categories_of_the_others(tmp_path: Path) -> None:
    def lines(odd: object) -> str:
        values = [["Toys", "Games"], ["Books"], odd]
        return "\n".join(json.dumps({"item": f"r{n + 1}", "categories": v}) for n, v in enumerate(values))

    for odd, read in (
        ([["Toys", "Dolls"]], ["Toys", "Dolls"]),
        ("Dolls", ["Dolls"]),
        (None, []),
        ([{"id": 1, "name": "Dolls"}], ["Dolls"]),
    ):
        found, _ = categories_of(tmp_path, "items.jsonl", lines(odd))
        assert found == [["Toys", "Games"], ["Books"], read]


def test_lists_written_as_text(tmp_path: Path) -> None:
    text = 'item,categories\nr1,"[\'quick\', \'it\\\'s\', \'dinner\']"\nr2,[]\nr3,"[""a, b""]"\n'
    found, lines = categories_of(tmp_path, "items.csv", text)
    assert found == [["quick", "it's", "dinner"], [], ["a, b"]]
    assert any("categories in items.csv are lists written as text" in line for line in lines)
    text = 'item;categories\nr1;[{"id": 28, "name": "Action"}]\nr2;[x]\nr3;["b"]\n'
    found, lines = categories_of(tmp_path, "items.csv", text, items_separator=";")
    assert found == [["Action"], ["[x]"], ["b"]]
    assert any("1 categories of items.csv in another form" in line for line in lines)
    found, lines = categories_of(tmp_path, "items.csv", 'item,categories\nr1,"a, b"\nr2,"c, d"\nr3,e\n')
    assert found == [["a, b"], ["c, d"], ["e"]] and any("--category-separator" in line for line in lines)
    found, _ = categories_of(tmp_path, "items.csv", "item,categories\nr1,a|b\nr2,c [d]\nr3,\n")
    assert found == [["a", "b"], ["c [d]"], []]


def test_sets_of_recbole(tmp_path: Path) -> None:
    put(tmp_path / "X" / "X.inter", "user_id:token\titem_id:token\nA\tB1\nA\tB2\nA\tB3\n")
    rows = "B1\t'Cell Phones & Accessories', \"Kids' Cases\"\nB2\t'Cables'\nB3\tet(\n"
    put(tmp_path / "X" / "X.item", "item_id:token\tcategories:token_seq\n" + rows)
    dataset, _ = import_dataset(RecBole(tmp_path / "X", tmp_path / "out"))
    assert dataset.items["categories"].to_list() == [
        ["Cell Phones & Accessories", "Kids' Cases"],
        ["Cables"],
        [],
    ]


# ---------------------------------------------------------------------------- formats


def test_arrays_literals_and_byte_order_marks(tmp_path: Path) -> None:
    rows = [{"user": f"u{n}", "item": f"\u00e4{n}" * 40} for n in range(20_000)]
    expected = [(row["user"], row["item"]) for row in rows]
    for text in (
        json.dumps(rows, ensure_ascii=False),
        json.dumps(rows, indent=1),
        "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    ):
        assert pairs(put(tmp_path / "log.json", text), strict=True) == expected
    assert_refused(put(tmp_path / "log.json", json.dumps(rows[:9])[:-30]), "JSON array.*from element 9 on")
    assert pairs(
        put(tmp_path / "log.jsonl", b"\xef\xbb\xbf" + b'{"user":1,"item":2}\n{"user":2,"item":2}')
    ) == [
        ("1", "2"),
        ("2", "2"),
    ]
    assert pairs(put(tmp_path / "log.json", "{'user': 'u1', 'item': 'i', 'ok': True}\n")) == [("u1", "i")]
    assert_refused(put(tmp_path / "log.json", "user,item\n1,2\n"), "no line of it is a JSON object")


def test_files_are_what_their_bytes_say(tmp_path: Path) -> None:
    text = b"user,item\nu1,i1\n"
    for packed in (
        gzip.compress(text),
        gzip.compress(text[:13]) + gzip.compress(text[13:]),
        bz2.compress(text),
    ):
        assert pairs(put(tmp_path / "log.csv", packed)) == [("u1", "i1")]
    pl.DataFrame({"user": [1], "item": [2]}).write_parquet(tmp_path / "log.csv")
    assert pairs(tmp_path / "log.csv") == [("1", "2")]
    with zipfile.ZipFile(tmp_path / "shop.zip", "w") as archive:
        archive.mkdir("shop")
        archive.writestr("shop/log.csv", text)
    assert pairs(tmp_path / "shop.zip") == [("u1", "i1")]
    for content, what in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs"),
        ("<!DOCTYPE html><html></html>", "a web page"),
        (b"\x28\xb5\x2f\xfd123", "zstandard"),
    ):
        assert_refused(put(tmp_path / "log.csv", content), what)


def test_messages_stay_short(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", json.dumps([{"user": f"u{k}", "item": f"i{k}"} for k in range(20_000)]))
    with pytest.raises(ValueError, match="found") as caught:
        take(path)
    assert len(str(caught.value)) < 4000


def test_a_separator_belongs_to_the_file_that_has_it(tmp_path: Path) -> None:
    log = put(tmp_path / "log.dat", "u1::r1::5\nu2::r2::4\n")
    given = {"separator": "::", "columns": ("user", "item", "rating")}
    items = [{"item": "r1", "title": "A"}, {"item": "r2", "title": "B"}]
    pl.DataFrame(items).write_parquet(tmp_path / "items.parquet")
    put(tmp_path / "items.jsonl", "\n".join(map(json.dumps, items)))
    put(tmp_path / "items.csv", "item,title\nr1,A\nr2,B\n")
    put(tmp_path / "items.dat", "item::title\nr1::A\nr2::B\n")
    for suffix in ("parquet", "jsonl", "csv", "dat"):
        dataset, _ = take(log, items_file=tmp_path / f"items.{suffix}", **given)
        assert dataset.items["title"].to_list() == ["A", "B"]
    assert_refused(tmp_path / "items.jsonl", "--separator is for delimited text", separator=";")
