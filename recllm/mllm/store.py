"""The generation store: what a model wrote, by content, so that nothing is ever generated twice.

A folder that a person can read with `jq`:

    manifest.json               what this is
    identities/<hash>.json      a model and its decoding settings
    shard-00000.jsonl ...       one result a line: key, identity, id, text, tokens, finish, error, check

Each process appends to a shard of its own, so the ranks of `accelerate launch` and runs that happen to
overlap need no server. A line that `append` has returned for survives a kill of the process at any moment;
power loss costs at most what was written in about the last 0.2 seconds, see `SYNC_SECONDS`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, write_file, write_json
from recllm.mllm.chat import Decoding, Request, Result
from recllm.mllm.store_index import ABSENT, Index, is_success, place_of, unpack
from recllm.mllm.store_shards import (
    PREFIX,
    Lines,
    ShardWriter,
    damaged,
    decode_line,
    encode_line,
    scan,
    shard_numbers,
    shard_path,
    to_result,
)

_MANIFEST = {"format": "recllm generation store", "version": 1}
_LINES_AT_ONCE = 1_000_000
_READ_AT_ONCE = 4096


def request_key(
    identity: dict[str, Any], decoding: Decoding, request: Request, image_hash: Callable[[Path], str]
) -> bytes:
    """Returns the key of a request: SHA-256 of everything that decides the answer, and of nothing else.

    That is the model's identity, the decoding settings, the messages and the bytes of the images; not the
    request's id and not where the images lie. The form (sorted JSON) is ours.

    Args:
        identity: `Backend.identity`; JSON types only.
        decoding: Decoding settings.
        request: The chat.
        image_hash: For example an `ImageHashes`.

    Returns:
        32 bytes.

    Raises:
        OSError: An image cannot be read.
    """
    content = {
        "identity": identity,
        "decoding": decoding.as_dict(),
        "messages": request.messages,
        "images": [image_hash(path) for path in request.images],
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).digest()


class GenerationStore:
    """Results on disk by request key. Use `GenerationStore.open`; see the module for the layout.

    One object serves one thread. What other processes append is seen after `refresh`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = Index()
        self._indexed: dict[int, int] = {}  # shard -> bytes that the index knows
        self._files: dict[int, int] = {}  # shard -> descriptor for reading

    @classmethod
    def open(cls, folder: Path, *, create: bool = True) -> GenerationStore:
        """Opens a store and indexes its lines.

        Args:
            folder: The store's folder.
            create: Make it where it is absent.

        Raises:
            DataError: The folder is not a store, is of a newer version, or has a damaged line.
        """
        folder = Path(folder)
        manifest = folder / MANIFEST
        if create and not manifest.exists():
            _make(folder, manifest)
        content = read_json(manifest, "a generation store")
        if content != _MANIFEST:
            raise DataError(
                f"{manifest} is not that of a generation store that this recllm can read: expected "
                f"{orjson.dumps(_MANIFEST).decode()}. Open it with the recllm that wrote it."
            )
        store = cls(folder)
        store.refresh()
        return store

    def __len__(self) -> int:
        """Keys with a result, errors included."""
        return len(self._index)

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    def refresh(self) -> None:
        """Reads what was appended since, by this or another process.

        Raises:
            DataError: A line that was appended is damaged.
        """
        for number in shard_numbers(self.folder):
            path = shard_path(self.folder, number)
            if number not in self._files:
                self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found: list[Lines] = []
            for lines in scan(self._files[number], self._indexed.get(number, 0), path):
                found.append(lines)
                self._indexed[number] = int(lines.offsets[-1] + lines.lengths[-1]) + 1
                if sum(len(part.offsets) for part in found) >= _LINES_AT_ONCE:
                    self._index.add_lines(number, found)
                    found = []
            self._index.add_lines(number, found)

    def get(self, key: bytes) -> Result | None:
        """Returns the result of a key: its success, else its last error, else None."""
        return self.read_many([key])[0]

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """Returns for each key whether it has no success yet; an error does not count as done."""
        places, _ = self._index.find(keys)
        return ~is_success(places)

    def read_many(self, keys: Sequence[bytes]) -> list[Result | None]:
        """Returns the results of keys, None where there is none. Meant for some thousands of keys at a time.

        Raises:
            DataError: A line is not as it was written.
        """
        places, lengths = self._index.find(keys)
        there = np.flatnonzero(places != ABSENT)
        results: list[Result | None] = [None] * len(keys)
        shards, offsets = unpack(places[there])
        for position in np.lexsort((offsets, shards)):
            number = there[position]
            content = self._read(int(shards[position]), int(offsets[position]), int(lengths[number]))
            results[number] = to_result(content)
            if results[number].key != keys[number]:
                raise damaged(shard_path(self.folder, int(shards[position])), int(offsets[position]))
        return results

    def read_all(self) -> Iterator[dict[str, Any]]:
        """Yields the line that counts of every key, decoded, in the order of shards and lines."""
        places, lengths = self._index.winners()
        for start in range(0, len(places), _READ_AT_ONCE):
            part = slice(start, start + _READ_AT_ONCE)
            shards, offsets = unpack(places[part])
            for where in zip(shards.tolist(), offsets.tolist(), lengths[part].tolist(), strict=True):
                yield self._read(*where)

    def writer(self, identity: dict[str, Any], decoding: Decoding) -> StoreWriter:
        """Returns a writer for results of one model and decoding; a context manager.

        Raises:
            DataError: The store cannot be written, or a line in it is damaged.
        """
        content = {"identity": identity, "decoding": decoding.as_dict()}
        name = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
        path = self.folder / "identities" / f"{name}.json"
        if not path.exists():
            text = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
            write_file(path, lambda temporary: temporary.write_bytes(text))
        return StoreWriter(self, name)

    def identities(self) -> dict[str, dict[str, Any]]:
        """Returns the identity and decoding behind each identity hash of the lines."""
        files = sorted((self.folder / "identities").glob("*.json"))
        return {path.stem: read_json(path, "a generation store") for path in files}

    def _read(self, shard: int, offset: int, length: int) -> dict[str, Any]:
        content = decode_line(os.pread(self._files[shard], length, offset))
        if content is None:
            raise damaged(shard_path(self.folder, shard), offset)
        return content


