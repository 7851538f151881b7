"""Sequences equal the log, keep the test part out of training, and are rebuilt when they no longer fit."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from recllm.data import write_dataset
from recllm.data.sequences import PADDING, open_sequences
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.rankers import Popularity
from tests.conftest import make_dataset


def in_order(split: Split, rows) -> list[tuple[int, int]]:
    """(time, row) of some rows, in order."""
    dataset = split.dataset
    times = dataset.timestamps if dataset.has_timestamps else np.zeros(len(dataset.user_codes))
    return sorted((int(times[row]), int(row)) for row in rows)


def by_hand(split: Split, rows) -> dict[int, list[int]]:
    dataset = split.dataset
    histories: dict[int, list[int]] = {}
    for _, row in in_order(split, rows):
        histories.setdefault(int(dataset.user_codes[row]), []).append(int(dataset.item_codes[row]) + 1)
    return histories


@pytest.mark.parametrize("method", ["loo", "ratio", "random", "users", "temporal"])
@pytest.mark.parametrize("timed", [True, False])
def test_sequences_equal_the_log_in_time(tmp_path, method, timed):
    if method == "temporal" and not timed:
        pytest.skip("a temporal split needs times")
    dataset = make_dataset(tmp_path / "d", timed=timed)
    split = make_split(dataset, SplitOptions(dataset.folder, method))
    train = open_sequences(split, "train")
    expected = by_hand(split, split.rows("train"))
    assert {int(user): train.history(place).tolist() for place, user in enumerate(train.users)} == expected
    for part in ("valid", "test"):
        sequences = open_sequences(split, part)
        targets = by_hand(split, split.rows(part, targets=True))
        asked = {user: [] for user in targets}
        for target in in_order(split, split.rows(part, targets=True)):
            asked[int(dataset.user_codes[target[1]])].append(target)
        allowed = in_order(split, split.history_rows(part))
        assert sequences.users.tolist() == sorted(targets)
        for place, user in enumerate(sequences.users.tolist()):
            first, last = sequences.target_offsets[place : place + 2]
            assert sequences.targets[first:last].tolist() == targets[user]
            mine = [each for each in allowed if dataset.user_codes[each[1]] == user]
            for number, target in enumerate(asked[user]):
                earlier = [int(dataset.item_codes[row]) + 1 for time, row in mine if (time, row) < target]
                assert sequences.history(place, number).tolist() == earlier
            whole = sequences.items[sequences.offsets[place] : sequences.offsets[place + 1]].tolist()
            assert whole == earlier  # nothing is kept that is later than all targets
            first_known = sequences.history(place).tolist()
            padded = first_known[-3:] + [PADDING] * (3 - len(first_known[-3:]))
            assert sequences.batch(np.array([place]), 3).tolist() == [padded]
    assert len(train.timestamps) == (len(train.items) if timed else 0)


def test_batches_are_padded_on_the_right_with_targets_at_all_positions(small_dataset):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, "loo"))
    train = open_sequences(split, "train")
    chosen = np.array([3, 0, 7])
    for length in (1, 4, 10, 100):
        inputs, targets = train.training_batch(chosen, length)
        assert inputs.shape == targets.shape == (3, length)
        last = train.batch(chosen, length)
        for row, place in enumerate(chosen):
            history = train.history(place).tolist()
            pairs = list(itertools.pairwise(history))[-length:]
            padding = [PADDING] * (length - len(pairs))
            assert inputs[row].tolist() == [before for before, _ in pairs] + padding
            assert targets[row].tolist() == [after for _, after in pairs] + padding
            assert last[row].tolist() == history[-length:] + [PADDING] * (length - len(history))


def test_arrays_are_mapped_not_loaded(small_dataset):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, "loo"))
    assert isinstance(open_sequences(split, "train").items, np.memmap)


def test_a_dataset_that_cannot_be_written_to_has_its_sequences_elsewhere(small_dataset, tmp_path):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, "loo"))
    elsewhere = open_sequences(split, "train", cache=tmp_path / "cache").items.tolist()
    assert not (split.folder / "sequences").exists()
    assert elsewhere == open_sequences(split, "train").items.tolist()


def test_a_cache_of_another_dataset_is_not_used(tmp_path):
    log = pl.DataFrame({"user": ["u"] * 5, "item": list("bcdef")})
    decoded = []
    for name, extra in (("one", ""), ("two", "a")):
        catalog, users = pl.DataFrame({"item": sorted("bcdef" + extra)}), pl.DataFrame({"user": ["u"]})
        dataset = write_dataset(tmp_path / name, items=catalog, interactions=log, users=users, source={})
        split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
        items = open_sequences(split, "train", cache=tmp_path / "cache").items
        decoded.append(dataset.items["item"].gather(items - 1).to_list())
    assert decoded[0] == decoded[1] == ["b", "c", "d"]


def test_several_processes_open_sequences_at_once(small_dataset):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, "loo"))
    code = (
        "import sys; from recllm.data.splits import Split; from recllm.data.sequences import open_sequences;"
        "print(len(open_sequences(Split.open(sys.argv[1]), 'valid')))"
    )
    command = [sys.executable, "-c", code, str(split.folder)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate()[0].strip() for process in started} == {"60"}


def test_a_changed_split_and_a_truncated_file_are_rebuilt(small_dataset):
    options = SplitOptions(small_dataset.folder, "random", name="mine", overwrite=True)
    first = open_sequences(make_split(small_dataset, options), "train").items.copy()
    options.seed = 1
    split = make_split(small_dataset, options)
    second = open_sequences(split, "train").items.copy()
    assert first.tolist() != second.tolist()
    (split.folder / "sequences" / "train" / "manifest.json").write_text("{}")
    assert open_sequences(split, "train").items.tolist() == second.tolist()
    path = split.folder / "sequences" / "train" / "items.npy"
    path.write_bytes(path.read_bytes()[:-8])
    assert open_sequences(split, "train").items.tolist() == second.tolist()


@pytest.mark.parametrize("method", ["loo", "ratio", "random", "users", "temporal"])
def test_nothing_that_training_reads_holds_what_only_the_test_part_has(tmp_path, method):
    """Every test target is a marker item, and so is every validation target: training must not know them."""
    dataset = make_dataset(tmp_path / "plain")
    split = make_split(dataset, SplitOptions(dataset.folder, method))
    held_out = {part: split.rows(part, targets=True) for part in ("valid", "test")}
    items = dataset.interactions["item"].to_list()
    for part, rows in held_out.items():
        for row in rows:
            items[row] = f"marker-{part}-{row}"
    log = dataset.interactions.with_columns(item=pl.Series(items))
    catalog = pl.DataFrame({"item": sorted({*dataset.items["item"], *items})})
    marked = write_dataset(tmp_path / "d", items=catalog, interactions=log, users=dataset.users, source={})
    split = make_split(marked, SplitOptions(marked.folder, method))
    markers = {part: marked.items["item"].str.starts_with(f"marker-{part}").to_numpy() for part in held_out}
    is_marker = np.append(False, markers["valid"] | markers["test"])
    is_test_marker = np.append(False, markers["test"])

    assert not is_marker[open_sequences(split, "train").items].any()
    assert not is_marker[open_sequences(split, "valid").items].any()
    assert not is_test_marker[open_sequences(split, "valid").targets].any()
    assert not is_test_marker[open_sequences(split, "test").items].any()
    assert is_test_marker[open_sequences(split, "test").targets].all()
    assert not Popularity(split).scores[is_marker[1:]].any()


def test_training_and_validation_never_open_the_test_file(small_dataset):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, "loo"))
    (split.folder / "test.parquet").unlink()
    assert len(open_sequences(split, "train")) and len(open_sequences(split, "valid"))
    assert Popularity(split).scores.sum() == len(split.rows("train"))
    with pytest.raises(FileNotFoundError):
        open_sequences(split, "test")
