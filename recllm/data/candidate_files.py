"""Candidate files, read and checked in one way by everything that builds, scores or evaluates.

A file that `recllm data candidates` wrote is verified twice: by its hash in the `manifest.json` beside it,
and by the fingerprint of its rows in its own metadata. Whichever exists must match. So a file whose rows were
altered is refused wherever it is, and a copy outside its folder is accepted by its metadata. A file with
neither is the user's own; without a protocol in its metadata it is named by its content, so that two such
files never mix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recllm.data.dataset import describe_file
from recllm.data.origins import Origin, check_same_origin
from recllm.data.tables import describe, read_table, text_ids
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json

if TYPE_CHECKING:
    from recllm.data.splits import Split

_AGAIN = "make the candidates again with `recllm data candidates SPLIT --overwrite`"


@dataclass(frozen=True, eq=False)
class Candidates:
    """A candidate file.

    Attributes:
        path: The file.
        frame: `user`, (`target`,) `item`, `label`.
        protocol: For example `loo/1+20-uniform-seed42`.
        fingerprint: Of the content: equal lists have one, in whatever order or kind of file they are stored.
        origin: The dataset and the split that they were drawn for, where the file or its manifest says.
    """

    path: Path
    frame: pl.DataFrame
    protocol: str
    fingerprint: str
    origin: Origin

    @classmethod
    def read(cls, path: Path) -> Candidates:
        """Reads a file and checks its content, its manifest and its fingerprint.

        Raises:
            DataError: It is not a candidate file, or not as it was written.
        """
        manifest = _manifest_of(Path(path))
        frame, metadata = read_table(path)
        frame = check_candidates(frame, str(path))
        found = fingerprint(frame)
        if (stated := metadata.get("recllm.candidates", found)) != found:
            raise DataError(
                f"{path} was altered: its metadata states the fingerprint {stated}, but its rows have "
                f"{found}; {_AGAIN}, or write lists of your own without the `recllm.*` metadata"
            )
        hashes = {key.removeprefix("recllm."): value for key, value in metadata.items()}
        protocol = metadata.get("recllm.protocol") or f"candidates-{found[:12]}"
        origin = Origin.of_manifest(path, {**manifest, **hashes}, "was drawn from", candidates=found)
        return cls(path, frame, protocol, found, origin)


class CandidateLists:
    """The negatives of each (user, target) as item codes, held in arrays.

    Args:
        candidates: The candidates of one part of the split.
        split: The split.

    Raises:
        DataError: The file names a user or an item that the dataset does not have.
    """

    def __init__(self, candidates: Candidates, split: Split) -> None:
        self._path, self._dataset = candidates.path, split.dataset
        ids = {"user": split.dataset.users["user"], "item": split.dataset.items["item"]}
        frame = candidates.frame
        users, targets, items = (
            frame[name].cast(pl.Enum(ids["user" if name == "user" else "item"]), strict=False).to_physical()
            for name in ("user", "target", "item")
        )
        for name, codes in (("user", users), ("target", targets), ("item", items)):
            if codes.null_count():
                row = describe(frame.row(int(codes.is_null().arg_max() or 0), named=True))
                raise DataError(f"{candidates.path}: {row}: no such {name} in {split.dataset.folder}")
        self._n_items = len(ids["item"])
        keys = users.to_numpy().astype(np.int64) * self._n_items + targets.to_numpy()
        negative = frame["label"].to_numpy() == 0
        self._keys = np.unique(keys)
        order = np.argsort(keys[negative], kind="stable")
        self._items = items.to_numpy()[negative][order].astype(np.int32)
        self._starts = np.searchsorted(keys[negative][order], self._keys)

    def negatives(self, user: int, target: int) -> list[int]:
        """Returns the negatives of a user's target, in the file's order.

        Raises:
            DataError: The file has no list of them.
        """
        key = user * self._n_items + target
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            names = self._dataset.users["user"][user], self._dataset.items["item"][target]
            raise DataError(f"{self._path}: no list for user {names[0]!r} and target {names[1]!r}; {_AGAIN}")
        ends = [*self._starts[place + 1 : place + 2].tolist(), len(self._items)]
        return self._items[self._starts[place] : ends[0]].tolist()


def read_candidates(split: Split, name: str, part: str) -> Candidates:
    """Reads one of a split's candidate files.

    Args:
        split: The split.
        name: For example `1+20-uniform-seed42`.
        part: `valid` or `test`.

    Raises:
        DataError: The split has no candidates of that name, they are not as they were written, or they were
            drawn for another split.
    """
    path = split.folder / "candidates" / name / f"{part}.parquet"
    if not path.exists():
        held = sorted(folder.name for folder in split.folder.glob("candidates/*") if folder.is_dir())
        known = ", ".join(held) or f"none yet; make them with `recllm data candidates {split.folder}`"
        raise DataError(f"{path} does not exist; candidates of {split.folder}: {known}")
    candidates = Candidates.read(path)
    check_same_origin(candidates.origin, split.origin, remedy=_AGAIN, required=("dataset", "split"))
    return candidates


def candidate_metadata(frame: pl.DataFrame, split: Split, protocol: str) -> dict[str, str]:
    """Returns the metadata by which a candidate file stands by itself."""
    return {
        "recllm.protocol": protocol,
        "recllm.candidates": fingerprint(check_candidates(frame)),
        "recllm.data_hash": split.dataset.data_hash,
        "recllm.split_hash": split.split_hash,
    }


def fingerprint(frame: pl.DataFrame) -> str:
    """Hashes candidates as quoted text in sorted order; 64 bits, in hex."""
    digest = hashlib.sha256(",".join(frame.columns).encode())
    for part in frame.sort(frame.columns).iter_slices(2**20):
        digest.update(part.write_csv(include_header=False, quote_style="always").encode())
    return digest.hexdigest()[:16]


def check_candidates(frame: pl.DataFrame, where: str = "candidates") -> pl.DataFrame:
    """Returns `user`, (`target`,) `item`, `label` with ids as text, or raises a `DataError`."""
    keys = ["user", "target", "item"] if "target" in frame.columns else ["user", "item"]
    frame = text_ids(frame, keys, where)
    if "label" not in frame.columns:
        raise DataError(f"{where}: no column 'label'; found {', '.join(frame.columns)}")
    label = frame["label"]
    wrong = ~((label == 0) | (label == 1)).fill_null(False) if label.dtype.is_numeric() else None
    if wrong is None or wrong.any():
        row = 0 if wrong is None else wrong.arg_max()
        raise DataError(f"{where}: row {row} has label {label[row]!r}; labels must be 1 or 0")
    frame = frame.select(*keys, pl.col("label").cast(pl.Int8))
    if (twice := frame.select(keys).is_duplicated()).any():
        raise DataError(
            f"{where}: {describe(frame.row(twice.arg_max(), named=True))} stands twice in one list"
        )
    if "target" in keys:
        wrong = (frame["item"] == frame["target"]) != (frame["label"] == 1)
        if wrong.any():
            raise DataError(
                f"{where}: row {wrong.arg_max()}: label 1 must stand at the target and only there"
            )
    positives = frame.group_by(keys[:-1], maintain_order=True).agg(pl.col("label").max())
    if (bare := positives.filter(pl.col("label") == 0)).height:
        raise DataError(
            f"{where}: {bare.height} lists have no positive, the first is {describe(bare.row(0, named=True))}"
        )
    return frame


def _manifest_of(path: Path) -> Mapping[str, Any]:
    """The manifest beside a file where it lists the file, which must then be as listed."""
    place = path.parent / MANIFEST
    if not place.is_file():
        return {}
    manifest = read_json(place, "candidates (made by `recllm data candidates`)")
    files = manifest.get("files")
    if not isinstance(files, dict) or path.name not in files or not path.is_file():
        return {}
    if describe_file(path) != files[path.name]:
        raise DataError(f"{path} is not the file that {MANIFEST} describes; {_AGAIN}")
    return manifest
