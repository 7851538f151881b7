"""Replacing a dataset or a split never silently deletes what other commands made from it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from recllm.cli import main
from recllm.data import Dataset
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.filtering import FilterOptions, filter_dataset
from recllm.data.importing import import_dataset
from recllm.data.readers import Table
from recllm.data.sequences import open_sequences
from recllm.data.splits import SplitOptions, make_split
from recllm.data.toyworld.config import ToyworldConfig, write_toyworld
from recllm.errors import DataError
from recllm.mllm.chat import Decoding, Result
from recllm.mllm.store import GenerationStore

IDENTITY, DECODING = {"model": "m"}, Decoding(8)
KEY = bytes(range(32))


def write_log(path: Path, shift: int = 0) -> Path:
    rows = [f"u{n % 20},i{(n * 7 + n // 20 + shift) % 30},{1_600_000_000 + n}" for n in range(200)]
    path.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A dataset with everything that commands put into its folder."""
    log = write_log(tmp_path / "log.csv")
    folder = tmp_path / "shop"
    dataset, _ = import_dataset(Table(log, folder))
    split = make_split(dataset, SplitOptions(folder, "loo"))
    make_candidates(split, CandidateOptions(split.folder, negatives=5))
    (folder / "texts").mkdir()
    pl.DataFrame({"id": [f"i{n}" for n in range(1203)], "text": ["t"] * 1203}).write_parquet(
        folder / "texts" / "imsg.parquet"
    )
    for name in ("instructions/plain", "visual/tower-float32", "embeddings/imsg-abc"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
    (folder / "visual" / "tower-float32" / "tokens.bin").write_bytes(b"tokens")
    add_answer(folder, KEY, "an answer")
    return folder


def add_answer(folder: Path, key: bytes, text: str) -> None:
    with GenerationStore.open(folder / "generations").writer(IDENTITY, DECODING) as writer:
        writer.append([Result(key, text, 1, 1, "stop", None)], ["i1"])


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def commands(shop: Path, **options: bool) -> dict[str, object]:
    """Every command that replaces a dataset's folder, as a call."""
    source = shop.parent / "other"
    return {
        "import": lambda: import_dataset(
            Table(write_log(shop.parent / "new.csv", 1), shop, overwrite=True, **options)
        ),
        "filter": lambda: filter_dataset(
            import_dataset(Table(write_log(shop.parent / "new.csv", 1), source, overwrite=True))[0],
            FilterOptions(source, shop, user_core=2, overwrite=True, **options),
        ),
        "toyworld": lambda: write_toyworld(
            ToyworldConfig(shop, users=10, items=40, phases=1, overwrite=True, **options)
        ),
    }


@pytest.mark.parametrize("command", ["import", "filter", "toyworld"])
def test_a_dataset_with_derived_files_is_not_replaced_and_they_are_named(shop, command):
    before = state_of(shop)
    with pytest.raises(DataError) as raised:
        commands(shop)[command]()
    told = str(raised.value)
    for name in ("splits/loo (candidates 1+5-uniform-seed42)", "texts/imsg (1,203 answers)"):
        assert name in told
    assert "instructions/plain" in told and "--discard-derived" in told
    assert "generations (" in told.partition("would delete")[2], "what is kept is named too"
    assert state_of(shop) == before
    assert not list(shop.parent.glob(".shop*"))


@pytest.mark.parametrize("command", ["import", "filter", "toyworld"])
def test_discarding_keeps_what_a_model_made_and_any_dataset_can_use(shop, command):
    shard = shop / "generations" / "shard-00000.jsonl"
    old_hash, inode = Dataset.open(shop).data_hash, shard.stat().st_ino
    commands(shop, discard_derived=True)[command]()
    assert Dataset.open(shop).data_hash != old_hash
    assert {p.name for p in shop.iterdir()} & {"splits", "texts", "instructions"} == set()
    assert GenerationStore.open(shop / "generations").get(KEY).text == "an answer"
    assert shard.stat().st_ino == inode, "a process that appends to the store meanwhile loses nothing"
    assert (shop / "visual" / "tower-float32" / "tokens.bin").read_bytes() == b"tokens"
    assert (shop / "embeddings" / "imsg-abc" / "manifest.json").exists()
    assert not list(shop.parent.glob(".shop*"))


def test_a_dataset_with_nothing_but_stores_is_replaced_and_keeps_them(shop, capsys):
    for name in ("splits", "texts", "instructions"):
        shutil.rmtree(shop / name)
    (shop / "texts").mkdir()  # an empty folder is nothing to lose
    main(["data", "import", "table", str(write_log(shop.parent / "new.csv", 1)), str(shop), "--overwrite"])
    assert "kept from the old dataset: embeddings (0.0 MB), generations (0.0 MB)" in capsys.readouterr().out
    assert GenerationStore.open(shop / "generations").get(KEY).text == "an answer"


def test_a_linked_store_on_another_disk_stays_linked(shop):
    elsewhere = shop.parent / "disk"
    (shop / "generations").rename(elsewhere)
    (shop / "generations").symlink_to(elsewhere)
    commands(shop, discard_derived=True)["import"]()
    assert (shop / "generations").is_symlink()
    assert GenerationStore.open(shop / "generations").get(KEY).text == "an answer"


@pytest.mark.parametrize("name", ["notes.txt", "runs/plain/adapter.safetensors", ".git/HEAD"])
def test_other_files_in_a_dataset_are_not_deleted_either(shop, name):
    for each in ("splits", "texts", "instructions"):
        shutil.rmtree(shop / each)
    (shop / name).parent.mkdir(parents=True, exist_ok=True)
    (shop / name).write_text("mine")
    with pytest.raises(DataError, match=f"holds {'/'.join(name.split('/')[:2])}, which"):
        commands(shop)["import"]()
    assert (shop / name).read_text() == "mine"


def test_the_settings_in_a_manifest_do_not_depend_on_what_was_replaced(shop):
    commands(shop, discard_derived=True)["filter"]()
    assert "discard_derived" not in Dataset.open(shop).manifest["source"]["filter"]
    split = make_split(Dataset.open(shop), SplitOptions(shop, "loo", overwrite=True, discard_derived=True))
    assert not {"discard_derived", "overwrite"} & set(split.manifest["settings"])


def test_a_split_with_candidates_is_not_replaced_and_they_are_named(shop):
    dataset = Dataset.open(shop)
    options = SplitOptions(shop, "random", name="loo", overwrite=True)
    before = state_of(shop)
    with pytest.raises(DataError, match=r"loo holds candidates/1\+5-uniform-seed42, which .*--discard-der"):
        make_split(dataset, options)
    assert state_of(shop) == before
    options.discard_derived = True
    split = make_split(dataset, options)
    assert not (split.folder / "candidates").exists()
    open_sequences(split, "train")
    options.discard_derived = False
    make_split(dataset, options)  # sequences are a cache, which is built again when it is used


def test_candidates_are_replaced_but_not_what_lies_beside_them(shop):
    options = CandidateOptions(shop / "splits" / "loo", negatives=5, overwrite=True)
    split = make_split(Dataset.open(shop), SplitOptions(shop, "loo", name="again"))
    options.split = split.folder
    folder = make_candidates(split, options)
    make_candidates(split, options)
    (folder / "mine.parquet").write_text("scores")
    with pytest.raises(DataError, match=r"holds mine\.parquet, which --overwrite would delete; move"):
        make_candidates(split, options)
    assert (folder / "mine.parquet").read_text() == "scores"


def test_kill_9_while_discarding_loses_no_answer(shop):
    log = write_log(shop.parent / "new.csv", 1)
    command = [sys.executable, "-m", "recllm.cli", "data", "import", "table", str(log), str(shop)]
    command += ["--overwrite", "--discard-derived"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.perf_counter() - started
    for share in (0.5, 0.8, 0.9, 0.95, 1.0, 1.05):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        Dataset.open(shop)
        assert GenerationStore.open(shop / "generations").get(KEY).text == "an answer"


@pytest.mark.parametrize("moment", ["replace", "link", "rmtree"])
def test_a_stop_at_any_step_of_the_exchange_loses_no_answer(shop, monkeypatch, moment):
    """As a kill between two system calls would: the next call ends the process's work."""

    class Killed(BaseException):
        pass

    rmtree = shutil.rmtree

    def die(path=None, *_, **__):
        if moment == "rmtree" and Path(path).name != ".shop.partial":
            return rmtree(path)
        raise Killed

    module = {"replace": "recllm.files._exchange", "link": "os.link", "rmtree": "shutil.rmtree"}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(module, die)
        patch.setattr("recllm.files._empty", lambda folder: None)
        with pytest.raises(Killed):
            commands(shop, discard_derived=True)["import"]()
    Dataset.open(shop)
    assert GenerationStore.open(shop / "generations").get(KEY).text == "an answer"
    commands(shop, discard_derived=True)["import"]()  # the next run clears up
    assert GenerationStore.open(shop / "generations").get(KEY).text == "an answer"
    assert not list(shop.parent.glob(".shop*"))


def test_without_hard_links_stores_are_copied(shop, monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    commands(shop, discard_derived=True)["import"]()
    assert GenerationStore.open(shop / "generations").get(KEY).text == "an answer"


def test_what_is_appended_while_the_dataset_is_replaced_is_kept(shop, monkeypatch):
    """A builder opens a shard of its own after the stores were linked, before the folders change places."""
    import recllm.files

    exchange = recllm.files._exchange
    late = bytes(32)
    first = GenerationStore.open(shop / "generations").writer(IDENTITY, DECODING)  # holds shard 0

    def late_exchange(new: Path, old: Path) -> Path:
        thread = threading.Thread(target=add_answer, args=(shop, late, "late"))
        thread.start()
        thread.join()
        return exchange(new, old)

    monkeypatch.setattr(recllm.files, "_exchange", late_exchange)
    commands(shop, discard_derived=True)["import"]()
    first.append([Result(bytes([1] * 32), "later", 1, 1, "stop", None)], ["i2"])
    first.close()
    store = GenerationStore.open(shop / "generations")
    assert [store.get(key).text for key in (KEY, late, bytes([1] * 32))] == ["an answer", "late", "later"]


def test_what_recllm_remembers_of_a_checked_dataset_is_not_derived(tmp_path: Path) -> None:
    command = ["data", "toyworld", "--users", "20", "--items", "100", str(tmp_path / "toys")]
    main(command)
    (tmp_path / "toys" / ".checked.json").write_text("{}")
    (tmp_path / "toys" / ".image-hashes.npy").write_bytes(b"")
    main([*command, "--overwrite"])
    assert not (tmp_path / "toys" / ".image-hashes.npy").exists()
