"""What a user may rely on when the input is broken: one outcome a fault, and nothing lost without a word."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import polars as pl
import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import Amazon
from recllm.errors import DataError
from tests.data.imports import assert_refused, pairs, put, take

# ---------------------------------------------------------------------------- malformed lines


def test_malformed_lines_are_counted_and_the_first_five_shown(tmp_path: Path) -> None:
    lines = (
        ["user,item,rating"] + [f"u{row},i,{row}" for row in range(10)] + [f"u{row},i" for row in range(7)]
    )
    path = put(tmp_path / "log.csv", "\n".join(lines) + "\n")
    dataset, findings = take(path)
    assert len(dataset.interactions) == 10
    assert findings.left_out == {"malformed lines in log.csv": 7}
    shown = findings.examples["malformed lines in log.csv"]
    assert [text.split(":")[0] for text in shown] == [f"log.csv, line {line}" for line in range(12, 17)]
    assert "... and 2 more" in "\n".join(findings.lines())
    assert dataset.manifest["dropped"]["left_out"]["malformed lines in log.csv"]["rows"] == 7
    assert_refused(
        path, "line 12: expected 3 fields, found 2.*without --strict such rows are counted", strict=True
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (",i1,3", "no user id"),
        ("u1,  ,3", "no item id"),
        ("u1,i1", "expected 3 fields, found 2"),
        ("u1,i1,3,4", "expected 3 fields, found 4"),
        ('"u1"x,i1,3', "expected after"),
        ('u1,"i1,3', "a quote that is never closed"),
    ],
)
def test_each_bad_row_is_named_by_its_line(tmp_path: Path, line: str, problem: str) -> None:
    path = put(tmp_path / "log.csv", f"user,item,rating\nu0,i0,1\n\n{line}\nu2,i2,\n")
    dataset, findings = take(path)
    assert dataset.interactions.select("user", "item", "rating").rows() == [
        ("u0", "i0", 1.0),
        ("u2", "i2", None),
    ]
    assert sum(findings.left_out.values()) == 1
    assert problem in str(findings.examples) and "line 4" in str(findings.examples)
    assert_refused(path, "line 4", strict=True)


@pytest.mark.parametrize("rating", ["good", "1e999"])
def test_a_rating_that_is_no_number_is_null_and_named(tmp_path: Path, rating: str) -> None:
    path = put(tmp_path / "log.csv", f"user,item,rating\nu0,i0,1\n\nu1,i1,{rating}\nu2,i2,nan\n")
    dataset, findings = take(path)
    assert dataset.interactions["rating"].to_list() == [1.0, None, None] and not findings.left_out
    reason = "interactions without a readable rating"
    assert findings.kept == {reason: 1}
    assert findings.examples[reason] == [f"log.csv, line 4: rating {rating!r}"]
    assert_refused(path, "line 4", strict=True)


def test_a_log_without_a_readable_row_is_an_error(tmp_path: Path) -> None:
    assert_refused(put(tmp_path / "empty.csv", ""), r"empty\.csv is empty")
    assert_refused(put(tmp_path / "header.csv", "user,item\n"), r"header\.csv has no rows that could be read")
    assert_refused(
        put(tmp_path / "short.csv", "user,item\na\nb\n"), r"no rows.*malformed lines in short\.csv"
    )
    assert_refused(
        put(tmp_path / "blank.csv", "user,item\n,\n,\n"), r"blank\.csv: no interaction could be read"
    )
    assert_refused(put(tmp_path / "empty.jsonl", ""), "empty.jsonl is empty")
    items = put(tmp_path / "items.csv", "item,title\nz,Z\n")
    path = put(tmp_path / "log.csv", "user,item\nu,a\n")
    assert_refused(path, "no item id of log.csv", items_file=items, unknown_items="drop")


# ---------------------------------------------------------------------------- CSV as it comes


@pytest.mark.parametrize(
    "text",
    [
        "user,item\nu1,i1\nu2,i2\n",
        "\ufeffuser,item\r\nu1,i1\r\nu2,i2\r\n",
        "user,item\n\n   \nu1,i1\n\nu2,i2",
        'user,item\n"u1","i1"\n"u2","i2"\n',
        " user , item \n u1 , i1 \n u2 , i2 \n".replace(" user , item ", "user,item"),
        "user,item,\nu1,i1,\nu2,i2,\n".replace("user,item,", "user,item,more"),
    ],
)
def test_harmless_variants_give_the_same(tmp_path: Path, text: str) -> None:
    assert pairs(put(tmp_path / "log.csv", text), strict=True) == [("u1", "i1"), ("u2", "i2")]


def test_quotes_and_line_breaks_in_fields(tmp_path: Path) -> None:
    text = 'user,item,note\nu1,i1,"two\nlines, and a ""quote"""\nu2,"i\n2",12" disc\n'
    dataset, findings = take(put(tmp_path / "log.csv", text + 'u3,i3,"never closed\nu4,i4,fine\n'))
    assert dataset.interactions.select("user", "item", "note").rows() == [
        ("u1", "i1", 'two\nlines, and a "quote"'),
        ("u2", "i\n2", '12" disc'),
        ("u4", "i4", "fine"),
    ]
    assert "line 6: a quote that is never closed" in str(findings.examples)


