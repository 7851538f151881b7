"""Amazon reviews of three generations, each line as its authors wrote it."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import polars as pl
import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import Amazon
from recllm.data.readers.amazon import find_metadata
from recllm.errors import DataError

R2014 = [
    '{"reviewerID": "A2IBPI20UZIR0U", "asin": "1384719342", "reviewerName": "cassandra tu \\"Yeah, well\\"", '
    '"helpful": [13, 14], "reviewText": "Not much to write about here", "overall": 5.0, "summary": "good", '
    '"unixReviewTime": 1393545600, "reviewTime": "02 28, 2014"}',
    '{"reviewerID": "A14VAT5EAX3D9S", "asin": "B00004Y2UT", "helpful": [0, 0], "reviewText": "", '
    '"overall": 3.0, "summary": "Jake", "unixReviewTime": 1363392000, "reviewTime": "03 16, 2013"}',
]
M2014 = [
    "{'asin': '1384719342', "
    "'categories': [['Musical Instruments', 'Microphones'], ['Musical Instruments', 'Stands']], "
    "'title': \"Pop Filter 6\\\"\", 'description': 'It\\'s a \\\"filter\\\" &amp; more', "
    "'imUrl': 'http://ecx.images-amazon.com/images/I/41.jpg', 'brand': '', 'price': 9.95, "
    "'salesRank': {'Musical Instruments': 123}, 'related': {'also_bought': ['B1']}}",
    "{'asin': 'B00004Y2UT', 'title': 'Cable'}",
    "{'asin': 'B000UNUSED', 'title': 'Nobody reviewed it'}",
]
R2018 = {
    "overall": 4.0,
    "vote": "1,234",
    "verified": True,
    "reviewTime": "09 4, 2015",
    "reviewerID": "ALJ66O1Y6SLHA",
    "asin": "B000K2PJ4K",
    "style": {"Size:": " Big Boys"},
    "reviewerName": "Tonya B.",
    "reviewText": "Great <br /> product",
    "summary": "Five Stars",
    "unixReviewTime": 1441324800,
    "image": ["https://images-na.ssl-images-amazon.com/images/I/71.jpg"],
}
M2018 = {
    "category": ["Clothing", "Boys"],
    "tech1": "",
    "description": ["A shirt.", ""],
    "title": "Shirt",
    "also_buy": ["B01"],
    "feature": ["Cotton", "Cotton", "Washable"],
    "rank": [],
    "details": {"ASIN: ": "B000K2PJ4K"},
    "main_cat": "Clothing",
    "price": "$8.99 - $12.99",
    "brand": "Tonka",
    "asin": "B000K2PJ4K",
    "imageURL": ["https://i/US40.jpg"],
    "imageURLHighRes": ["https://i/full.jpg"],
}
R2023 = {
    "rating": 5.0,
    "title": "Such a lovely scent",
    "text": "This spray is really nice.",
    "images": [
        {
            "small_image_url": "https://i/s.jpg",
            "large_image_url": "https://i/l.jpg",
            "attachment_type": "IMAGE",
        }
    ],
    "asin": "B00YQ6X8EO",
    "parent_asin": "B00PARENT1",
    "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923,
    "helpful_vote": 2,
    "verified_purchase": True,
}
M2023 = {
    "main_category": "All Beauty",
    "title": "Howard LC0008 Leather Conditioner",
    "average_rating": 4.8,
    "rating_number": 10,
    "features": ["Soft", "Shiny"],
    "description": ["Conditions leather."],
    "price": 12.5,
    "images": [
        {"thumb": "https://t1", "large": "https://l1", "variant": "MAIN", "hi_res": None},
        {"thumb": "https://t2", "large": "https://l2", "variant": "PT01", "hi_res": "https://h2"},
    ],
    "videos": [],
    "store": "Howard Products",
    "categories": ["Beauty", "Care"],
    "details": {"Package Dimensions": "7 x 2 inches"},
    "parent_asin": "B00PARENT1",
    "bought_together": None,
}


def write_lines(path: Path, lines: list[str | dict]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_2014_metadata_are_python_literals(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "reviews_Musical_Instruments_5.json.gz", R2014)
    write_lines(tmp_path / "meta_Musical_Instruments.json.gz", M2014)
    dataset, findings = import_dataset(Amazon(source, tmp_path / "out"))
    first, second = dataset.interactions.iter_rows(named=True)
    assert (first["user"], first["item"]) == ("A2IBPI20UZIR0U", "1384719342")
    assert (first["timestamp"], first["rating"], first["helpful"]) == (1393545600, 5.0, 13)
    assert (first["review"], first["summary"]) == ("Not much to write about here", "good")
    assert second["review"] is None, "an empty review is none"
    items = {row["item"]: row for row in dataset.items.iter_rows(named=True)}
    assert items["1384719342"]["title"] == 'Pop Filter 6"'
    assert items["1384719342"]["text"] == 'It\'s a "filter" &amp; more'
    assert items["1384719342"]["categories"] == ["Musical Instruments", "Microphones", "Stands"]
    assert items["1384719342"]["image_urls"] == ["http://ecx.images-amazon.com/images/I/41.jpg"]
    assert items["1384719342"]["price"] == "9.95"
    assert set(items) == {"1384719342", "B00004Y2UT"}
    assert any("1 of 3 lines" in note for note in findings.notes)
    assert dataset.manifest["source"]["generation"] == "2014"
    everything, _ = import_dataset(Amazon(source, tmp_path / "all", all_items=True))
    assert "B000UNUSED" in everything.items["item"]


def test_literals_are_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    lines = [
        *M2014,
        f"__import__('pathlib').Path({str(marker)!r}).touch()",
        "{'asin': 'B000UNUSED', 'title': '\\ud800'}",
        "[" * 3000,
        "{'asin': 'B000UNUSED', 'title': f'{1}'}",
    ]
    source = write_lines(tmp_path / "reviews_X.json.gz", R2014)
    write_lines(tmp_path / "meta_X.json.gz", lines)
    dataset, findings = import_dataset(Amazon(source, tmp_path / "out"))
    assert not marker.exists()
    assert len(dataset.items) == 2
    assert findings.left_out == {"malformed lines in meta_X.json.gz": 3}
    assert [example.split(":")[0] for example in findings.examples["malformed lines in meta_X.json.gz"]] == [
        f"meta_X.json.gz, line {line}" for line in (4, 6, 7)
    ]


def test_2014_fields_as_csv_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "Musical_instruments_reviews.csv.zip", "w") as archive:
        archive.writestr(
            "Musical_instruments_reviews.csv",
            "reviewerID,asin,reviewerName,helpful,reviewText,overall,summary,unixReviewTime,reviewTime\n"
            'A2IB,1384719342,"cassandra ""Yeah, well""","[13, 14]","Two\nlines",'
            '5.0,good,1393545600,"02 28, 2014"\n'
            'A14V,1384719342,Jake,"[0, 0]",,4.0,Jake,1363392000,"03 16, 2013"\n',
        )
        archive.writestr("__MACOSX/._Musical_instruments_reviews.csv", b"\x00\x05")
    dataset, findings = import_dataset(
        Amazon(tmp_path / "Musical_instruments_reviews.csv.zip", tmp_path / "out")
    )
    rows = dataset.interactions.select(
        "user", "item", "timestamp", "rating", "review", "summary", "helpful"
    ).rows()
    assert rows == [
        ("A2IB", "1384719342", 1393545600, 5.0, "Two\nlines", "good", 13),
        ("A14V", "1384719342", 1363392000, 4.0, None, "Jake", 0),
    ]
    assert not findings.left_out


