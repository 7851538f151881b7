"""Scores that a run has so far: a folder of shards to which each rank appends, a line a batch.

    job.json            what is scored with what; another job does not go on here
    shard-00000.jsonl   rows, margins, masses outside, token counts, and a check of the line

A line that `append` has returned for survives a kill of the process and a loss of power. What a kill tore is
cut off when the shard is opened again.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from recllm.errors import BusyError, DataError
from recllm.files import read_json, write_json
from recllm.mllm.scoring.scorer import Scored
from recllm.mllm.store_shards import lock_shard, shard_numbers, shard_path

_JOB = "job.json"
_TAIL = b',"check":"%08x"}\n'
_TAIL_SIZE = len(_TAIL % 0)


class ScoreShards:
    """The unfinished scores of one job.

    Args:
        folder: Made by `prepare`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def prepare(cls, folder: Path, job: dict[str, Any], batch_tokens: int, *, overwrite: bool) -> None:
        """Makes the folder, or finds it as an earlier run of the same job left it.

        Args:
            folder: A hidden folder beside the file to write.
            job: What decides the scores; JSON types only.
            batch_tokens: The most tokens in a batch; what the first run of a job had holds for all, so that
                the same prompts are batched.
            overwrite: Drop the scores of another job.

        Raises:
            DataError: Scores of another job are there.
        """
        found = cls(folder)._read() if (folder / _JOB).exists() else None
        if found is not None and found["job"] != job:
            if not overwrite:
                different = sorted(
                    key for key in {**job, **found["job"]} if job.get(key) != found["job"].get(key)
                )
                raise DataError(
                    f"{folder} holds unfinished scores made with other settings ({', '.join(different)} "
                    "differ); finish them with the same settings, give another --name, or --overwrite to "
                    "drop them"
                )
            print(f"dropping the unfinished scores in {folder}, which were made with other settings")
            found = None
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / _JOB, {"kind": "unfinished scores", "batch_tokens": batch_tokens, "job": job})

    @property
    def batch_tokens(self) -> int:
        """The most tokens in a batch of this job."""
        return self._read()["batch_tokens"]

    def _read(self) -> dict[str, Any]:
        return read_json(self.folder / _JOB, "a folder of unfinished scores")

    def lines(self) -> Iterator[Scored]:
        """Yields what the shards hold; a line that is still being written is not there yet.

        Raises:
            DataError: A line is not as it was written.
        """
        for number in shard_numbers(self.folder):
            path = shard_path(self.folder, number)
            for place, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
                yield _decode(line + b"\n", f"{path}, line {place}")

    @contextmanager
    def writer(self, number: int) -> Iterator[ShardAppender]:
        """Yields what appends to the shard of one rank.

        Raises:
            BusyError: Another process appends to it.
        """
        descriptor = lock_shard(shard_path(self.folder, number))
        if descriptor is None:
            raise BusyError(f"{self.folder}: another process is scoring this; wait for it, or end it first.")
        try:
            _cut_torn_line(descriptor)
            yield ShardAppender(descriptor, shard_path(self.folder, number))
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder)


class ShardAppender:
    """Appends to one shard."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path

    def append(self, scored: Scored) -> None:
        """Appends the scores of a batch, and waits until they are on the disk.

        Raises:
            DataError: The disk is full or failed; what was written before is kept.
        """
        start, line = os.fstat(self._descriptor).st_size, memoryview(_encode(scored))
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fdatasync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, start)
            raise DataError(
                f"{self._path} cannot be written: {error.strerror}. What was scored before is kept; run the "
                "same command again when this is mended."
            ) from error


def _encode(scored: Scored) -> bytes:
    content = {
        "rows": scored.rows,
        "margin": scored.margin.tolist(),
        "outside": scored.outside.tolist(),
        "computed": scored.computed,
        "full": scored.full,
    }
    body = orjson.dumps(content)[:-1]
    return body + _TAIL % zlib.crc32(body)


def _decode(line: bytes, where: str) -> Scored:
    body, tail = line[:-_TAIL_SIZE], line[-_TAIL_SIZE:]
    if tail != _TAIL % zlib.crc32(body):
        raise DataError(f"{where}: damaged; delete the folder to score again")
    content = orjson.loads(body + b"}")
    return Scored(
        content["rows"],
        np.array(content["margin"], np.float32),
        np.array(content["outside"], np.float32),
        content["computed"],
        content["full"],
    )


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    whole = os.pread(descriptor, size, 0).rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(descriptor, whole)
