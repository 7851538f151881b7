"""The run loop: streaming, sharing among ranks, and resuming after kills, with a null model."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from recllm.data.texts import read_texts
from recllm.errors import DataError
from recllm.mllm.chat import IMAGE_PART, Decoding, Request, Result, message, text_part
from recllm.mllm.generation.run import _of_all_ranks, generate
from recllm.mllm.generation.texts import write_texts
from recllm.mllm.store import GenerationStore
from tests.mllm.programs import null_run

PROGRAM = Path(null_run.__file__)
ROOT = PROGRAM.parents[3]


class Model:
    """Answers from the text of the request; remembers what it was asked."""

    special_tokens = ()

    def __init__(self, name="m", batch=3, fails=(), stops_after=None):
        self.identity = {"model": name}
        self.batch, self.fails, self.stops_after = batch, fails, stops_after
        self.asked: list[str] = []
        self.windows: list[int] = []

    def generate(self, requests, decoding):
        self.windows.append(len(requests))
        for start in range(0, len(requests), self.batch):
            if self.stops_after is not None and len(self.asked) >= self.stops_after:
                raise DataError("the server went away")
            batch = requests[start : start + self.batch][::-1]
            self.asked += [request.id for _, request in batch]
            yield [self.answer(key, request) for key, request in batch]

    def answer(self, key, request):
        if request.id in self.fails:
            return Result.failed(key, f"server: refused {request.id}")
        return Result(key, request.messages[0]["content"][0]["text"].upper(), 3, 2, "stop")

    def count_tokens(self, request):
        return None


def ask(*texts: str) -> list[Request]:
    return [Request(f"r{number}", (message("user", text),)) for number, text in enumerate(texts)]


def run(requests, model, folder, **options):
    return generate(requests, model, GenerationStore.open(folder), Decoding(), **options)


def test_results_come_in_the_order_of_the_requests_and_equal_content_is_asked_once(tmp_path: Path) -> None:
    model = Model()
    generated = run(ask("a", "b", "a", "c", "b"), model, tmp_path / "s")
    assert [(name, result.text) for name, result in generated.results()] == [
        ("r0", "A"),
        ("r1", "B"),
        ("r2", "A"),
        ("r3", "C"),
        ("r4", "B"),
    ]
    assert sorted(model.asked) == ["r0", "r1", "r3"]
    counts = generated.counts
    assert (counts.requests, counts.unique, counts.stored, counts.generated, counts.failed) == (5, 3, 0, 3, 0)


def test_a_second_run_asks_for_what_is_new_or_failed(tmp_path: Path) -> None:
    run(ask("a", "b", "c"), Model(fails={"r1"}), tmp_path / "s")
    model = Model()
    generated = run(ask("a", "b", "c", "d"), model, tmp_path / "s")
    assert sorted(model.asked) == ["r1", "r3"]
    counts = generated.counts
    assert (counts.stored, counts.generated, counts.failed) == (2, 2, 0)
    assert not list(generated.errors())


def test_a_failed_request_is_tried_once_a_run(tmp_path: Path) -> None:
    requests = ask(*["a"] * 20)
    model = Model(fails={request.id for request in requests})
    generated = run(requests, model, tmp_path / "s", window=1)
    assert len(model.asked) == 1 and generated.counts.failed == 1
    assert [name for name, _ in generated.errors()] == [request.id for request in requests]


def test_requests_are_read_as_a_stream(tmp_path: Path) -> None:
    """At no time has the loop read more than two windows beyond what the model has answered."""
    model, ahead, read = Model(), [], itertools.count()

    def stream():
        for request in ask(*map(str, range(200))):
            ahead.append(next(read) - len(model.asked))
            yield request

    run(stream(), model, tmp_path / "s", window=10)
    assert max(ahead) <= 20
    assert model.windows == [10] * 20


def test_windows_are_filled_where_most_is_stored_already(tmp_path: Path) -> None:
    texts = [str(number) for number in range(100)]
    run(ask(*[text for text in texts if int(text) % 5]), Model(), tmp_path / "s")
    model = Model()
    run(ask(*texts), model, tmp_path / "s", window=10)
    assert model.windows == [10, 10]


def test_what_was_answered_before_an_error_of_the_whole_job_is_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="went away"):
        run(ask(*"abcdefghi"), Model(stops_after=6), tmp_path / "s")
    model = Model()
    assert run(ask(*"abcdefghi"), model, tmp_path / "s").counts.stored == 6
    assert len(model.asked) == 3


def test_an_interrupted_run_keeps_its_batches(tmp_path: Path) -> None:
    class Interrupted(Model):
        def answer(self, key, request):
            if request.id == "r7":
                raise KeyboardInterrupt
            return super().answer(key, request)

    with pytest.raises(KeyboardInterrupt):
        run(ask(*"abcdefghi"), Interrupted(), tmp_path / "s")
    assert run(ask(*"abcdefghi"), Model(), tmp_path / "s").counts.stored == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results: results[1:], "without a result"),
        (lambda results: [*results, results[0]], "twice"),
        (lambda results: [Result(bytes(32), "", 0, 0, "stop")], "not given"),
    ],
)
def test_a_backend_that_answers_wrongly_is_an_error(tmp_path: Path, change, message: str) -> None:
    class Wrong(Model):
        def generate(self, requests, decoding):
            for results in super().generate(requests, decoding):
                yield change(results)

    with pytest.raises(RuntimeError, match=message):
        run(ask(*"abcde"), Wrong(), tmp_path / "s")


def test_an_image_that_cannot_be_read_fails_alone_and_is_tried_again(tmp_path: Path) -> None:
    image = tmp_path / "i.jpg"

    def requests():
        seen = {"role": "user", "content": [text_part("what is it"), IMAGE_PART]}
        return [Request("a", (seen,), (image,)), *ask("b")]

    model = Model()
    generated = run(requests(), model, tmp_path / "s")
    assert dict(generated.errors()) == {"a": f"image: {image} cannot be read: No such file or directory"}
    assert model.asked == ["r0"]
    image.write_bytes(b"now it is there")
    generated = run(requests(), model, tmp_path / "s")
    assert not list(generated.errors()) and model.asked == ["r0", "a"]


def shares_of_ranks(
    requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int = 3
) -> list[list[str]]:
    """Runs rank after rank in this process; returns what each was asked."""
    monkeypatch.setattr("recllm.processes.connect", lambda: None)
    monkeypatch.setattr("recllm.processes.sum_over_ranks", list)
    monkeypatch.setattr("recllm.mllm.generation.run._of_all_ranks", lambda keys, ids: keys)
    shares = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        model = Model()
        run(requests, model, tmp_path / f"of-{rank}")
        shares.append(model.asked)
    return shares


def test_ranks_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [set(each) for each in shares_of_ranks(ask(*map(str, range(90))), tmp_path, monkeypatch)]
    assert sum(map(len, shares)) == 90 and len(set.union(*shares)) == 90
    assert all(15 < len(share) < 45 for share in shares)


def test_a_rank_hashes_the_images_of_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for number in range(60):
        content = rng.randbytes(300) if number % 2 else rng.randbytes(rng.randrange(200, 400))
        (tmp_path / f"{number}.png").write_bytes(content)
        (tmp_path / f"copy-{number}.png").write_bytes(content)
    parts = [text_part("Describe the image."), dict(IMAGE_PART)]
    requests = [
        Request(f"{name}{number}", ({"role": "user", "content": parts},), (tmp_path / f"{name}{number}.png",))
        for name in ("", "copy-")
        for number in range(60)
    ]
    hashed: Counter[str] = Counter()
    digest = hashlib.file_digest

    def counting(file, name):
        hashed[Path(file.name).name] += 1
        return digest(file, name)

    monkeypatch.setattr("recllm.data.image_hashes.hashlib.file_digest", counting)
    shares = shares_of_ranks(requests, tmp_path, monkeypatch)
    assert len(hashed) == 120 and set(hashed.values()) == {1}  # by one rank, not by each
    assert sorted(itertools.chain(*shares)) == sorted(str(number) for number in range(60))  # copies never
    assert all(8 < len(share) < 35 for share in shares)


def test_ranks_that_are_given_different_requests_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    own, none = bytes([1]) * 32, bytes(32)
    monkeypatch.setattr("recllm.processes.sum_over_ranks", lambda numbers: [3])
    with pytest.raises(RuntimeError, match="another number"):
        _of_all_ranks(bytearray(own + own), ["a", "b"])
    monkeypatch.setattr("recllm.processes.sum_over_ranks", lambda numbers: [4])
    monkeypatch.setattr("recllm.processes.sum_bytes_over_ranks", lambda keys: keys)
    with pytest.raises(RuntimeError, match="request 'b' was taken by no rank"):
        _of_all_ranks(bytearray(own + none), ["a", "b"])


# ----------------------------------------------------------------------------------------------------- texts


def test_texts_are_the_answers_in_order_with_what_failed_in_the_metadata(tmp_path: Path) -> None:
    requests = ask(*"abcde")
    generated = run(requests, Model(fails={"r1", "r3"}), tmp_path / "s")
    write_texts(
        tmp_path / "t.parquet", generated, id_name="item", metadata={"m": 1}, extra={"n": [*range(5)]}
    )
    frame, metadata = read_texts(tmp_path / "t.parquet", id_name="item")
    expected = pl.DataFrame(
        {
            "item": ["r0", "r2", "r4"],
            "text": ["A", "C", "E"],
            "prompt_hash": [requests[number].prompt_hash for number in (0, 2, 4)],
            "prompt_tokens": [3, 3, 3],
            "tokens": [2, 2, 2],
            "finish": ["stop"] * 3,
            "n": [0, 2, 4],
        }
    )
    assert_frame_equal(frame, expected, check_dtypes=False)
    assert metadata == {
        "m": 1,
        "unusable": {"r1": "server: refused r1", "r3": "server: refused r3"},
        "unusable_count": 2,
    }


def test_many_texts_are_written_in_row_groups(tmp_path: Path) -> None:
    requests = [Request(f"r{number}", (message("user", str(number % 50)),)) for number in range(20_000)]
    generated = run(requests, Model(), tmp_path / "s")
    write_texts(tmp_path / "t.parquet", generated, metadata={}, extra={"n": range(20_000)})
    frame, _ = read_texts(tmp_path / "t.parquet")
    assert frame["id"].to_list() == [request.id for request in requests]
    assert frame["text"].to_list() == [str(number % 50) for number in range(20_000)]
    assert frame["n"].to_list() == list(range(20_000))


def test_a_run_without_any_answer_writes_an_empty_table(tmp_path: Path) -> None:
    write_texts(tmp_path / "t.parquet", run([], Model(), tmp_path / "s"), metadata={})
    frame, metadata = read_texts(tmp_path / "t.parquet")
    assert frame.height == 0 and frame.schema["text"] == pl.String and metadata["unusable_count"] == 0


def test_an_id_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    generated = run([*ask("a"), *ask("b")], Model(), tmp_path / "s")
    with pytest.raises(DataError, match="'r0' stands twice"):
        write_texts(tmp_path / "t.parquet", generated, metadata={})
    assert not (tmp_path / "t.parquet").exists()


def test_what_is_not_a_file_of_texts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_texts(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not readable as parquet"):
        read_texts(tmp_path / "t.parquet")
    pl.DataFrame({"id": ["a"]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="lacks the column 'text'"):
        read_texts(tmp_path / "t.parquet")


# --------------------------------------------------------------------------------------- kills and processes


def start(
    folder: Path,
    *options: str,
    launcher: tuple[str, ...] = (sys.executable,),
    variables: dict[str, str] | None = None,
) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(variables or {})}
    return subprocess.Popen(
        [*launcher, str(PROGRAM), str(folder), *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def undisturbed(folder: Path, *options: str) -> bytes:
    folder.mkdir()
    assert finish(start(folder, *options)) == (0, "")
    return (folder / "texts.parquet").read_bytes()


def logged(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().split() if log.exists() else []


def finished_keys(folder: Path) -> set[str]:
    """The keys that have a success in the store, whatever the moment of a kill."""
    if not (folder / "store" / "manifest.json").exists():
        return set()
    contents = GenerationStore.open(folder / "store", create=False).read_all()
    return {content["key"] for content in contents if content["error"] is None}


def test_kills_at_random_moments_change_nothing_and_nothing_is_generated_twice(tmp_path: Path) -> None:
    """22 kills: during the start, while generating and while writing; then one run to the end."""
    expected = undisturbed(tmp_path / "whole", "--count", "800")
    folder, chance = tmp_path / "killed", random.Random(5)
    folder.mkdir()
    done_after: list[tuple[int, set[str]]] = []
    for number in range(22):
        awaited = len(logged(folder)) + 1 + 4 * chance.randrange(6)
        process = start(folder, "--count", "800", "--seconds", "0.02")
        if number % 5:  # else the kill may come before the store is open
            while len(logged(folder)) < awaited:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        done_after.append((len(logged(folder)), finished_keys(folder)))
    assert 80 < len(done_after[-1][1]) < 650, "the kills should come while there is work done and left to do"
    assert finish(start(folder, "--count", "800")) == (0, "")
    assert (folder / "texts.parquet").read_bytes() == expected
    entries = logged(folder)
    for length, done in done_after:
        assert not done.intersection(entries[length:])


LAUNCHER = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


@pytest.mark.slow
def test_two_ranks_write_the_same_file_as_one(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "whole")
    folder = tmp_path / "ranks"
    folder.mkdir()
    status, errors = finish(start(folder, "--slow-rank", "1", launcher=LAUNCHER))
    assert status == 0, errors
    assert (folder / "texts.parquet").read_bytes() == expected
    times = Counter(logged(folder))
    assert times.pop("started") == 2 and len(times) == 360 and set(times.values()) == {1}
    shards = sorted(path.stat().st_size for path in (folder / "store").glob("shard-*.jsonl"))
    assert len(shards) == 2 and shards[0] > shards[1] / 2, "each rank should have written its share"


@pytest.mark.slow
def test_a_rank_that_waits_hears_of_the_other_s_death_without_a_launcher(tmp_path: Path) -> None:
    (folder := tmp_path / "ranks").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    waiting, dying = (
        start(folder, "--dying-rank", "1", variables={**shared, "RANK": str(rank)}) for rank in (0, 1)
    )
    assert finish(dying)[0] == -signal.SIGKILL
    status, errors = finish(waiting)
    assert status == 1 and "another rank has ended before its work was done" in errors
    assert not (folder / "texts.parquet").exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_one_process_finishes_it(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "whole")
    folder = tmp_path / "ranks"
    folder.mkdir()
    began = time.monotonic()
    status, _ = finish(start(folder, "--dying-rank", "1", launcher=LAUNCHER))
    assert status != 0 and time.monotonic() - began < 60
    assert not (folder / "texts.parquet").exists()
    done, length = finished_keys(folder), len(logged(folder))
    assert 100 < len(done) < 300
    assert finish(start(folder)) == (0, "")
    assert (folder / "texts.parquet").read_bytes() == expected
    assert not done.intersection(logged(folder)[length:])