def test_2018_lists_votes_and_repeated_lines(tmp_path: Path) -> None:
    dated = {**R2018, "reviewerID": "A2", "reviewText": None}
    del dated["unixReviewTime"]
    source = write_lines(tmp_path / "AMAZON_FASHION_5.json.gz", [R2018, R2018, dated])
    write_lines(tmp_path / "meta_AMAZON_FASHION.json.gz", [M2018, M2018])
    dataset, findings = import_dataset(Amazon(source, tmp_path / "out"))
    first, second = dataset.interactions.iter_rows(named=True)
    assert (first["helpful"], first["verified"], first["style"]) == (1234, True, '{"Size:":" Big Boys"}')
    assert first["review"] == "Great <br /> product", "HTML stays as it is"
    assert second["timestamp"] == 1441324800, "reviewTime stands in for a missing unixReviewTime"
    assert second["review"] is None
    item = dataset.items.row(0, named=True)
    assert item["text"] == "A shirt.\nCotton\nWashable"
    assert (item["categories"], item["price"], item["brand"]) == (
        ["Clothing", "Boys"],
        "$8.99 - $12.99",
        "Tonka",
    )
    assert item["image_urls"] == ["https://i/full.jpg"], "the addresses of the larger images"
    assert not {"also_buy", "rank"} & set(dataset.items.columns)
    assert findings.left_out == {"repeated (user, item) pairs (the first in time counts)": 1}
    assert any("repeats 1 items" in note for note in findings.notes)
    strict, _ = import_dataset(Amazon(source, tmp_path / "strict", strict=True))
    assert len(strict.interactions) == 2, "repeated lines are no fault"


