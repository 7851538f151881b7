"""Where the line of each key is: sorted arrays of 28 bytes an entry, and a small dict for the newest ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recllm.mllm.store_shards import PREFIX, Lines

_OFFSET_BITS = 48
_FAILED = 1 << 63
_LAST = _FAILED - 2  # one less than fits, so that no place is ABSENT
_RECENT_AT_MOST = 200_000
ABSENT = np.uint64(2**64 - 1)
"""The place of a key that is not there; above every other place."""


def place_of(shard: int, offset: int, failed: bool) -> int:
    """Packs where a line is, so that the lowest of a key's places is the line that counts.

    A success counts before any error; of several successes the first in the order of shards and lines, of
    several errors the last.
    """
    position = shard << _OFFSET_BITS | offset
    return _FAILED | (_LAST - position) if failed else position


def is_success(places: np.ndarray) -> np.ndarray:
    """Returns whether places are those of successes, and neither of errors nor `ABSENT`."""
    return places < np.uint64(_FAILED)


def unpack(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shards and offsets of places that are not `ABSENT`."""
    failed = ~is_success(places)
    positions = np.where(failed, np.uint64(_LAST) - (places & np.uint64(_FAILED - 1)), places)
    mask = np.uint64((1 << _OFFSET_BITS) - 1)
    return (positions >> np.uint64(_OFFSET_BITS)).astype(np.int64), (positions & mask).astype(np.int64)


class Index:
    """Maps key prefixes to places and line lengths; of the lines of a key it keeps the one that counts."""

    def __init__(self) -> None:
        self._prefixes = np.empty(0, f"S{PREFIX}")
        self._places = np.empty(0, np.uint64)
        self._lengths = np.empty(0, np.uint32)
        self._recent: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        self._fold()
        return len(self._prefixes)

    def add(self, prefix: bytes, place: int, length: int) -> None:
        """Adds one line."""
        known = self._recent.get(prefix)
        if known is None or place < known[0]:
            self._recent[prefix] = place, length
        if len(self._recent) > _RECENT_AT_MOST:
            self._fold()

    def add_lines(self, shard: int, lines: Sequence[Lines]) -> None:
        """Adds scanned lines of one shard."""
        if not lines:
            return
        prefixes = np.concatenate([part.prefixes for part in lines])
        lengths = np.concatenate([part.lengths for part in lines]).astype(np.uint32)
        failed = np.concatenate([part.failed for part in lines])
        positions = np.concatenate([part.offsets for part in lines]).astype(np.uint64)
        positions |= np.uint64(shard << _OFFSET_BITS)
        self._merge(
            prefixes,
            np.where(failed, np.uint64(_FAILED) | (np.uint64(_LAST) - positions), positions),
            lengths,
        )

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places (`ABSENT` where there is none) and line lengths of keys."""
        prefixes = [key[:PREFIX] for key in keys]
        places = np.full(len(keys), ABSENT)
        lengths = np.zeros(len(keys), np.uint32)
        if len(self._prefixes) and keys:
            wanted = np.frombuffer(b"".join(prefixes), f"S{PREFIX}")
            slots = np.minimum(np.searchsorted(self._prefixes, wanted), len(self._prefixes) - 1)
            there = self._prefixes[slots] == wanted
            places[there] = self._places[slots[there]]
            lengths[there] = self._lengths[slots[there]]
        if self._recent:
            for number, prefix in enumerate(prefixes):
                recent = self._recent.get(prefix)
                if recent is not None and recent[0] < places[number]:
                    places[number], lengths[number] = recent
        return places, lengths

    def winners(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places and lengths of the lines that count, in the order of shards and lines."""
        self._fold()
        shards, offsets = unpack(self._places)
        order = np.lexsort((offsets, shards))
        return self._places[order], self._lengths[order]

    def _fold(self) -> None:
        if not self._recent:
            return
        recent, self._recent = self._recent, {}
        places, lengths = zip(*recent.values(), strict=True)
        self._merge(
            np.frombuffer(b"".join(recent), f"S{PREFIX}"),
            np.array(places, np.uint64),
            np.array(lengths, np.uint32),
        )

    def _merge(self, prefixes: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> None:
        order = np.argsort(places, kind="stable")
        order = order[np.argsort(prefixes[order], kind="stable")]
        prefixes, places, lengths = prefixes[order], places[order], lengths[order]
        first = np.ones(len(prefixes), bool)
        first[1:] = prefixes[1:] != prefixes[:-1]
        prefixes, places, lengths = prefixes[first], places[first], lengths[first]
        if not len(self._prefixes):
            self._prefixes, self._places, self._lengths = prefixes, places, lengths
            return
        slots = np.searchsorted(self._prefixes, prefixes)
        known = self._prefixes[np.minimum(slots, len(self._prefixes) - 1)] == prefixes
        known &= slots < len(self._prefixes)
        better = known.copy()
        better[known] = places[known] < self._places[slots[known]]
        self._places[slots[better]] = places[better]
        self._lengths[slots[better]] = lengths[better]
        new = ~known
        self._prefixes = np.insert(self._prefixes, slots[new], prefixes[new])
        self._places = np.insert(self._places, slots[new], places[new])
        self._lengths = np.insert(self._lengths, slots[new], lengths[new])