def test_one_bad_line_does_not_change_how_the_others_are_read(tmp_path: Path) -> None:
    """Polars reads clean files, the line reader broken ones: empty and quoted fields must agree."""
    text = 'user,item,a,b\nu1,i1,,"x\r\ny"\nu2,"i2","", z \nu3,i3,é,""\n'
    clean, _ = take(put(tmp_path / "clean" / "log.csv", text + "u4,i4,last,1\n"))
    broken, findings = take(put(tmp_path / "broken" / "log.csv", text + "u4,i4,last,1\nbroken\n"))
    assert findings.left_out == {"malformed lines in log.csv": 1}
    blank = pl.col("a", "b").fill_null("")
    assert broken.interactions.with_columns(blank).equals(clean.interactions.with_columns(blank))


def test_odd_column_names_are_kept_however_the_file_is_read(tmp_path: Path) -> None:
    text = 'user,item,"a ""b""",__index_level_0__, spaced \nu,i,1,2,3\n'
    for place, more in enumerate(("", "broken\n")):
        dataset, _ = take(put(tmp_path / str(place) / "log.csv", text + more))
        assert dataset.interactions.columns[5:] == ['a "b"', "__index_level_0__", "spaced"]
        assert dataset.interactions.row(0)[5:] == ("1", "2", "3")


def test_header_faults_are_errors(tmp_path: Path) -> None:
    assert_refused(
        put(tmp_path / "twice.csv", "user,item,item\na,b,c\n"),
        "must name each column once; found: user, item, item",
    )
    assert_refused(put(tmp_path / "blank.csv", "user,,item\na,b,c\n"), "must name each column once")
    assert_refused(
        put(tmp_path / "other.csv", "uid,iid\na,b\n"), "missing column 'user', 'item'; found: uid, iid"
    )
    assert_refused(
        put(tmp_path / "semi.csv", "user;item\na;b\n"), "missing column 'user', 'item'; found: user;item"
    )
    assert_refused(
        put(tmp_path / "wide.csv", "user,item\na,b\n".encode("utf-16")), "is UTF-16 text, not UTF-8"
    )
    assert_refused(put(tmp_path / "mac.csv", "user,item\ra,b\rc,d\r"), "lines end in carriage returns alone")
    assert_refused(put(tmp_path / "star.csv", "user,item,*\na,b,c\n"), r"column name '\*' cannot be kept")


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    """In a text they are replaced and noted; in an id they would make two ids one, so the row is left out."""
    path = put(tmp_path / "log.csv", b"user,item,note\nu1,i1,caf\xe9\nu\xe9,i2,x\nu\xe8,i2,y\nu3,i3,z\n")
    dataset, findings = take(path)
    assert dataset.interactions.select("user", "item", "note").rows() == [
        ("u1", "i1", "caf\ufffd"),
        ("u3", "i3", "z"),
    ]
    assert sum(findings.left_out.values()) == 2
    assert "line 3: an id with bytes that are not in the file's encoding" in str(findings.examples)
    assert any("3 lines have bytes that are not utf-8" in note for note in findings.notes)
    dataset, findings = take(path, encoding="latin-1")
    assert dataset.users["user"].to_list() == ["u1", "u3", "uè", "ué"] and not findings.left_out


