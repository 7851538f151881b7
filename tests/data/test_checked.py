"""A dataset is checked whole once, and again after any change; image hashes are kept in its folder."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from recllm.data import checked, image_hashes
from recllm.data.dataset import Dataset
from recllm.data.image_hashes import CACHE, ImageHashes
from recllm.errors import DataError

OLD = time.time() - 3600


def age(folder: Path) -> None:
    """Sets all time stamps back, as those of a dataset that was made an hour ago."""
    for path in sorted(folder.rglob("*"), reverse=True):
        os.utime(path, (OLD, OLD))


@pytest.fixture
def toys(tmp_path):
    from recllm.cli import main

    main(["data", "toyworld", "--users", "20", "--items", "50", str(tmp_path / "toys")])
    age(tmp_path / "toys")
    return tmp_path / "toys"


@pytest.fixture
def checks(monkeypatch):
    """Counts whole checks."""
    found = []
    whole = Dataset.validate

    def validate(self):
        found.append(self.folder)
        whole(self)

    monkeypatch.setattr(Dataset, "validate", validate)
    return found


def test_a_dataset_is_checked_once(toys, checks):
    for _ in range(3):
        Dataset.open(toys)
    assert len(checks) == 1
    (toys / "splits").mkdir()  # what is made of a dataset changes nothing
    Dataset.open(toys)
    assert len(checks) == 1


def change_table(toys):
    path = toys / "interactions.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_image(toys):
    next((toys / "images").iterdir()).unlink()


def link_image(toys):
    path = next((toys / "images").iterdir())
    path.rename(toys / "elsewhere.png")
    path.symlink_to(toys / "elsewhere.png")


def link_folder(toys):
    (toys / "images").rename(toys.parent / "moved")
    (toys / "images").symlink_to(toys.parent / "moved")


@pytest.mark.parametrize("change", [change_table, remove_image, link_image, link_folder])
def test_a_changed_dataset_is_checked_again(toys, checks, change):
    Dataset.open(toys)
    change(toys)
    with pytest.raises(DataError):
        Dataset.open(toys)


@pytest.mark.parametrize(
    "note", ["", "{", "[]", "{}", '{"rules": 1, "files": null, "state": {}}', '{"rules": 0}', "null"]
)
def test_a_damaged_note_is_none(toys, checks, note):
    (toys / checked.CHECKED).write_text(note)
    Dataset.open(toys)
    assert len(checks) == 1


def test_a_note_that_leaves_out_the_tables_does_not_count(toys, checks):
    Dataset.open(toys)
    note = json.loads((toys / checked.CHECKED).read_text())
    note["state"] = {}
    (toys / checked.CHECKED).write_text(json.dumps(note))
    Dataset.open(toys)
    assert len(checks) == 2


def test_a_dataset_that_has_just_been_written_is_not_noted(toys, checks):
    os.utime(toys / "items.parquet")
    Dataset.open(toys)
    Dataset.open(toys)
    assert len(checks) == 2 and not (toys / checked.CHECKED).exists()


def test_a_folder_that_cannot_be_written_is_checked_again(toys, checks, monkeypatch):
    def fail(*_):
        raise DataError("read-only")

    monkeypatch.setattr(checked, "write_json", fail)
    Dataset.open(toys)
    Dataset.open(toys)
    assert len(checks) == 2


@pytest.fixture
def reads(monkeypatch):
    """Counts the files that are read to be hashed."""
    found = []
    digest = hashlib.file_digest

    def counting(file, name):
        found.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(image_hashes.hashlib, "file_digest", counting)
    return found


def hashes_of(folder):
    hashes = ImageHashes(folder)
    found = {path.name: hashes(path) for path in sorted((folder / "images").iterdir())}
    hashes.save()
    return found


def test_an_image_is_hashed_once_for_a_dataset(toys, reads):
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (toys / "images").iterdir()
    }
    assert hashes_of(toys) == expected
    assert len(reads) == len(expected)
    assert hashes_of(toys) == expected
    assert len(reads) == len(expected)
    (toys / CACHE).unlink()  # safe to lose
    assert hashes_of(toys) == expected


def test_a_changed_image_is_hashed_again(toys, reads):
    hashes_of(toys)
    path = next((toys / "images").iterdir())
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    replacement = toys / "new.png"
    replacement.write_bytes(content)
    os.utime(replacement, (OLD, OLD))
    replacement.replace(path)  # the same size and time
    assert hashes_of(toys)[path.name] == hashlib.sha256(content).hexdigest()


def test_an_image_that_has_just_changed_is_not_kept(toys, reads):
    path = next((toys / "images").iterdir())
    os.utime(path)
    hashes_of(toys)
    hashes_of(toys)
    assert reads.count(str(path)) == 2


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"x" * 500])
def test_a_damaged_cache_is_made_again(toys, reads, content):
    expected = hashes_of(toys)
    (toys / CACHE).write_bytes(content)
    assert hashes_of(toys) == expected
    assert len(np.load(toys / CACHE)) == len(expected)


def test_processes_that_save_at_once_lose_nothing(toys, reads):
    paths = sorted((toys / "images").iterdir())
    first, second = ImageHashes(toys), ImageHashes(toys)
    for hashes, part in ((first, paths[::2]), (second, paths[1::2])):
        for path in part:
            hashes(path)
    first.save()
    second.save()
    assert len(np.load(toys / CACHE)) == len(paths)
    hashes_of(toys)
    assert len(reads) == len(paths)


def test_files_elsewhere_are_not_kept(toys, tmp_path):
    other = tmp_path / "other.png"
    other.write_bytes(b"x")
    os.utime(other, (OLD, OLD))
    hashes = ImageHashes(toys)
    assert hashes(other) == hashlib.sha256(b"x").hexdigest()
    hashes.save()
    assert not (toys / CACHE).exists()
    with pytest.raises(OSError):
        hashes(tmp_path / "missing.png")
