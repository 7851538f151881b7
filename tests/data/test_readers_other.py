"""MicroLens, Yelp, RecBole, id sequences and pre-split pairs, each file as its source has it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import ItemSequences, MicroLens, PreSplit, RecBole, Yelp
from recllm.errors import DataError


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def microlens(folder: Path) -> Path:
    put(
        folder / "MicroLens-50k_pairs.csv",
        "user,item,timestamp\n36121,9580,1583378629552\n35702,9580,1583436719018\n",
    )
    put(
        folder / "MicroLens-50k_titles.csv",
        'item,title\n9580,"TASTIEST, spiciest rice"\n1,Not watched #fyp\n',
    )
    put(folder / "MicroLens-50k_likes_and_views.txt", "9580\t21000\t1037000\n1\t34000\t2100000\n")
    put(folder / "MicroLens-50k_covers" / "9580.jpg", b"cover")
    put(folder / "MicroLens-50k_covers" / "5.jpg", b"cover")
    put(folder / "readme.txt", "hello")
    return folder


def test_microlens_pairs_titles_and_covers(tmp_path: Path) -> None:
    folder = microlens(tmp_path / "ml50k")
    dataset, findings = import_dataset(MicroLens(folder, tmp_path / "out"))
    assert dataset.interactions.select("user", "item", "timestamp").rows() == [
        ("36121", "9580", 1583378629),
        ("35702", "9580", 1583436719),
    ]
    assert any("are in ms" in note for note in findings.notes)
    items = {row["item"]: row for row in dataset.items.iter_rows(named=True)}
    assert items["9580"]["title"] == "TASTIEST, spiciest rice"
    assert items["9580"]["images"] == ["images/9580.jpg"]
    assert (items["9580"]["likes"], items["9580"]["views"]) == (21000, 1037000)
    assert items["1"]["images"] == []


def test_microlens_sequences_and_titles_without_header_or_quotes(tmp_path: Path) -> None:
    folder = tmp_path / "ml100k"
    put(folder / "MicroLens-100k_pairs.tsv", "1\t2 3 1\n2\t3 1\n")
    put(folder / "MicroLens-100k_title_en.csv", "1,One, two, three\n2,Plain\n3,\n")
    put(folder / "tags_to_summary.csv", "1,food\n3,pets\n")
    put(folder / "MicroLens-100k_covers" / "MicroLens-100k_covers" / "2.jpg", b"cover")
    dataset, findings = import_dataset(MicroLens(folder, tmp_path / "out"))
    assert dataset.interactions.select("user", "item").rows() == [
        ("1", "2"),
        ("1", "3"),
        ("1", "1"),
        ("2", "3"),
        ("2", "1"),
    ]
    assert not dataset.has_timestamps and dataset.manifest["source"]["order"] == "time"
    assert dataset.items.select("item", "title", "categories", "images").rows() == [
        ("1", "One, two, three", ["food"], []),
        ("2", "Plain", [], ["images/2.jpg"]),
        ("3", "", ["pets"], []),
    ]
    assert not findings.left_out
    (folder / "MicroLens-100k_pairs.tsv").unlink()
    with pytest.raises(
        DataError, match=r"no MicroLens pairs file .*holds: MicroLens-100k_covers, MicroLens-100k_title"
    ):
        import_dataset(MicroLens(folder, tmp_path / "no"))


BUSINESS = {
    "business_id": "Pns2l4eNsfO8kk83dixA6A",
    "name": "Abby Rappoport, LAC, CMQ",
    "address": "1616 Chapala St, Ste 2",
    "city": "Santa Barbara",
    "state": "CA",
    "postal_code": "93101",
    "latitude": 34.4266787,
    "longitude": -119.7111968,
    "stars": 5.0,
    "review_count": 7,
    "is_open": 0,
    "attributes": {"ByAppointmentOnly": "True"},
    "categories": "Doctors, Traditional Chinese Medicine, Health & Medical",
    "hours": None,
}
REVIEW = {
    "review_id": "KU_O5udG6zpxOg-VcAEodg",
    "user_id": "mh_-eMZ6K5RLWhZyISBhwA",
    "business_id": "Pns2l4eNsfO8kk83dixA6A",
    "stars": 3.0,
    "useful": 1,
    "funny": 0,
    "cool": 2,
    "text": "If you decide to eat here,\njust be aware",
    "date": "2018-07-07 22:09:11",
}


def yelp(folder: Path) -> Path:
    def lines(name: str, objects: list[dict]) -> None:
        put(folder / name, "".join(json.dumps(entry) + "\n" for entry in objects))

    bare = {"business_id": "bare", "name": "Bare", "categories": None}
    lines("yelp_academic_dataset_business.json", [BUSINESS, bare])
    lines(
        "yelp_academic_dataset_review.json",
        [REVIEW, {**REVIEW, "business_id": "bare", "date": "2018-07-08 00:00:00"}],
    )
    user = {
        "user_id": REVIEW["user_id"],
        "name": "Walker",
        "review_count": 5,
        "yelping_since": "2007-01-25 16:47:26",
    }
    lines("yelp_academic_dataset_user.json", [{**user, "friends": "a, b"}])
    photo = {"business_id": "bare", "caption": "Nice rock", "label": "inside"}
    ids = ["zsvj7vloL4L5jhYyPIuVwg", "second", "gone", "../../escape", "empty"]
    lines(
        "photos.json",
        [{"photo_id": name, **photo, "label": "food" if name == "second" else "inside"} for name in ids],
    )
    put(folder / "photos" / "zsvj7vloL4L5jhYyPIuVwg.jpg", b"1")
    put(folder / "photos" / "second.jpg", b"2")
    put(folder / "photos" / "empty.jpg", b"")
    put(folder.parent / "escape.jpg", b"outside")
    return folder


def test_yelp_with_photos(tmp_path: Path) -> None:
    folder = yelp(tmp_path / "deep" / "yelp")
    dataset, findings = import_dataset(Yelp(folder, tmp_path / "out"))
    first, second = dataset.interactions.iter_rows(named=True)
    assert (first["timestamp"], first["rating"]) == (1531001351, 3.0)
    assert first["review"] == "If you decide to eat here,\njust be aware"
    assert (first["useful"], first["cool"]) == (1, 2) and second["item"] == "bare"
    items = {row["item"]: row for row in dataset.items.iter_rows(named=True)}
    item = items[BUSINESS["business_id"]]
    assert item["categories"] == ["Doctors", "Traditional Chinese Medicine", "Health & Medical"]
    assert (item["title"], item["text"], item["city"], item["stars"]) == (
        BUSINESS["name"],
        "",
        "Santa Barbara",
        5.0,
    )
    assert items["bare"]["categories"] == []
    assert items["bare"]["images"] == ["images/zsvj7vloL4L5jhYyPIuVwg.jpg", "images/second.jpg"]
    assert items["bare"]["photo_captions"] == ["Nice rock", "Nice rock"]
    assert items["bare"]["photo_labels"] == ["inside", "food"]
    assert dataset.users.rows() == [(REVIEW["user_id"], "Walker", "2007-01-25 16:47:26")]
    assert findings.left_out == {
        "image paths that leave the image folder": 1,
        "image files that are missing or empty": 2,
    }
    food, _ = import_dataset(Yelp(folder, tmp_path / "food", photo_labels=("food",)))
    assert food.items.filter(item="bare")["images"][0].to_list() == ["images/second.jpg"]
    one, _ = import_dataset(Yelp(folder, tmp_path / "one", max_photos=1))
    assert one.items.filter(item="bare")["photo_labels"][0].to_list() == ["inside"]


def test_yelp_without_photos_or_users(tmp_path: Path) -> None:
    folder = yelp(tmp_path / "yelp")
    for name in ("yelp_academic_dataset_user.json", "photos.json"):
        (folder / name).unlink()
    dataset, _ = import_dataset(Yelp(folder, tmp_path / "out"))
    assert dataset.users.columns == ["user"] and dataset.manifest["counts"]["images"] == 0
    with pytest.raises(DataError, match=r"--photos needs photos\.json"):
        import_dataset(Yelp(folder, tmp_path / "no", photos=folder / "photos"))
    (folder / "yelp_academic_dataset_business.json").unlink()
    with pytest.raises(
        DataError, match=r"no Yelp business file .*holds: photos, yelp_academic_dataset_review\.json"
    ):
        import_dataset(Yelp(folder, tmp_path / "no"))


def recbole(folder: Path) -> Path:
    put(
        folder / "ml-100k.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "196\t242\t3\t881250949\n186\t302\t3\t891717742\n22\t377\t1\t878887116\n",
    )
    put(
        folder / "ml-100k.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tscore:float\tvector:float_seq\n"
        '242\tKolya "the boy\t1996\tComedy\t1.5\t0.5 -1 2e3\n'
        "302\tL.A. Confidential\t1997\tCrime Film-Noir Mystery Thriller\t\t\n"
        "377\tHeavyweights\t1994\tChildren's Comedy\tn/a\t1\n",
    )
    put(
        folder / "ml-100k.user",
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n196\t49\tM\twriter\t05105\n",
    )
    return folder


def test_recbole_atomic_files(tmp_path: Path) -> None:
    folder = recbole(tmp_path / "ml-100k")
    dataset, findings = import_dataset(RecBole(folder, tmp_path / "out"))
    assert dataset.interactions.select("user", "item", "timestamp", "rating").rows() == [
        ("196", "242", 881250949, 3.0),
        ("186", "302", 891717742, 3.0),
        ("22", "377", 878887116, 1.0),
    ]
    items = {row["item"]: row for row in dataset.items.iter_rows(named=True)}
    assert items["242"]["title"] == 'Kolya "the boy', "there are no quotes in this format"
    assert items["302"]["categories"] == ["Crime", "Film-Noir", "Mystery", "Thriller"]
    assert (items["242"]["release_year"], items["242"]["vector"]) == ("1996", [0.5, -1.0, 2000.0])
    assert items["377"]["score"] == "n/a", "a float field with other values stays text"
    assert dataset.users.filter(user="196")["zip_code"][0] == "05105"
    assert not findings.left_out


def test_recbole_options_and_separators(tmp_path: Path) -> None:
    folder = tmp_path / "anime"
    put(
        folder / "anime.inter",
        "uid:token\tiid:token\twhen:float\textra:float\ttags:token_seq\n1\t20\t881250949\t2.5\ta b\n",
    )
    put(
        folder / "anime.item",
        "iid:token\tlabel:token_seq\tkinds:token_seq\n20\tKimi no Na wa.\tDrama, School\n",
    )
    options = RecBole(
        folder,
        tmp_path / "out",
        user="uid",
        item="iid",
        timestamp="when",
        title="label",
        categories="kinds",
        sequence_separator=", ",
    )
    dataset, _ = import_dataset(options)
    assert dataset.interactions.row(0, named=True) == {
        "user": "1",
        "item": "20",
        "timestamp": 881250949,
        "rating": None,
        "review": None,
        "extra": 2.5,
        "tags": ["a b"],
    }
    assert dataset.items.row(0)[:4] == ("20", "Kimi no Na wa.", "", ["Drama", "School"])


def test_recbole_errors_name_what_was_found(tmp_path: Path) -> None:
    folder = recbole(tmp_path / "ml-100k")
    put(folder / "plain.inter", "userID\titemID\tx_label\n1\t2\t0\n")
    with pytest.raises(
        DataError, match=r"several \.inter files \(ml-100k\.inter, plain\.inter\); give the one"
    ):
        import_dataset(RecBole(folder, tmp_path / "out"))
    with pytest.raises(DataError, match=r"`name:type`.*found: userID, itemID, x_label"):
        import_dataset(RecBole(folder / "plain.inter", tmp_path / "out"))
    with pytest.raises(DataError, match="missing column 'uid'; found: user_id, item_id, rating, timestamp"):
        import_dataset(RecBole(folder / "ml-100k.inter", tmp_path / "out", user="uid"))
    put(folder / "ml-100k.inter", "user_id:token\titem_id:token\n1\t2\n1\n1\t2\t3\n")
    (folder / "ml-100k.item").unlink()
    with pytest.raises(DataError, match=r"no user id of ml-100k\.inter \(such as '1'\) is in ml-100k\.user"):
        import_dataset(RecBole(folder / "ml-100k.inter", tmp_path / "out"))
    (folder / "ml-100k.user").unlink()
    dataset, findings = import_dataset(RecBole(folder / "ml-100k.inter", tmp_path / "out"))
    assert len(dataset.interactions) == 1
    assert findings.left_out == {"malformed lines in ml-100k.inter": 2}


def test_sequences_with_items_beside(tmp_path: Path) -> None:
    folder = tmp_path / "beauty"
    put(folder / "sequences.txt", "1 10 20 30\n2 20\t10\r\n\n3\n4 10 10\n")
    put(folder / "items.csv", 'item,asin,title\n10,B1,"Nail, red"\n20,B2,Mask\n30,B3,\n')
    dataset, findings = import_dataset(ItemSequences(folder, tmp_path / "out"))
    assert dataset.interactions.select("user", "item").rows() == [
        ("1", "10"),
        ("1", "20"),
        ("1", "30"),
        ("2", "20"),
        ("2", "10"),
        ("4", "10"),
    ]
    assert dataset.items.select("item", "title", "asin").row(0) == ("10", "Nail, red", "B1")
    assert not dataset.has_timestamps
    assert findings.left_out["malformed lines in sequences.txt"] == 1
    assert findings.examples["malformed lines in sequences.txt"] == [
        "sequences.txt, line 4: a user without items: '3'"
    ]
    kept, _ = import_dataset(ItemSequences(folder / "sequences.txt", tmp_path / "kept", duplicates="keep"))
    assert len(kept.interactions) == 7
    with pytest.raises(DataError, match="line 4: a user without items"):
        import_dataset(ItemSequences(folder, tmp_path / "strict", strict=True))


def test_sequences_compressed_in_parts_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recllm.data.raw.sequence_lines.BATCH_IDS", 3)
    path = put(tmp_path / "some" / "log.txt.gz", "".join(f"u{n} a b c{n}\n" for n in range(10)))
    dataset, _ = import_dataset(ItemSequences(path, tmp_path / "out"))
    assert dataset.interactions["item"].to_list()[-3:] == ["a", "b", "c9"] and len(dataset.interactions) == 30
    with pytest.raises(DataError, match=r"no text file of item sequences.*holds: log\.txt\.gz"):
        import_dataset(ItemSequences(path.parent, tmp_path / "no"))


PARTS = {
    "train.csv.gz": "user,item\n0,3945\n1,815\n0,7\n",
    "valid.csv.gz": "user,item\n0,510\n",
    "test.csv.gz": "user,item\n1,1749\n",
}


def test_presplit_folder(tmp_path: Path) -> None:
    for name, text in PARTS.items():
        put(tmp_path / "baby" / name, text)
    dataset, _ = import_dataset(PreSplit(tmp_path / "baby", tmp_path / "out"))
    assert dataset.interactions.select("user", "item", "part").rows() == [
        ("0", "3945", "train"),
        ("1", "815", "train"),
        ("0", "7", "train"),
        ("0", "510", "valid"),
        ("1", "1749", "test"),
    ]
    (tmp_path / "baby" / "valid.csv.gz").unlink()
    with pytest.raises(DataError, match=r"no valid file .*holds: test\.csv\.gz, train\.csv\.gz"):
        import_dataset(PreSplit(tmp_path / "baby", tmp_path / "no"))


def test_presplit_names_the_file_of_a_bad_line(tmp_path: Path) -> None:
    put(tmp_path / "s" / "train.csv", "user,item,timestamp\na,1,1600000000\n,2,1600000001\n")
    put(tmp_path / "s" / "val.tsv", "user\titem\ttimestamp\na\t3\t1600000002\nb\n")
    put(tmp_path / "s" / "test.jsonl", '{"user": "a", "item": 4, "timestamp": 1600000003}\n{"user": "a"}\n')
    dataset, findings = import_dataset(PreSplit(tmp_path / "s", tmp_path / "out"))
    assert dataset.interactions.select("user", "item", "timestamp", "part").rows() == [
        ("a", "1", 1600000000, "train"),
        ("a", "3", 1600000002, "valid"),
        ("a", "4", 1600000003, "test"),
    ]
    shown = "\n".join(findings.lines())
    assert "val.tsv, line 3: expected 3 fields, found 1" in shown
    assert "train.csv, line 3: no user id" in shown
    assert "test.jsonl, line 2: no item id" in shown


def test_mmrec_inter_with_labels(tmp_path: Path) -> None:
    text = "userID\titemID\trating\ttimestamp\tx_label\n0\t5\t5.0\t1390000000\t0\n"
    text += "0\t6\t4.0\t1390000001\t1\n1\t5\t1.0\t1390000002\t2\n"
    put(tmp_path / "baby" / "baby.inter", text)
    for place, source in enumerate((tmp_path / "baby", tmp_path / "baby" / "baby.inter")):
        dataset, _ = import_dataset(PreSplit(source, tmp_path / f"out{place}"))
        assert dataset.interactions.select("user", "item", "rating", "timestamp", "part").rows() == [
            ("0", "5", 5.0, 1390000000, "train"),
            ("0", "6", 4.0, 1390000001, "valid"),
            ("1", "5", 1.0, 1390000002, "test"),
        ]
    put(tmp_path / "baby" / "baby.inter", text.replace("\t2\n", "\t3\n"))
    with pytest.raises(DataError, match=r"x_label is '3'; expected 0 \(train\), 1 \(valid\) or 2 \(test\)"):
        import_dataset(PreSplit(tmp_path / "baby", tmp_path / "no"))
    put(tmp_path / "baby" / "baby.inter", text.replace("x_label", "part"))
    with pytest.raises(
        DataError, match="missing column 'x_label'; found: userID, itemID, rating, timestamp, part"
    ):
        import_dataset(PreSplit(tmp_path / "baby", tmp_path / "no"))
