"""Histories as memory-mapped arrays: what sequence models train on, padded on the right, targets at all
positions.

Items are shifted by one, so that 0 is the padding: number `i + 1` is row `i` of the dataset's items table.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from recllm.data.dataset import MANIFEST
from recllm.data.ordering import group_by_user_in_time
from recllm.data.splits import PARTS, Split
from recllm.errors import BusyError, DataError
from recllm.files import read_json, staged_folder, write_json

PADDING = 0


class Sequences:
    """Each user's items in time order, and for `valid` and `test` what comes next. Arrays are mapped, not
    loaded.

    Attributes:
        users: User code of each sequence, ascending; shape [sequences].
        offsets: Sequence `i` is `items[offsets[i] : offsets[i + 1]]`; shape [sequences + 1].
        items: Item numbers (code + 1) of all sequences; int32, shape [interactions].
        timestamps: UTC seconds of each; int64, shape [interactions]; empty where the log has no times.
        target_offsets: As `offsets`, for `targets`.
        targets: Item numbers to be predicted; int32; empty for `train`, where every position predicts the
            next one.
    """

    NAMES = ("users", "offsets", "items", "timestamps", "target_offsets", "targets")

    def __init__(self, folder: Path) -> None:
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in self.NAMES
        }
        self.users, self.offsets, self.items = arrays["users"], arrays["offsets"], arrays["items"]
        self.timestamps = arrays["timestamps"]
        self.target_offsets, self.targets = arrays["target_offsets"], arrays["targets"]

    def __len__(self) -> int:
        return len(self.users)

    def history(self, sequence: int) -> np.ndarray:
        """Returns one whole sequence of item numbers, oldest first."""
        return self.items[self.offsets[sequence] : self.offsets[sequence + 1]]

    def batch(self, sequences: np.ndarray, length: int) -> np.ndarray:
        """Returns the last `length` items of each sequence, padded on the right.

        Args:
            sequences: Positions in `users`; shape [batch].
            length: Items a row.

        Returns:
            Item numbers; int64, shape [batch, length].
        """
        starts, ends = self.offsets[:-1][sequences], self.offsets[1:][sequences]
        return self._window(np.maximum(ends - length, starts), ends, length)

    def training_batch(self, sequences: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets for training at all positions: position `j` predicts what came after it.

        Args:
            sequences: Positions in `users`; shape [batch].
            length: Positions a row; longer sequences give their last `length + 1` items.

        Returns:
            Two arrays of item numbers, int64, shape [batch, length], padded on the right at the same places.
        """
        starts, ends = self.offsets[:-1][sequences], self.offsets[1:][sequences]
        starts = np.maximum(ends - length - 1, starts)
        return self._window(starts, ends - 1, length), self._window(starts + 1, ends, length)

    def _window(self, starts: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
        places = starts[:, None] + np.arange(length)
        inside = places < ends[:, None]
        window = np.full(places.shape, PADDING, dtype=np.int64)
        window[inside] = self.items[places[inside]]
        return window


def open_sequences(split: Split, part: str, *, cache: Path | None = None) -> Sequences:
    """Opens a part's sequences, and builds them first where they are missing or made from another split.

    `train` has each training user's training interactions. `valid` and `test` have, for each user with
    targets, the history that may be known then (see `Split.history_rows`) and the targets. The test file is
    opened for `test` only.

    Raises:
        DataError: `part` is none of the three.
    """
    if part not in PARTS:
        raise DataError(f"part {part!r}: expected one of {', '.join(PARTS)}")
    folder = (cache or split.folder / "sequences") / part
    while not _is_current(folder, split):
        try:
            _build(split, part, folder)
        except BusyError:  # another process, of several that were started together, is building them
            time.sleep(0.1)
    return Sequences(folder)


def _is_current(folder: Path, split: Split) -> bool:
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_json(folder / MANIFEST, "sequences")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.npy")}
    return manifest.get("made_from") == _origin(split) and manifest.get("bytes") == sizes


def _origin(split: Split) -> list[str]:
    """What the arrays depend on: the dataset for the item numbers, the split for the rows."""
    return [split.dataset.data_hash, split.split_hash]


def _build(split: Split, part: str, folder: Path) -> None:
    dataset = split.dataset
    if part == "train":
        rows, targets = split.rows("train"), np.empty(0, dtype=np.int64)
        users = np.unique(dataset.user_codes[rows])
    else:
        rows, targets = split.history_rows(part), split.rows(part, targets=True)
        users = np.unique(dataset.user_codes[targets])
        rows = rows[np.isin(dataset.user_codes[rows], users)]
    items, times, offsets = _in_sequence(split, rows, users)
    target_items, _, target_offsets = _in_sequence(split, targets, users)
    arrays = {
        "users": users.astype(np.int32),
        "offsets": offsets,
        "items": items,
        "timestamps": times,
        "target_offsets": target_offsets,
        "targets": target_items,
    }
    with staged_folder(folder, overwrite=True) as staging:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array, allow_pickle=False)
        sizes = {path.name: path.stat().st_size for path in staging.glob("*.npy")}
        write_json(staging / MANIFEST, {"made_from": _origin(split), "part": part, "bytes": sizes})


def _in_sequence(
    split: Split, rows: np.ndarray, users: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Item numbers and times of `rows`, grouped by `users` and in time, with offsets."""
    dataset = split.dataset
    times = dataset.timestamps[rows] if dataset.has_timestamps else None
    sequence = np.searchsorted(users, dataset.user_codes[rows])
    order, offsets = group_by_user_in_time(sequence, times, len(users))
    ordered = times[order] if times is not None else np.empty(0, dtype=np.int64)
    return (dataset.item_codes[rows[order]] + 1).astype(np.int32), ordered, offsets
