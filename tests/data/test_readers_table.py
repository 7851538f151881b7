"""Any table by a mapping of columns: formats, ids, extra columns, images."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import polars as pl
import pytest

from recllm.config import parse_config
from recllm.data.importing import import_dataset
from recllm.data.readers import READERS, ImportOptions, Table
from recllm.errors import DataError

LOG = "user,item,timestamp\n007,12,1600000000\nb,12,1600000001\nb,x/y,1600000002\n"


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(options: Table) -> list[tuple]:
    return import_dataset(options)[0].interactions.select("user", "item", "timestamp").rows()


def test_every_format_gives_the_same(tmp_path: Path) -> None:
    expected = [("007", "12", 1600000000), ("b", "12", 1600000001), ("b", "x/y", 1600000002)]
    records = [dict(zip(("user", "item", "timestamp"), row, strict=True)) for row in expected]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    files = [
        put(tmp_path / "log.csv", LOG),
        put(tmp_path / "log.tsv", LOG.replace(",", "\t")),
        put(tmp_path / "log.csv.gz", gzip.compress(LOG.encode())),
        put(tmp_path / "log.csv.bz2", bz2.compress(LOG.encode())),
        put(tmp_path / "log.csv.xz", lzma.compress(LOG.encode())),
        put(tmp_path / "log.jsonl", lines),
        put(tmp_path / "log.ndjson.gz", gzip.compress(lines.encode())),
        tmp_path / "log.parquet",
    ]
    pl.DataFrame(records).write_parquet(files[-1])
    for place, path in enumerate(files):
        assert rows(Table(path, tmp_path / f"out{place}")) == expected, path.name
    odd = put(tmp_path / "log.dat", LOG.replace(",", "::"))
    assert rows(Table(odd, tmp_path / "odd", separator="::")) == expected
    tabbed = put(tmp_path / "log.txt", LOG.replace(",", "\t"))
    assert rows(Table(tabbed, tmp_path / "tabbed", separator="\\t")) == expected
    with pytest.raises(DataError, match=r"suffix '\.txt' tells no format; expected \.csv"):
        import_dataset(Table(tabbed, tmp_path / "no"))


def test_a_file_without_header_and_with_other_encoding(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "José;1;1600000000\nB;2;1600000001\n".encode("latin-1"))
    options = Table(
        path, tmp_path / "out", columns=("user", "item", "timestamp"), separator=";", encoding="latin-1"
    )
    assert rows(options) == [("José", "1", 1600000000), ("B", "2", 1600000001)]


def test_columns_are_mapped_and_the_others_kept(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "uid,sku,when,stars,words,user,price\nu1,i1,2020-01-02,4,fine,Ann,9.5\n")
    options = Table(
        path, tmp_path / "out", user="uid", item="sku", timestamp="when", rating="stars", review="words"
    )
    dataset, _ = import_dataset(options)
    assert dataset.interactions.row(0, named=True) == {
        "user": "u1",
        "item": "i1",
        "timestamp": 1577923200,
        "rating": 4.0,
        "review": "fine",
        "user_source": "Ann",
        "price": "9.5",
    }


def test_no_times_unless_a_column_is_named_timestamp(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item,time\nu1,i1,1600000000\n")
    dataset, _ = import_dataset(Table(path, tmp_path / "out"))
    assert not dataset.has_timestamps and dataset.interactions["time"].to_list() == ["1600000000"]
    dataset, _ = import_dataset(Table(path, tmp_path / "timed", timestamp="time"))
    assert dataset.interactions["timestamp"].to_list() == [1600000000]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "uid"}, "missing column 'uid'; found: user, item, timestamp"),
        ({"rating": "stars"}, "missing column 'stars'; found: user, item, timestamp"),
        ({"user": "item", "item": "item"}, "name the same column 'item'"),
        ({"image_pattern": "{item}.jpg"}, "starts at the folder --images"),
        ({"image_column": "path"}, "give both"),
        ({"encoding": "latin-99"}, "'latin-99' is no encoding"),
        ({"quote": "''"}, "is not one character"),
        ({"items_file": Path("no.csv")}, r"no\.csv: no such file"),
        ({"images": Path("nowhere")}, "--images nowhere is not a folder"),
    ],
)
def test_options_that_do_not_fit_are_explained(tmp_path: Path, changes: dict, message: str) -> None:
    path = put(tmp_path / "log.csv", LOG)
    with pytest.raises(DataError, match=message):
        import_dataset(Table(path, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_numbers_and_texts_are_one_id(tmp_path: Path) -> None:
    """Ids are text in the CSV, floats with a null in one parquet, integers in the other; all must meet."""
    log = put(tmp_path / "log.csv", "user,item\nu1,12\nu1,7\nu2,12.0\n".replace("12.0", "12"))
    floats = tmp_path / "floats.parquet"
    pl.DataFrame({"item": [12.0, 7.0, None], "title": ["twelve", "seven", "none"]}).write_parquet(floats)
    dataset, findings = import_dataset(Table(log, tmp_path / "a", items_file=floats))
    assert dataset.items.select("item", "title").rows() == [("12", "twelve"), ("7", "seven")]
    assert findings.left_out == {"rows of floats.parquet without item id": 1}

    written = put(tmp_path / "items.csv", "item,title\n12.0,twelve\n7.0,seven\n")
    dataset, findings = import_dataset(Table(log, tmp_path / "b", items_file=written))
    assert dataset.items.select("item", "title").rows() == [("12", "twelve"), ("7", "seven")]
    assert any("whole numbers written with '.0'" in note for note in findings.notes)

    numbers = put(tmp_path / "items.jsonl", '{"item": 12, "title": "twelve"}\n{"item": "7", "title": 7}\n')
    dataset, _ = import_dataset(Table(log, tmp_path / "c", items_file=numbers))
    assert dataset.items.select("item", "title").rows() == [("12", "twelve"), ("7", "7")]

    integers = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1, 2], "item": pl.Series([12, 7], dtype=pl.UInt64)}).write_parquet(integers)
    dataset, _ = import_dataset(Table(integers, tmp_path / "d", items_file=floats))
    assert dataset.items["title"].to_list() == ["twelve", "seven"]
    assert dataset.users["user"].to_list() == ["1", "2"]


def test_leading_zeros_and_long_numbers_stay(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item\n007,123456789012345678901234567890\n7,1e3\n")
    dataset, _ = import_dataset(Table(path, tmp_path / "out"))
    assert dataset.interactions.select("user", "item").rows() == [
        ("007", "123456789012345678901234567890"),
        ("7", "1e3"),
    ]


def test_ids_that_nowhere_meet_are_an_error(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user,item\nu1,12\n")
    items = put(tmp_path / "items.csv", "item,title\nB00012,twelve\n")
    with pytest.raises(
        DataError, match=r"no item id of log\.csv \(such as '12'\) is in items\.csv \(such as 'B00012'\)"
    ):
        import_dataset(Table(log, tmp_path / "out", items_file=items))


def test_items_table_with_categories_and_extras(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user,sku\nu1,a\nu1,b\n")
    items = put(
        tmp_path / "items.csv",
        'sku,name,about,tags,price,item\na,"Mug, red",Holds tea,home; kitchen;;,4.50,x\n'
        "b,Lamp,,,,y\nc,Unsold,,,1,z\n",
    )
    options = Table(
        log,
        tmp_path / "out",
        item="sku",
        items_file=items,
        title="name",
        text="about",
        categories="tags",
        category_separator=";",
    )
    dataset, _ = import_dataset(options)
    first, second, third = dataset.items.iter_rows(named=True)
    assert (first["title"], first["text"], first["categories"]) == (
        "Mug, red",
        "Holds tea",
        ["home", "kitchen"],
    )
    assert (first["price"], first["item_source"]) == ("4.50", "x")
    assert (second["title"], second["text"], second["categories"]) == ("Lamp", "", [])
    assert third["item"] == "c", "an item without interactions stays in the catalog"
    with pytest.raises(DataError, match="missing column 'label'; found: sku, name, about, tags, price, item"):
        import_dataset(Table(log, tmp_path / "no", item="sku", items_file=items, title="label"))


def test_lists_and_objects_of_json_lines_are_kept(tmp_path: Path) -> None:
    log = put(tmp_path / "log.jsonl", '{"user": "u", "item": "a", "context": {"page": [1]}, "n": 1}\n')
    items = put(
        tmp_path / "items.jsonl",
        '{"item": "a", "categories": ["x", 2, null], "text": ["one", "two"], "size": {"w": 1}, "ok": true, '
        '"mix": 1}\n{"item": "b", "categories": null, "late": 1.5, "mix": "m"}\n',
    )
    dataset, _ = import_dataset(Table(log, tmp_path / "out", items_file=items))
    first, second = dataset.items.iter_rows(named=True)
    assert (first["categories"], first["text"]) == (["x", "2"], "one\ntwo")
    assert (first["size"], first["ok"], first["mix"], first["late"]) == ('{"w":1}', True, "1", None)
    assert (second["categories"], second["late"], second["mix"]) == ([], 1.5, "m")
    assert dataset.interactions["context"].to_list() == ['{"page":[1]}']


def test_nested_columns_are_refused_where_single_values_belong(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": [["a"]], "item": ["b"]}).write_parquet(path)
    with pytest.raises(
        DataError, match=r"column for 'user' is of type List\(String\); expected single values"
    ):
        import_dataset(Table(path, tmp_path / "out"))
    log = put(tmp_path / "log.csv", "user,item\nu,b\n")
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item": ["b"], "title": [{"en": "x"}]}).write_parquet(items)
    with pytest.raises(DataError, match="column 'title' is of type Struct"):
        import_dataset(Table(log, tmp_path / "out", items_file=items))


def test_images_by_name_by_pattern_and_by_column(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user,item\nu,12\nu,b\nu,c\n")
    images = tmp_path / "pictures"
    for name in ("12.jpg", "b_0.png", "b_1.png", "12/cover.jpg", "b/cover.jpg", "sub/c.webp"):
        put(images / name, b"pixels of " + name.encode())
    by_name, _ = import_dataset(Table(log, tmp_path / "name", images=images))
    assert dict(by_name.items.select("item", "images").rows()) == {
        "12": ["images/12.jpg"],
        "b": ["images/b_0.png", "images/b_1.png"],
        "c": ["images/sub/c.webp"],
    }
    by_pattern, _ = import_dataset(
        Table(log, tmp_path / "pattern", images=images, image_pattern="{item}/cover.jpg")
    )
    assert by_pattern.items["images"].to_list() == [["images/12/cover.jpg"], ["images/b/cover.jpg"], []]
    items = put(tmp_path / "items.csv", "item,path\n12,12.jpg|12/cover.jpg\nb,b_0.png\nc,sub/c.webp\n")
    by_column, _ = import_dataset(
        Table(log, tmp_path / "column", items_file=items, images=images, image_column="path")
    )
    assert by_column.items["images"].to_list() == [
        ["images/12.jpg", "images/12/cover.jpg"],
        ["images/b_0.png"],
        ["images/sub/c.webp"],
    ]
    assert (tmp_path / "column" / "images/sub/c.webp").read_bytes() == b"pixels of sub/c.webp"
    lists = tmp_path / "items.parquet"
    pl.DataFrame({"item": [12], "photos": [["12.jpg", "b_0.png"]], "title": ["t"]}).write_parquet(lists)
    by_list, _ = import_dataset(
        Table(log, tmp_path / "list", items_file=lists, images=images, image_column="photos")
    )
    assert by_list.items["images"].to_list() == [["images/12.jpg", "images/b_0.png"], [], []]


def test_linked_images_share_their_bytes(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "user,item\nu,12\n")
    source = put(tmp_path / "images" / "12.jpg", b"pixels")
    import_dataset(Table(log, tmp_path / "out", images=source.parent, link_images=True))
    assert (tmp_path / "out" / "images" / "12.jpg").stat().st_ino == source.stat().st_ino


def test_users_file(tmp_path: Path) -> None:
    log = put(tmp_path / "log.csv", "uid,item\n1,a\n2,a\n")
    users = put(tmp_path / "users.tsv", "uid\tage\n2\t30\n3\t40\n")
    dataset, _ = import_dataset(Table(log, tmp_path / "out", user="uid", users_file=users))
    assert dataset.users.rows() == [("1", None), ("2", "30")]


def test_dates_in_the_usual_forms_are_utc_seconds(tmp_path: Path) -> None:
    forms = {
        "2018-07-07 22:09:11": 1531001351,
        "2018-07-07T22:09:11Z": 1531001351,
        "2018-07-07T22:09:11.250": 1531001351,
        "2018-07-08T00:09:11+02:00": 1531001351,
        "2018-07-07": 1530921600,
        "07 7, 2018": 1530921600,
        "1531001351": 1531001351,
        "1531001351.9": 1531001351,
        "1531001351250": 1531001351,
        "1531001351250000": 1531001351,
        "1531001351250000000": 1531001351,
        "-3600": -3600,
    }
    for place, (text, seconds) in enumerate(forms.items()):
        path = put(tmp_path / "log.csv", f'user,item,timestamp\nu,a,"{text}"\n')
        assert rows(Table(path, tmp_path / str(place))) == [("u", "a", seconds)], text
    for place, dtype in enumerate((pl.Date(), pl.Datetime("ms"), pl.Datetime("us", "Asia/Tokyo"))):
        frame = pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": [1530921600]})
        time = pl.from_epoch("timestamp", "s")
        time = time.dt.replace_time_zone("UTC").cast(dtype) if place == 2 else time.cast(dtype)
        frame.with_columns(time).write_parquet(tmp_path / "log.parquet")
        assert rows(Table(tmp_path / "log.parquet", tmp_path / f"p{place}")) == [("u", "a", 1530921600)], (
            dtype
        )


def test_a_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": ["u"] * 1000, "item": [str(row) for row in range(1000)]}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"log\.parquet is no parquet file, or cut short"):
        import_dataset(Table(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_paths_with_glob_characters_are_plain_paths(tmp_path: Path) -> None:
    folder = tmp_path / "run [1] *"
    path = put(folder / "log [a].csv", LOG)
    dataset, _ = import_dataset(Table(path, folder / "out [2]"))
    assert len(dataset.interactions) == 3


@pytest.mark.parametrize("name", sorted(READERS))
def test_every_reader_has_flags_with_help(name: str) -> None:
    reader = READERS[name]
    assert issubclass(reader, ImportOptions) and reader.__doc__
    options = parse_config(reader, ["in", "out", "--strict", "--duplicates", "last"])
    assert options.source == Path("in") and options.strict and options.duplicates == "last"
