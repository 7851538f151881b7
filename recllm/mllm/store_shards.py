"""The lines of a generation store: how one is written, found, checked, read, and how writers share shards."""

from __future__ import annotations

import binascii
import contextlib
import errno
import fcntl
import mmap
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from recllm.errors import BusyError, DataError
from recllm.files import write_file
from recllm.mllm.chat import Result

PREFIX = 16  # bytes of a key that the index holds; 128 bits tell any number of requests apart
SYNC_SECONDS = 0.2
_HEAD = b'{"key":"'
_TAIL = b',"check":"'
_TAIL_SIZE = len(_TAIL) + 8 + 2  # the check's eight digits, then `"}`
_NO_ERROR = b'"error":null'
_SHORTEST = len(_HEAD) + 64 + len(_NO_ERROR) + _TAIL_SIZE
_BLOCK = 32 << 20


@dataclass(frozen=True)
class Lines:
    """Lines found in a part of a shard, in the order of the file.

    Attributes:
        prefixes: The first `PREFIX` bytes of each key; dtype `S16`.
        offsets: Where each line begins, in bytes from the start of the file.
        lengths: Bytes of each line without its newline.
        failed: Whether the line tells of an error.
    """

    prefixes: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    failed: np.ndarray


def shard_path(folder: Path, number: int) -> Path:
    """Returns the path of a shard."""
    return folder / f"shard-{number:05d}.jsonl"