# ---------------------------------------------------------------------------- compressed files


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_a_file_cut_short_is_an_error(tmp_path: Path, suffix: str, pack, cut: float) -> None:
    rows = "".join(f"user{n * 7919 % 1009},item{n * 104729 % 977}\n" for n in range(5000))
    packed = pack(("user,item\n" + rows).encode())
    path = put(tmp_path / f"log.csv{suffix}", packed[: int(len(packed) * cut)])
    assert_refused(path, rf"log\.csv{suffix} is cut short or damaged.*fetch the file again")


def test_a_cut_file_of_json_lines_leaves_the_old_dataset(tmp_path: Path) -> None:
    lines = "".join(
        json.dumps({"reviewerID": f"A{n * 7919}", "asin": f"B{n}"}) + "\n" for n in range(3000)
    ).encode()
    path = put(tmp_path / "X_5.json.gz", gzip.compress(lines))
    import_dataset(Amazon(path, tmp_path / "out"))
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    put(path, gzip.compress(lines)[:-20])
    with pytest.raises(DataError, match=r"X_5\.json\.gz is cut short or damaged"):
        import_dataset(Amazon(path, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["X_5.json.gz", "out"]


def test_no_archive_at_all_and_archives_of_several_files(tmp_path: Path) -> None:
    for suffix in (".gz", ".bz2", ".xz", ".zip"):
        assert_refused(put(tmp_path / f"plain.csv{suffix}", b"\x00\x01user,item\na,b\n"), "is damaged")
        # Unpacked by a download tool that kept the name:
        assert pairs(put(tmp_path / f"plain.csv{suffix}", "user,item\na,b\n")) == [("a", "b")]
    with zipfile.ZipFile(tmp_path / "two.csv.zip", "w") as archive:
        archive.writestr("a.csv", "user,item\na,b\n")
        archive.writestr("b.csv", "user,item\na,b\n")
    assert_refused(tmp_path / "two.csv.zip", "holds 2 files; unpack it and give the one to read")


# ---------------------------------------------------------------------------- times


@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units_of_time_are_told_from_their_size(tmp_path: Path, unit: str, scale: int) -> None:
    text = f"user,item,timestamp\na,1,{1_500_000_000 * scale}\nb,1,{1_600_000_000 * scale + scale - 1}\n"
    dataset, findings = take(put(tmp_path / "log.csv", text))
    assert dataset.interactions["timestamp"].to_list() == [1_500_000_000, 1_600_000_000]
    assert any(f"are in {unit}" in note for note in findings.notes) == (unit != "s")
    again, _ = take(tmp_path / "log.csv", timestamp_unit=unit)
    assert again.interactions.equals(dataset.interactions)


def test_mixed_units_are_an_error_unless_one_is_named(tmp_path: Path) -> None:
    path = put(
        tmp_path / "log.csv", "user,item,timestamp\na,1,1500000000\nb,1,1600000000000\nc,1,1600000000001\n"
    )
    assert_refused(path, r"several units \(1 look like s, 2 look like ms\)")
    dataset, _ = take(path, timestamp_unit="ms")
    assert dataset.interactions["timestamp"].to_list() == [1_500_000, 1_600_000_000, 1_600_000_000]


def test_a_row_without_a_readable_time_is_kept(tmp_path: Path) -> None:
    text = "user,item,timestamp\n" + "".join(f"a,{row},{1_500_000_000 + row}\n" for row in range(8))
    path = put(tmp_path / "log.csv", text + "b,1,soon\nb,2,\n")
    dataset, findings = take(path)
    assert dataset.interactions["timestamp"].null_count() == 2 and len(dataset.interactions) == 10
    assert findings.kept == {"interactions without a readable time": 2}
    assert "log.csv, line 10: timestamp 'soon'" in findings.examples["interactions without a readable time"]
    assert_refused(path, "without a readable time: log.csv, line 10", strict=True)
    assert_refused(
        put(tmp_path / "none.csv", "user,item,timestamp\na,1,soon\nb,1,late\n"),
        "neither numbers nor dates",
    )
    mostly = "user,item,timestamp\na,1,1500000000\nb,1,late\nc,1,never\n"
    assert_refused(put(tmp_path / "mostly.csv", mostly), "2 of 3 rows have no time that can be read")


# ---------------------------------------------------------------------------- repeated pairs


def test_repeated_pairs_by_policy(tmp_path: Path) -> None:
    text = "user,item,timestamp,note\nu,a,1500000300,late\nu,b,1500000200,b\n"
    text += "u,a,1500000100,early\nu,a,1500000300,tie\n"
    path = put(tmp_path / "log.csv", text)

    def notes(policy: str) -> list[str]:
        dataset, findings = take(path, duplicates=policy)
        dropped = findings.left_out.get(f"repeated (user, item) pairs (the {policy} in time counts)", 0)
        assert dropped == 4 - len(dataset.interactions)
        return dataset.interactions["note"].to_list()

    assert notes("first") == ["b", "early"]
    assert notes("last") == ["b", "tie"]
    assert notes("keep") == ["late", "b", "early", "tie"]
    assert_refused(path, "user 'u', item 'a'.*2", duplicates="error")
    take(path, strict=True)  # a policy is no fault


def test_repeated_pairs_without_times_go_by_the_order_of_the_file(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item,note\nu,a,1\nu,b,2\nu,a,3\nv,a,4\n")
    kept = {
        policy: take(path, duplicates=policy)[0].interactions["note"].to_list()
        for policy in ("first", "last", "keep")
    }
    assert kept == {"first": ["1", "2", "4"], "last": ["2", "3", "4"], "keep": ["1", "2", "3", "4"]}


def test_repeated_items_count_once(tmp_path: Path) -> None:
    items = put(tmp_path / "items.csv", "item,title\na,first\na,second\n,nobody\nb,B\n")
    dataset, findings = take(put(tmp_path / "log.csv", "user,item\nu,a\n"), items_file=items)
    assert dataset.items.select("item", "title").rows() == [("a", "first"), ("b", "B")]
    assert findings.left_out == {
        "rows of items.csv without item id": 1,
        "repeated item ids in items.csv (the first counts)": 1,
    }


# ---------------------------------------------------------------------------- times as people write them


def test_dates_of_several_forms_in_one_column_are_all_read(tmp_path: Path) -> None:
    forms = {
        "2023-01-02T00:00:00Z": 1672617600,
        "2023-01-03T00:00:00": 1672704000,
        "2023-01-04": 1672790400,
        "2023-01-05 10:11": 1672913460,
        "2023-01-05 10:11:12.5+02:00": 1672906272,
        "2023-01-02 10:11 UTC": 1672654260,
        "2023-01-02T10:11Z": 1672654260,
    }
    for repeats in (1, 1500):  # with and without all forms among the rows that are looked at first
        texts = [next(iter(forms))] * repeats + list(forms)
        rows = [f"u,{row},{text}" for row, text in enumerate(texts)]
        dataset, findings = take(put(tmp_path / "log.csv", "\n".join(["user,item,timestamp", *rows])))
        assert dataset.interactions["timestamp"].to_list() == [forms[text] for text in texts]
        assert findings.kept == {}


def test_a_row_with_a_time_wins_over_a_repeated_one_without(tmp_path: Path) -> None:
    path = put(
        tmp_path / "log.csv", "user,item,timestamp\na,1,n/a\na,1,50\na,2,60\na,2,n/a\nb,1,70\nb,2,80\n"
    )
    for policy in ("first", "last"):
        dataset, _ = take(path, duplicates=policy)
        assert dataset.interactions["timestamp"].to_list() == [50, 60, 70, 80]


def test_numbers_that_are_hardly_seconds_are_remarked(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item,timestamp\na,1,19358\na,2,19359\n")
    assert "in seconds lies before 1990" in take(path)[1].notes[0]


def test_a_log_without_times_says_what_stands_for_them(tmp_path: Path) -> None:
    assert "no time column" in take(put(tmp_path / "log.csv", "user,item\na,1\n"))[1].notes[0]


def test_another_separator_and_no_rows_are_told(tmp_path: Path) -> None:
    assert_refused(
        put(tmp_path / "semicolon.csv", "user;item\na;b\n"), r"found: user;item; if ';' stands .* --separator"
    )
    assert_refused(put(tmp_path / "head.csv", "user,item\n"), r"head.csv has no rows that could be read$")
