"""Quotes in delimited files: the fast reader and the strict one agree, and nothing is swallowed unseen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from recllm.data.raw.delimited import read_delimited
from recllm.data.raw.findings import Findings
from tests.data.imports import assert_refused, put, take


def test_stray_quotes_far_apart_cost_two_lines_and_not_what_lies_between(tmp_path: Path) -> None:
    lines = [f"u{row},i{row},fine\n" for row in range(3000)]
    lines[10], lines[2900] = 'u10,i10,"stray\n', 'u2900,i2900,stray"\n'
    dataset, findings = take(put(tmp_path / "log.csv", "user,item,review\n" + "".join(lines)))
    assert findings.left_out == {"malformed lines in log.csv": 1}  # the second quote stands inside its field
    assert len(dataset.interactions) == 2999
    assert any("1 of the malformed lines hold quotes" in note for note in findings.notes)


def test_stray_quotes_close_together_do_not_make_one_field_of_records(tmp_path: Path) -> None:
    text = 'user,item,review\nu1,i1,"open\nu2,i2,fine\nu3,i3,12"\nu4,i4,"two\nlines"\n'
    dataset, findings = take(put(tmp_path / "log.csv", text))
    assert dataset.interactions["user"].to_list() == ["u2", "u3", "u4"]
    assert dataset.interactions["review"].to_list() == ["fine", '12"', "two\nlines"]
    assert findings.left_out == {"malformed lines in log.csv": 1}
    items = put(tmp_path / "items.csv", 'item,title\ni2,"open\ni3,Middle\ni4,Screen 12"\n')
    _, findings = take(tmp_path / "log.csv", items_file=items)
    assert any("1 quoted fields span lines that would be records" in note for note in findings.notes)


@pytest.mark.parametrize("seed", range(30))
def test_polars_and_the_line_reader_read_the_same(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    pieces = ["a", "b,", '"', '""', '"x"', "\n", ",", '"y, z"', " ", "5", "\r\n", '\\"']
    body = "".join(
        f"u{row},i{row},{''.join(rng.choices(pieces, k=rng.randrange(4)))},z\n" for row in range(12)
    )
    path = put(tmp_path / "log.csv", "user,item,note,more\n" + body)
    fast = read_delimited(path, Findings(), tmp_path / "work")
    again = fast.with_lines or (lambda: fast.frame)
    names = ["user", "item", "note", "more"]
    assert fast.frame.select(names).collect().equals(again().select(names).collect())


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_file_of_tabs_without_quoting_is_recognized(tmp_path: Path, suffix: str) -> None:
    rows = [("i1", '"Quoted" start'), ("i2", "plain"), ("i3", '"Never closed'), ("i4", 'Screen 12"')]
    mark = "\t" if suffix == "tsv" else ","
    items = "".join(mark.join(row) + "\n" for row in [("item", "title"), *rows])
    log = put(tmp_path / f"log.{suffix}", f"user{mark}item\n" + "".join(f"u{mark}{row[0]}\n" for row in rows))
    path = put(tmp_path / f"items.{suffix}", items)
    dataset, findings = take(log, items_file=path)
    if suffix == "tsv":
        assert dataset.items.select("item", "title").rows() == rows
        assert any("quotes are read as ordinary characters" in note for note in findings.notes)
        dataset, findings = take(log, items_file=path, quote='"')
        assert dataset.items["title"].to_list() != [title for _, title in rows]
    assert any("--quote ''" in note for note in findings.notes)
    dataset, findings = take(log, items_file=path, quote="")
    assert dataset.items.select("item", "title").rows() == rows and not findings.left_out


def test_quoted_files_of_tabs_stay_quoted(tmp_path: Path) -> None:
    text = 'user\titem\tnote\nu1\ti1\t"a ""b"""\nu2\ti2\t"c"\nu3\ti3\t"two\nlines"\n'
    dataset, _ = take(put(tmp_path / "log.tsv", text))
    assert dataset.interactions["note"].to_list() == ['a "b"', "c", "two\nlines"]


def test_escaped_quotes_and_spaces_before_quotes(tmp_path: Path) -> None:
    text = 'user,item,note\nu1,i1,"It\\"s fun"\nu2,i2,"Level 4\\", and more"\nu3,i3,"back\\\\slash"\n'
    path = put(tmp_path / "log.csv", text)
    dataset, findings = take(path)
    assert dataset.interactions["note"].to_list()[:2] == ['It"s fun', 'Level 4", and more']
    assert any("2 lines have quotes behind a backslash" in note for note in findings.notes)
    dataset, findings = take(path, escape="\\")
    assert dataset.interactions["note"].to_list() == ['It"s fun', 'Level 4", and more', "back\\slash"]
    assert not findings.left_out
    assert_refused(path, "the escape character 'xx' is not one character", escape="xx")
    dataset, findings = take(put(tmp_path / "log.csv", 'user, item, note\nu1, "i1", "a, b"\nu2, i2, c\n'))
    assert dataset.interactions.select("item", "note").rows() == [("i1", "a, b"), ("i2", " c")]
    assert not findings.left_out


def test_headers_inside_a_file_and_headers_where_names_are_given(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", "user,item,timestamp\nu1,i1,1\nuser,item,timestamp\nu2,i2,2\n")
    dataset, findings = take(path)
    assert dataset.users["user"].to_list() == ["u1", "u2"]
    assert findings.left_out == {"header lines inside log.csv": 1}
    assert findings.examples["header lines inside log.csv"] == ["line 3: 'user,item,timestamp'"]
    assert_refused(path, "header lines inside log.csv: line 3", strict=True)
    path = put(tmp_path / "names.csv", "userId,movieId,stars\n1,2,3\n4,5,6\n")
    dataset, findings = take(path, columns=("user", "item", "rating"))
    assert dataset.users["user"].to_list() == ["1", "4"]
    assert any("userId, movieId, stars, looks like a header" in note for note in findings.notes)


def test_an_index_that_pandas_wrote_gets_a_name(tmp_path: Path) -> None:
    path = put(tmp_path / "log.csv", ",user,item\n0,u1,i1\n1,u2,i2\n")
    dataset, findings = take(path)
    assert dataset.interactions["unnamed_1"].to_list() == ["0", "1"]
    assert any("column 1 has no name" in note for note in findings.notes)
    dataset, _ = take(path, columns=("idx", "user", "item"))
    assert dataset.users["user"].to_list() == ["u1", "u2"]
