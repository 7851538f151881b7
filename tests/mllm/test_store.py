"""The generation store: keys, lines, what a kill leaves, damaged lines, several writers, the commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.data.image_hashes import ImageHashes
from recllm.errors import BusyError, DataError
from recllm.mllm import store_index, store_shards
from recllm.mllm.chat import IMAGE_PART, Decoding, Request, Result, message, text_part
from recllm.mllm.store import GenerationStore, request_key
from recllm.mllm.store_commands import ExportOptions, StatsOptions, VerifyOptions, export, stats, verify
from recllm.mllm.store_shards import decode_line, encode_line, to_result

IDENTITY = {"model": "tiny", "revision": "0"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def key(number: int) -> bytes:
    return request_key(IDENTITY, Decoding(), Request("", (message("user", str(number)),)), ImageHashes())


def success(number: int, text: str | None = None) -> Result:
    return Result(key(number), f"text {number}" if text is None else text, 5, 3, "stop")


def failure(number: int, reason: str = "server: busy") -> Result:
    return Result.failed(key(number), reason)


def put(store: GenerationStore, *results: Result) -> None:
    with store.writer(IDENTITY, Decoding()) as writer:
        writer.append(results, [f"id {number}" for number in range(len(results))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


# ------------------------------------------------------------------------------------------------------ keys


@pytest.fixture
def shown(tmp_path: Path) -> Request:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"picture")
    seen = {"role": "user", "content": [IMAGE_PART, text_part("what is it")]}
    return Request("a", (message("system", "be brief"), seen), (image,))


def test_the_key_changes_with_everything_that_decides_the_answer(tmp_path: Path, shown: Request) -> None:
    other_image = tmp_path / "b.jpg"
    other_image.write_bytes(b"another")
    other_words = {"role": "user", "content": [IMAGE_PART, text_part("what is it?")]}
    other_order = {"role": "user", "content": [text_part("what is it"), IMAGE_PART]}
    greedy, hashes = Decoding(), ImageHashes()
    keys = [
        request_key(IDENTITY, greedy, shown, hashes),
        request_key({**IDENTITY, "model": "large"}, greedy, shown, hashes),
        request_key({**IDENTITY, "revision": "1"}, greedy, shown, hashes),
        request_key({**IDENTITY, "adapter": "x"}, greedy, shown, hashes),
        request_key(IDENTITY, replace(greedy, max_new_tokens=9), shown, hashes),
        request_key(IDENTITY, replace(greedy, temperature=0.5), shown, hashes),
        request_key(IDENTITY, replace(greedy, temperature=0.5, seed=1), shown, hashes),
        request_key(IDENTITY, replace(greedy, temperature=0.5, top_p=0.9), shown, hashes),
        request_key(IDENTITY, greedy, replace(shown, images=(other_image,)), hashes),
        request_key(IDENTITY, greedy, replace(shown, messages=(shown.messages[0], other_words)), hashes),
        request_key(IDENTITY, greedy, replace(shown, messages=(shown.messages[0], other_order)), hashes),
        request_key(IDENTITY, greedy, replace(shown, messages=shown.messages[1:]), hashes),
    ]
    assert len(set(keys)) == len(keys) and {len(each) for each in keys} == {32}


def test_the_key_does_not_change_with_ids_paths_times_or_the_order_of_names(
    tmp_path: Path, shown: Request
) -> None:
    greedy, hashes = Decoding(), ImageHashes()
    expected = request_key(IDENTITY, greedy, shown, hashes)
    copy = shutil.copy(shown.images[0], tmp_path / "copy.png")
    assert request_key(IDENTITY, greedy, replace(shown, id="b", images=(copy,)), hashes) == expected
    assert request_key(dict(reversed(IDENTITY.items())), greedy, shown, hashes) == expected
    assert request_key(IDENTITY, replace(greedy, seed=3, top_p=0.1), shown, hashes) == expected
    os.utime(shown.images[0], (1, 1))
    assert request_key(IDENTITY, greedy, shown, hashes) == expected


def test_an_image_that_is_replaced_is_hashed_again(shown: Request) -> None:
    hashes = ImageHashes()
    before = hashes(shown.images[0])
    shown.images[0].write_bytes(b"changed")  # as many bytes as before
    os.utime(shown.images[0], (2, 2))
    assert hashes(shown.images[0]) != before


# ------------------------------------------------------------------------------------------ what is kept


def test_a_store_gives_back_what_was_put_in_also_after_it_is_opened_again(folder: Path) -> None:
    store = GenerationStore.open(folder)
    put(store, success(1), failure(2))
    for opened in (store, GenerationStore.open(folder)):
        assert opened.read_many([key(2), key(3), key(1)]) == [failure(2), None, success(1)]
        assert opened.missing([key(1), key(2), key(3)]).tolist() == [False, True, True]
        assert len(opened) == 2


@given(text=TEXTS, error=st.none() | TEXTS, name=TEXTS)
def test_any_text_survives_as_one_line(text: str, error: str | None, name: str) -> None:
    result = Result(bytes(range(32)), text, 1, 2, "stop", error)
    line = encode_line(result, identity="0" * 16, request_id=name)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert to_result(decode_line(line[:-1])) == result
    plain = orjson.loads(line)
    assert plain["key"] == result.key.hex() and plain["text"] == text and plain["id"] == name


@given(st.lists(st.tuples(TEXTS, st.none() | TEXTS), min_size=1, max_size=8))
def test_lines_are_found_whatever_the_texts_say(tmp_path_factory, texts: list) -> None:
    """The scan goes by position alone; no text or error can pass for the end of a line or for `no error`."""
    folder = tmp_path_factory.mktemp("any") / "s"
    results = [
        Result(key(number), text, 1, 1, "stop", error) for number, (text, error) in enumerate(texts)
    ] + [failure(99, 'x","error":null'), success(98, '"error":"y"}\n{"key":"')]
    put(GenerationStore.open(folder), *results)
    store = GenerationStore.open(folder)
    assert store.read_many([result.key for result in results]) == results
    assert store.missing([result.key for result in results]).tolist() == [
        result.error is not None for result in results
    ]


def test_a_flip_of_any_bit_of_a_line_is_noticed() -> None:
    line = encode_line(success(1, "é\n"), identity="0" * 16, request_id="i")[:-1]
    for position in range(len(line)):
        for bit in range(8):
            flipped = line[:position] + bytes([line[position] ^ 1 << bit]) + line[position + 1 :]
            assert decode_line(flipped) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 2)), max_size=30), st.booleans())
def test_the_index_keeps_the_line_that_counts(tmp_path_factory, events: list, small: bool) -> None:
    """Against a plain dict: the first success counts, else the last error, over several shards."""
    folder = tmp_path_factory.mktemp("index") / "s"
    store = GenerationStore.open(folder)
    shards: dict[int, list[Result]] = {}
    for step, (number, failed, shard) in enumerate(events):
        result = failure(number, f"e{step}") if failed else success(number, f"t{step}")
        shards.setdefault(shard, []).append(result)
    expected: dict[bytes, Result] = {}
    for shard in sorted(shards):
        for result in shards[shard]:
            known = expected.get(result.key)
            if known is None or known.error is not None:
                expected[result.key] = result
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(store_shards, "_BLOCK", 100)
        for shard, results in shards.items():
            lines = [encode_line(each, identity="0", request_id="") for each in results]
            (folder / f"shard-{shard:05d}.jsonl").write_bytes(b"".join(lines))
        opened = GenerationStore.open(folder)
        store.refresh()
    keys = [key(number) for number in range(6)]
    for each in (opened, store):
        assert each.read_many(keys) == [expected.get(wanted) for wanted in keys]
        assert len(each) == len(expected)


def test_the_index_of_many_lines_equals_a_dict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_index, "_RECENT_AT_MOST", 700)
    store, rng = GenerationStore.open(folder), np.random.default_rng(0)
    keys = [rng.bytes(32) for _ in range(3000)]
    known: dict[bytes, Result] = {}
    with store.writer(IDENTITY, Decoding()) as writer:
        for _ in range(40):
            picked = [keys[each] for each in rng.choice(3000, 100, replace=False)]
            results = [Result(each, str(rng.integers(1000)), 1, 1, "stop") for each in picked]
            writer.append(results, [""] * 100)
            for result in results:
                known.setdefault(result.key, result)
    for opened in (store, GenerationStore.open(folder)):
        assert opened.read_many(keys) == [known.get(each) for each in keys]
        assert sum(1 for _ in opened.read_all()) == len(known)


def test_a_success_counts_before_a_later_error_and_a_later_success_before_an_error(folder: Path) -> None:
    store = GenerationStore.open(folder)
    put(store, success(1), failure(2, "first"))
    put(store, failure(1), failure(2, "second"))
    assert store.read_many([key(1), key(2)]) == [success(1), failure(2, "second")]
    put(store, success(2))
    for opened in (store, GenerationStore.open(folder)):
        assert opened.read_many([key(1), key(2)]) == [success(1), success(2)]


# -------------------------------------------------------------------------------------- writers and kills


def test_two_writers_take_two_shards_and_refresh_shows_the_other_s_lines(folder: Path) -> None:
    first, second = GenerationStore.open(folder), GenerationStore.open(folder)
    with first.writer(IDENTITY, Decoding()) as one, second.writer(IDENTITY, Decoding()) as two:
        one.append([success(1)], ["a"])
        two.append([success(2)], ["b"])
        assert first.get(key(2)) is None
        first.refresh()
        assert first.get(key(2)) == success(2)
    assert sorted(path.name for path in folder.glob("shard-*")) == ["shard-00000.jsonl", "shard-00001.jsonl"]
    put(second, success(3))
    assert len(list(folder.glob("shard-*"))) == 2, "a free shard is used again"


def test_many_processes_write_at_once_and_nothing_is_lost(folder: Path) -> None:
    program = (
        "import sys; from recllm.mllm.store import GenerationStore as S; from recllm.mllm.chat import *\n"
        "store, me = S.open(sys.argv[1]), int(sys.argv[2])\n"
        "with store.writer({'model': 'm'}, Decoding()) as writer:\n"
        "    for n in range(300):\n"
        "        key = bytes([me, n % 256, n // 256]) + bytes(29)\n"
        "        writer.append([Result(key, 'x' * n, 1, 1, 'stop')], ['i'])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(folder), str(number)]) for number in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    store = GenerationStore.open(folder)
    for me in range(4):
        for n in range(300):
            assert store.get(bytes([me, n % 256, n // 256]) + bytes(29)).text == "x" * n


@pytest.mark.parametrize(
    "torn", [b"\0" * 50, b'{"key":"00', encode_line(success(9), identity="", request_id="")[:-1]]
)
def test_a_torn_last_line_is_ignored_by_readers_and_cut_off_by_the_next_writer(
    folder: Path, torn: bytes
) -> None:
    put(GenerationStore.open(folder), success(1))
    shard = folder / "shard-00000.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole + torn)
    assert len(GenerationStore.open(folder)) == 1
    assert shard.read_bytes() == whole + torn
    put(GenerationStore.open(folder), success(2))
    assert shard.read_bytes().startswith(whole + b'{"key":"' + key(2).hex().encode())
    assert GenerationStore.open(folder).read_many([key(1), key(2)]) == [success(1), success(2)]


def test_a_full_disk_leaves_whole_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GenerationStore.open(folder)
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", full)
        return write(descriptor, bytes(data)[: len(data) // 2])

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with store.writer(IDENTITY, Decoding()) as writer:
        writer.append([success(1)], ["a"])
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(DataError, match="No space left on device"):
            writer.append([success(2), success(3)], ["b", "c"])
        monkeypatch.setattr(os, "write", write)
        writer.append([success(4)], ["d"])
    shard = (folder / "shard-00000.jsonl").read_bytes()
    assert shard.count(b"\n") == 2 and shard.endswith(b"\n")
    for opened in (store, GenerationStore.open(folder)):
        expected = [success(1), None, None, success(4)]
        assert opened.read_many([key(number) for number in (1, 2, 3, 4)]) == expected


# ---------------------------------------------------------------------------------------- what is damaged


def damage(folder: Path, line: int, find: bytes, put_in: bytes) -> None:
    shard = folder / "shard-00000.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    assert find in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(find, put_in, 1)
    shard.write_bytes(b"".join(lines))


@pytest.fixture
def five(folder: Path) -> Path:
    put(GenerationStore.open(folder), *map(success, range(1, 6)))
    return folder


def test_a_changed_text_is_an_error_that_names_file_and_line_and_can_be_repaired(
    five: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(five, 3, b"text 3", b"text 8")
    store = GenerationStore.open(five)
    assert store.get(key(2)) == success(2)
    with pytest.raises(DataError, match=r"shard-00000.jsonl, line 3: .* store verify .* --repair"):
        store.get(key(3))
    with pytest.raises(DataError, match="1 damaged lines"):
        verify(VerifyOptions(five))
    assert "shard-00000.jsonl, line 3: damaged" in capsys.readouterr().out
    verify(VerifyOptions(five, repair=True))
    verify(VerifyOptions(five))
    assert "4 lines, 0 damaged" in capsys.readouterr().out
    assert b"text 8" in (five / "shard-00000.bad").read_bytes()
    store = GenerationStore.open(five)
    assert store.missing([key(number) for number in range(1, 6)]).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("find", "put_in"),
    [(b'{"key"', b'{"kez"'), (b"check", b"cheek"), (b'","id', b'"\n"id'), (b'"key":"', b'"key":"G')],
)
def test_a_line_of_another_shape_stops_the_opening(five: Path, find: bytes, put_in: bytes) -> None:
    damage(five, 4, find, put_in)
    with pytest.raises(DataError, match=r"shard-00000.jsonl, line 4: "):
        GenerationStore.open(five)
    verify(VerifyOptions(five, repair=True))
    store = GenerationStore.open(five)
    assert store.missing([key(number) for number in range(1, 6)]).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]


def test_a_shard_in_use_is_not_repaired(five: Path) -> None:
    store = GenerationStore.open(five)
    damage(five, 1, b"text 1", b"text 7")
    with store.writer(IDENTITY, Decoding()), pytest.raises(BusyError, match="being written"):
        verify(VerifyOptions(five, repair=True))
    assert not (five / "shard-00000.bad").exists()


def test_a_folder_that_is_no_store_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"mine.txt.*no manifest.json"):
        GenerationStore.open(tmp_path)
    with pytest.raises(DataError, match="not a generation store"):
        GenerationStore.open(tmp_path / "absent", create=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "manifest.json").write_text('{"format": "recllm generation store", "version": 2}')
    with pytest.raises(DataError, match="Open it with the recllm that wrote it"):
        GenerationStore.open(tmp_path)


# ------------------------------------------------------------------------------------------------- commands


def test_stats_tell_each_model_s_texts_tokens_and_errors(folder: Path, capsys: pytest.CaptureFixture) -> None:
    store = GenerationStore.open(folder)
    put(store, success(1), success(1), replace(success(2), completion_tokens=6, finish="length"), failure(3))
    with store.writer({"model": "large"}, Decoding(max_new_tokens=9)) as writer:
        writer.append([success(4)], ["x"])
    stats(StatsOptions(folder))
    told = capsys.readouterr().out
    assert "3 texts, 1 errors, 1 further lines of the same requests, 1 shards" in told
    assert "2 texts of 4.5 tokens, at most 6; finish: 1 stop, 1 length; 1 errors" in told
    assert "large (" in told and "max_new_tokens 9)" in told
    assert told.index("tiny (") < told.index("large (")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_export_has_one_row_for_every_text(folder: Path, tmp_path: Path, suffix: str) -> None:
    put(GenerationStore.open(folder), success(1), failure(2), success(3, "a\n\u2028\0"), success(1, "again"))
    out = tmp_path / f"out.{suffix}"
    export(ExportOptions(folder, out))
    frame = pl.read_parquet(out) if suffix == "parquet" else pl.read_ndjson(out)
    assert frame.rows() == [
        (key(1).hex(), "id 0", "text 1", 5, 3, "stop", "tiny"),
        (key(3).hex(), "id 2", "a\n\u2028\0", 5, 3, "stop", "tiny"),
    ]
    with pytest.raises(DataError, match="exists already"):
        export(ExportOptions(folder, out))
    export(ExportOptions(folder, out, overwrite=True))
    with pytest.raises(DataError, match=r"ends in .parquet or .jsonl"):
        export(ExportOptions(folder, tmp_path / "out.csv"))
