"""Histories as memory-mapped arrays: what sequence models train on, padded on the right, targets at all
positions.

Items are shifted by one, so that 0 is the padding: number `i + 1` is row `i` of the dataset's items table.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from recllm.data.splits import PARTS, Split
from recllm.data.user_histories import UserHistories, known_before, pair_keys
from recllm.errors import BusyError, DataError
from recllm.files import MANIFEST, read_json, staged_folder, write_json

PADDING = 0
_FORMAT = "known before each target"  # arrays of an earlier version are built again


class Sequences:
    """Each user's items in time order, and for `valid` and `test` what comes next. Arrays are mapped, not
    loaded.

    Attributes:
        users: User code of each sequence, ascending; shape [sequences].
        offsets: Sequence `i` is `items[offsets[i] : offsets[i + 1]]`; shape [sequences + 1]. For `valid` and
            `test` it ends before the user's last target.
        items: Item numbers (code + 1) of all sequences; int32, shape [interactions].
        timestamps: UTC seconds of each; int64, shape [interactions]; empty where the log has no times.
        target_offsets: As `offsets`, for `targets` and `known`.
        targets: Item numbers to be predicted, in time order; int32; empty for `train`, where every position
            predicts the next one.
        known: How many items of the sequence precede each target; int64.
    """

    NAMES = ("users", "offsets", "items", "timestamps", "target_offsets", "targets", "known")

    def __init__(self, folder: Path) -> None:
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in self.NAMES
        }
        self.users, self.offsets, self.items = arrays["users"], arrays["offsets"], arrays["items"]
        self.timestamps = arrays["timestamps"]
        self.target_offsets, self.targets = arrays["target_offsets"], arrays["targets"]
        self.known = arrays["known"]

    def __len__(self) -> int:
        return len(self.users)

    def history(self, sequence: int, target: int = 0) -> np.ndarray:
        """Returns the item numbers that precede one of a user's targets, oldest first; for `train`, all."""
        begin, end = self.offsets[sequence : sequence + 2]
        if len(self.targets):
            end = begin + self.known[self.target_offsets[sequence] + target]
        return self.items[begin:end]

    def ends(self) -> np.ndarray:
        """Returns where the history before each user's first target ends in `items`; shape [sequences]. For
        `train`, where each sequence ends."""
        if not len(self.targets):
            return np.asarray(self.offsets[1:])
        return self.offsets[:-1] + self.known[self.target_offsets[:-1]]

    def before(self, users: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Returns how many items of a user's sequence precede some targets.

        Args:
            users: User codes; shape [n].
            targets: Item numbers; shape [n].

        Returns:
            int64, shape [n].

        Raises:
            DataError: One is no target of its user.
        """
        owner = np.repeat(self.users, np.diff(self.target_offsets))
        return known_before(pair_keys(owner, self.targets), self.known, pair_keys(users, targets))

    def batch(self, sequences: np.ndarray, length: int) -> np.ndarray:
        """Returns the last `length` items before each user's first target, padded on the right; for `train`,
        the last of each sequence.

        Args:
            sequences: Positions in `users`; shape [batch].
            length: Items a row.

        Returns:
            Item numbers; int64, shape [batch, length].
        """
        starts, ends = self.offsets[:-1][sequences], self.ends()[sequences]
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
    targets, the targets and what precedes them (see `recllm.data.user_histories`). The test file is opened
    for `test` only.

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
    return [split.dataset.data_hash, split.split_hash, _FORMAT]


def _build(split: Split, part: str, folder: Path) -> None:
    dataset = split.dataset
    histories = UserHistories.of(split, part)
    counts, targets = np.diff(histories.offsets), np.diff(histories.target_offsets)
    if part == "train":
        users, target_rows, known = np.flatnonzero(counts), histories.target_rows[:0], histories.known[:0]
        targets = np.zeros_like(targets)
    else:
        users, target_rows, known = np.flatnonzero(targets), histories.target_rows, histories.known
        # The last target's history is the longest: what is later than all targets is left out.
        counts = np.zeros_like(counts)
        counts[users] = known[histories.target_offsets[1:][users] - 1]
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = histories.rows[np.repeat(histories.offsets[:-1], counts) + places]
    arrays = {
        "users": users.astype(np.int32),
        "offsets": _offsets(counts[users]),
        "items": (dataset.item_codes[rows] + 1).astype(np.int32),
        "timestamps": np.empty(0, dtype=np.int64) if dataset.timestamps is None else dataset.timestamps[rows],
        "target_offsets": _offsets(targets[users]),
        "targets": (dataset.item_codes[target_rows] + 1).astype(np.int32),
        "known": known,
    }
    with staged_folder(folder, overwrite=True) as staging:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array, allow_pickle=False)
        sizes = {path.name: path.stat().st_size for path in staging.glob("*.npy")}
        write_json(staging / MANIFEST, {"made_from": _origin(split), "part": part, "bytes": sizes})


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