def shard_numbers(folder: Path) -> list[int]:
    """Returns the numbers of the shards that there are, ascending."""
    return sorted(int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.jsonl"))


def encode_line(result: Result, *, identity: str, request_id: str) -> bytes:
    """Returns the line of a result, newline included.

    The key stands first and the check last, so that both are found without parsing. The check is the CRC-32
    of all bytes before it.
    """
    content = {
        "key": result.key.hex(),
        "identity": identity,
        "id": request_id,
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "finish": result.finish,
        "error": result.error,
    }
    body = orjson.dumps(content)[:-1]
    return b'%s,"check":"%08x"}\n' % (body, zlib.crc32(body))


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Returns the content of a line without its newline; None where the line is not as it was written."""
    body, tail = line[:-_TAIL_SIZE], line[-_TAIL_SIZE:]
    if len(line) < _SHORTEST or tail != b'%s%08x"}' % (_TAIL, zlib.crc32(body)):
        return None
    try:
        return orjson.loads(body + b"}")
    except orjson.JSONDecodeError:  # a line that something else wrote, with a check of its own
        return None


def to_result(content: dict[str, Any]) -> Result:
    """Returns the result that a decoded line holds."""
    return Result(
        bytes.fromhex(content["key"]),
        content["text"],
        content["prompt_tokens"],
        content["completion_tokens"],
        content["finish"],
        content["error"],
    )


def scan(descriptor: int, start: int, path: Path) -> Iterator[Lines]:
    """Finds the whole lines of a shard from byte `start` on, a block at a time.

    What follows the last newline is a line that is being written, or that a kill tore; it is left alone.

    Raises:
        DataError: A line cannot be one of ours; a changed text is found later, when the line is read.
    """
    block = _BLOCK
    while data := os.pread(descriptor, block, start):
        whole = data.rfind(b"\n") + 1
        if not whole:
            if len(data) < block:
                return
            block *= 2  # one line longer than the block
            continue
        lines = _find(np.frombuffer(data, np.uint8, whole))
        if isinstance(lines, int):
            raise damaged(path, start + lines)
        yield Lines(lines.prefixes, lines.offsets + start, lines.lengths, lines.failed)
        start += whole


def _find(data: np.ndarray) -> Lines | int:
    """Returns the lines in the bytes of whole lines, or the offset of one that is malformed."""
    ends = np.flatnonzero(data == ord("\n"))
    offsets = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - offsets
    if lengths.min() < _SHORTEST:
        return int(offsets[np.argmin(lengths)])
    heads = np.lib.stride_tricks.sliding_window_view(data, len(_HEAD) + 2 * PREFIX)[offsets]
    tails = np.lib.stride_tricks.sliding_window_view(data, _TAIL_SIZE + 1)[ends - _TAIL_SIZE - 1]
    digits = heads[:, len(_HEAD) :]
    fine = (heads[:, : len(_HEAD)] == np.frombuffer(_HEAD, np.uint8)).all(axis=1)
    fine &= (tails[:, 1 : len(_TAIL) + 1] == np.frombuffer(_TAIL, np.uint8)).all(axis=1)
    fine &= (((digits >= 48) & (digits <= 57)) | ((digits >= 97) & (digits <= 102))).all(axis=1)  # 0-9, a-f
    if not fine.all():
        return int(offsets[np.argmin(fine)])
    prefixes = np.frombuffer(binascii.unhexlify(digits.tobytes()), f"S{PREFIX}")
    return Lines(prefixes, offsets, lengths, failed=tails[:, 0] != ord("l"))  # of `"error":null`


def damaged(path: Path, offset: int) -> DataError:
    """Returns the error that names a damaged line by file and line number."""
    with path.open("rb") as file:
        number = 1
        left = offset
        while left and (data := file.read(min(left, _BLOCK))):
            number += data.count(b"\n")
            left -= len(data)
    return DataError(
        f"{path}, line {number}: this is not a line as recllm wrote it (a disk error, or an edit by hand). "
        f"`recllm store verify {path.parent} --repair` moves such lines to {path.with_suffix('.bad').name}; "
        "the next run then generates them again."
    )


def iterate_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Yields line number, bytes and content (None where damaged) of every whole line of a shard."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line[:-1], decode_line(line[:-1])


class ShardWriter:
    """Appends results to one shard that no other process writes meanwhile.

    Whole lines go to the kernel with one `write` before `append` returns, so that no kill of the process
    loses them. A thread tells the disk at most every `SYNC_SECONDS`; power loss can cost what came since.

    Attributes:
        number: The shard's number: the first that no other process holds.
        size: Bytes in the shard.
    """

    def __init__(self, folder: Path) -> None:
        self.number, self._descriptor = _take_shard(folder)
        self.path = shard_path(folder, self.number)
        self.size = _cut_torn_line(self._descriptor)
        self._unsynced = threading.Event()
        self._closing = threading.Event()
        self._failure: OSError | None = None
        self._syncer = threading.Thread(target=self._sync_on, name="store-sync", daemon=True)
        self._syncer.start()

    def append(self, lines: Sequence[bytes]) -> list[int]:
        """Appends encoded lines and returns their offsets.

        Raises:
            DataError: The disk is full or failed; nothing of the lines stays in the file.
        """
        start, data = os.fstat(self._descriptor).st_size, memoryview(b"".join(lines))
        try:
            if self._failure is not None:
                raise self._failure
            done = 0
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except BaseException as error:
            os.ftruncate(self._descriptor, start)
            if isinstance(error, OSError):
                raise DataError(
                    f"{self.path} cannot be written: {error.strerror}. What was written before is kept; run "
                    "the same command again when this is mended."
                ) from error
            raise
        self.size = start + len(data)
        self._unsynced.set()
        ends = np.cumsum([len(line) for line in lines])
        return [start, *(start + ends[:-1]).tolist()] if lines else []

    def close(self) -> None:
        """Waits until the disk has everything and gives the shard free."""
        if self._descriptor < 0:
            return
        self._closing.set()
        self._unsynced.set()
        self._syncer.join()
        descriptor, self._descriptor = self._descriptor, -1
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _sync_on(self) -> None:
        while not self._closing.is_set():
            self._unsynced.wait()
            self._unsynced.clear()
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._failure = error
                return
            self._closing.wait(SYNC_SECONDS)


def _take_shard(folder: Path) -> tuple[int, int]:
    """Opens and locks the first free shard, made where there is none."""
    number = 0
    while True:
        path = shard_path(folder, number)
        fresh = not path.exists()
        descriptor = lock_shard(path)
        if descriptor is None:
            number += 1
            continue
        if fresh:
            entry = os.open(folder, os.O_RDONLY)
            os.fsync(entry)
            os.close(entry)
        return number, descriptor


def lock_shard(path: Path) -> int | None:
    """Opens a shard for appending and locks it; None where another process has it.

    The kernel drops the lock however the process ends.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise DataError(
                    f"{path}: this file system has no file locks, so two processes could write one shard; "
                    "put the store on another."
                ) from None
            raise
        os.close(descriptor)  # a repair replaced the file between our open and our lock


def _cut_torn_line(descriptor: int) -> int:
    """Cuts off what a kill or a power loss left behind the last newline; returns the size."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0
    with contextlib.closing(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)) as data:
        whole = data.rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(descriptor, whole)
    return whole


def repair_shard(path: Path, bad: Sequence[int]) -> None:
    """Moves lines to the `.bad` file beside a shard; the shard is replaced whole, by a rename.

    Args:
        path: The shard.
        bad: Numbers of the lines, from 1.

    Raises:
        BusyError: A process is writing the shard.
    """
    lock = lock_shard(path)
    if lock is None:
        raise BusyError(f"{path} is being written; repair the store when the run has ended.")
    moved = set(bad)
    try:
        _cut_torn_line(lock)
        with path.with_suffix(".bad").open("ab") as aside:
            aside.writelines(line + b"\n" for number, line, _ in iterate_lines(path) if number in moved)
            aside.flush()
            os.fsync(aside.fileno())

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.writelines(
                    line + b"\n" for number, line, _ in iterate_lines(path) if number not in moved
                )

        write_file(path, write)
    finally:
        os.close(lock)