def test_2023_jsonl_and_parquet_give_the_same(tmp_path: Path) -> None:
    other = {
        **R2023,
        "asin": "B00VARIANT",
        "user_id": "U2",
        "timestamp": 1588687728000,
        "text": "",
        "images": [],
    }
    plain = write_lines(tmp_path / "All_Beauty.jsonl", [R2023, other])
    write_lines(tmp_path / "meta_All_Beauty.jsonl.gz", [M2023])
    dataset, findings = import_dataset(Amazon(plain, tmp_path / "out"))
    first, second = dataset.interactions.iter_rows(named=True)
    assert (first["item"], first["asin"], first["timestamp"]) == ("B00PARENT1", "B00YQ6X8EO", 1588687728)
    assert (first["helpful"], first["verified"], first["image_urls"]) == (2, True, ["https://i/l.jpg"])
    assert second["review"] is None and second["image_urls"] is None
    item = dataset.items.row(0, named=True)
    assert item["text"] == "Conditions leather.\nSoft\nShiny"
    assert item["image_urls"] == ["https://l1", "https://h2"]
    assert (item["store"], item["main_category"], item["price"]) == ("Howard Products", "All Beauty", "12.5")
    assert "average_rating" not in dataset.items.columns, "a mean over later reviews"
    assert any("are in ms" in note for note in findings.notes)

    folder = tmp_path / "parquet"
    folder.mkdir()
    pl.DataFrame([R2023, other]).write_parquet(folder / "All_Beauty.parquet")
    lists = {
        name: [image[name] for image in M2023["images"]] for name in ("hi_res", "large", "thumb", "variant")
    }
    meta = {**M2023, "images": lists, "details": json.dumps(M2023["details"], separators=(",", ":"))}
    pl.DataFrame([meta]).write_parquet(folder / "meta_All_Beauty.parquet")
    again, _ = import_dataset(Amazon(folder / "All_Beauty.parquet", tmp_path / "out2"))
    assert again.interactions.equals(dataset.interactions)
    assert again.items.equals(dataset.items)


def test_2023_variants_get_the_title_of_their_parent(tmp_path: Path) -> None:
    other = {**R2023, "asin": "B00VARIANT", "user_id": "U2"}
    source = write_lines(tmp_path / "All_Beauty.jsonl.gz", [R2023, other])
    metadata = write_lines(tmp_path / "elsewhere.jsonl.gz", [M2023])
    dataset, _ = import_dataset(Amazon(source, tmp_path / "out", metadata=metadata, variants=True))
    assert dataset.items.select("item", "title", "parent_asin").rows() == [
        ("B00VARIANT", M2023["title"], "B00PARENT1"),
        ("B00YQ6X8EO", M2023["title"], "B00PARENT1"),
    ]
    old = write_lines(tmp_path / "old.json.gz", R2014)
    with pytest.raises(DataError, match="--variants is for the files of 2023"):
        import_dataset(Amazon(old, tmp_path / "no", variants=True))