class StoreWriter:
    """Appends results to a shard of its own, and to the index of its store."""

    def __init__(self, store: GenerationStore, identity: str) -> None:
        self._store = store
        self._identity = identity
        self._shard = ShardWriter(store.folder)
        try:
            store.refresh()
        except BaseException:
            self._shard.close()
            raise

    def append(self, results: Sequence[Result], request_ids: Sequence[str]) -> None:
        """Appends results, each with the id of the request that first asked for it.

        When it returns, no kill of this process loses them.

        Raises:
            DataError: The disk is full or failed.
        """
        lines = [
            encode_line(result, identity=self._identity, request_id=request_id)
            for result, request_id in zip(results, request_ids, strict=True)
        ]
        shard, store = self._shard.number, self._store
        for result, offset, line in zip(results, self._shard.append(lines), lines, strict=True):
            place = place_of(shard, offset, failed=result.error is not None)
            store._index.add(result.key[:PREFIX], place, len(line) - 1)
        store._indexed[shard] = self._shard.size

    def close(self) -> None:
        """Waits until the disk has everything."""
        self._shard.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _make(folder: Path, manifest: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}") from None
    strange = [path.name for path in folder.iterdir() if not path.name.startswith((".manifest", "manifest"))]
    if strange and not manifest.exists():
        raise DataError(
            f"{folder} is not a generation store (it has {strange[0]!r} but no manifest.json); give the "
            "folder of a store, or one that does not exist yet."
        )
    write_json(manifest, _MANIFEST)