def test_local_images_go_by_item_id(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "All_Beauty.jsonl.gz", [R2023])
    write_lines(tmp_path / "meta_All_Beauty.jsonl.gz", [M2023])
    (tmp_path / "images").mkdir()
    for name in ("B00PARENT1_0.jpg", "B00PARENT1_1.jpg", "B00PARENT1x.jpg"):
        (tmp_path / "images" / name).write_bytes(b"x")
    dataset, _ = import_dataset(Amazon(source, tmp_path / "out", images=tmp_path / "images"))
    assert dataset.items["images"].to_list() == [["images/B00PARENT1_0.jpg", "images/B00PARENT1_1.jpg"]]


def test_lines_that_lack_a_field_or_have_another_type_are_counted(tmp_path: Path) -> None:
    lines = [
        R2018,
        {"overall": 5.0, "asin": "B1"},
        {**R2018, "overall": "five"},
        {**R2018, "reviewerID": ["A"]},
        '{"reviewerID": "A',
        "17",
        '{"reviewerID": "A", "asin": "B", "overall": NaN}',
        '{"reviewerID": "\\ud800", "asin": "B"}',
        {**R2018, "reviewerID": "late", "unixReviewTime": "soon", "reviewTime": "09 4, 2015"},
    ]
    source = write_lines(tmp_path / "X_5.json.gz", lines)
    dataset, findings = import_dataset(Amazon(source, tmp_path / "out"))
    assert len(dataset.interactions) == 3
    assert findings.left_out["malformed lines in X_5.json.gz"] == 5
    assert findings.kept["fields of X_5.json.gz that cannot be read"] == 2
    assert "X_5.json.gz, line 3: overall 'five'" in str(findings.examples)
    shown = findings.examples["malformed lines in X_5.json.gz"]
    assert len(shown) == 5 and shown[0].startswith("X_5.json.gz, line 2: no field 'reviewerID'")
    with pytest.raises(DataError, match="line 2: no field 'reviewerID'"):
        import_dataset(Amazon(source, tmp_path / "strict", strict=True))
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("reviews", "metadata"),
    [
        ("reviews_Baby_5.json.gz", "meta_Baby.json.gz"),
        ("Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz"),
        ("Gift_Cards.json.gz", "meta_Gift_Cards.json"),
        ("Musical_instruments_reviews.csv.zip", "meta_Musical_Instruments.json.gz"),
        ("raw/review_categories/All_Beauty.jsonl", "raw/meta_categories/meta_All_Beauty.jsonl"),
    ],
)
def test_metadata_are_found_by_name(tmp_path: Path, reviews: str, metadata: str) -> None:
    for name in (reviews, metadata, "meta_Other.json.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_metadata(tmp_path / reviews) == tmp_path / metadata


def test_what_cannot_be_found_is_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "X_5.json.gz", [R2018])
    with pytest.raises(DataError, match=r"Y_5\.json\.gz: no such file; .*holds: X_5\.json\.gz"):
        import_dataset(Amazon(tmp_path / "Y_5.json.gz", tmp_path / "out"))
    with pytest.raises(DataError, match=r"is a folder; give the review file in it"):
        import_dataset(Amazon(tmp_path, tmp_path / "out"))
    other = write_lines(tmp_path / "meta_Other.json.gz", [M2014[1]])
    with pytest.raises(DataError, match=r"has no item of X_5\.json\.gz.*B000K2PJ4K"):
        import_dataset(Amazon(source, tmp_path / "out", metadata=other))
    (tmp_path / "ratings.csv").write_text("A1,B1,5.0,1393545600\n")
    with pytest.raises(DataError, match="no column reviewerID or user_id; found: A1, B1"):
        import_dataset(Amazon(tmp_path / "ratings.csv", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
