"""The loop that asks a model for what the store has not: streamed, resumable, shared among ranks."""

from __future__ import annotations

import hashlib
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from recllm import processes
from recllm.data.image_hashes import ImageHashes
from recllm.mllm.chat import Backend, Decoding, Request, Result
from recllm.mllm.generation.reasoning import answered
from recllm.mllm.store import GenerationStore, StoreWriter, request_key
from recllm.progress import Progress

KEY_SIZE = 32
_AT_ONCE = 4096
_NO_KEY = bytes(KEY_SIZE)
_TAIL = 64


@dataclass(frozen=True)
class Counts:
    """What became of a run's requests, over all ranks.

    Attributes:
        requests: All requests.
        unique: Requests of different content.
        stored: Of the unique ones, those that the store could answer before.
        generated: Those that the model answered in this run.
        failed: Those without an answer; the next run tries them again.
    """

    requests: int
    unique: int
    stored: int
    generated: int
    failed: int


class Generated:
    """The results of a run, read from the store as they are asked for.

    Attributes:
        ids: Request ids, in the order of the requests.
        counts: What became of them.
    """

    def __init__(
        self, store: GenerationStore, ids: list[str], keys: bytearray, prompts: array, counts: Counts
    ) -> None:
        self.store, self.ids, self.counts = store, ids, counts
        self._keys, self._prompts = keys, prompts

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, number: int) -> bytes:
        """Returns the key of a request by its position."""
        return bytes(self._keys[KEY_SIZE * number : KEY_SIZE * (number + 1)])

    def prompt_hash(self, number: int) -> str:
        """Returns `Request.prompt_hash` of a request by its position."""
        return f"{self._prompts[number]:016x}"

    def results(self) -> Iterator[tuple[str, Result]]:
        """Yields (id, result) for every request, in order, errors included.

        Raises:
            DataError: A line of the store is damaged.
            RuntimeError: A result that the run had is not in the store any more.
        """
        for start in range(0, len(self.ids), _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, len(self.ids)))
            found = self.store.read_many([self.key(number) for number in numbers])
            for number, result in zip(numbers, found, strict=True):
                if result is None:
                    raise RuntimeError(f"{self.ids[number]}: its result has gone from {self.store.folder}")
                yield self.ids[number], result

    def errors(self) -> Iterator[tuple[str, str]]:
        """Yields (id, reason) for every request without an answer."""
        for request_id, result in self.results():
            if result.error is not None:
                yield request_id, result.error


def generate(
    requests: Iterable[Request],
    backend: Backend,
    store: GenerationStore,
    decoding: Decoding,
    *,
    window: int = 2048,
    progress: str | None = "generating",
    image_hashes: ImageHashes | None = None,
) -> Generated:
    """Answers requests, from the store where it can and by the model where it must.

    Every batch is in the store before the model goes on, so a run that was killed continues where it was when
    the same is run again, with any number of ranks. Equal content is generated once, and a request that
    failed is tried once a run. Under `accelerate launch` every rank is given the same requests, hashes
    and generates its share, and returns when all are done, with the results of all. Two separate runs that
    share a store at the same time are safe, but may both generate what both need.

    Args:
        requests: Read once, as a stream; ids, keys and prompt hashes are all that is kept (about 50 bytes a
            request, and the id).
        backend: Generates.
        store: Where results are kept.
        decoding: Decoding settings.
        window: Requests handed to the backend at a time, which may sort them by length.
        progress: What the progress bar is called; None for no bar.
        image_hashes: Hashes the images; None hashes each once in this run.

    Raises:
        DataError: What the backend or the store raises for the job as a whole; finished batches are kept.
        RuntimeError: The backend broke its contract, another rank ended, or the ranks were not given the same
            requests and images.
    """
    processes.connect()
    hashes = ImageHashes() if image_hashes is None else image_hashes
    ids: list[str] = []
    keys, prompts = bytearray(), array("Q")
    total = len(requests) if hasattr(requests, "__len__") else None
    silent = progress is None or processes.rank() > 0
    with (
        store.writer(backend.identity, decoding) as writer,
        Progress(
            desc=progress, total=total, unit="request", disable=silent, smoothing=0.1, leave=False
        ) as bar,
    ):
        run = _Run(backend, store, writer, decoding, bar, hashes)
        stream = iter(requests)
        while chunk := list(islice(stream, window)):
            ids.extend(request.id for request in chunk)
            prompts.extend(int(request.prompt_hash, 16) for request in chunk)
            keys += run.take(chunk)
            while len(run.waiting) >= window:
                run.answer(window)
        run.answer(window)
    hashes.save()
    keys = _of_all_ranks(keys, ids)
    generated, failed, reasoned = processes.sum_over_ranks([run.generated, len(run.failed), run.reasoned])
    if reasoned and not silent:
        print(f"note: {reasoned:,} answers began with reasoning, which was taken away", file=sys.stderr)
    store.refresh()
    unique = len(np.unique(np.frombuffer(keys, f"S{KEY_SIZE}")))
    counts = Counts(len(ids), unique, unique - generated - failed, generated, failed)
    return Generated(store, ids, keys, prompts, counts)


class _Run:
    """What one rank of a run has still to answer, and how many it has answered."""

    def __init__(
        self,
        backend: Backend,
        store: GenerationStore,
        writer: StoreWriter,
        decoding: Decoding,
        bar: Progress,
        image_hashes: ImageHashes,
    ) -> None:
        self.backend, self.store, self.writer, self.decoding = backend, store, writer, decoding
        self.bar = bar
        self.rank, self.world = processes.rank(), processes.world_size()
        self.image_hashes = image_hashes
        self.waiting: dict[bytes, Request] = {}
        self.failed: set[bytes] = set()
        self.generated = self.reasoned = 0

    def take(self, chunk: list[Request]) -> bytes:
        """Puts this rank's new requests among the waiting ones.

        Returns:
            The keys of this rank's requests, and zeros in place of the others', which it does not hash.
        """
        mine = [request for request in chunk if self._is_mine(request)]
        self.bar.update(len(chunk) - len(mine))
        keys, unreadable = [], {}
        for request in mine:
            try:
                key = request_key(self.backend.identity, self.decoding, request, self.image_hashes)
            except OSError as error:
                key = request_key(self.backend.identity, self.decoding, request, _hash_path)
                unreadable[key] = f"image: {error.filename} cannot be read: {error.strerror}"
            keys.append(key)
        for request, key, missing in zip(mine, keys, self.store.missing(keys), strict=True):
            if missing and key not in self.waiting and key not in self.failed:
                if key in unreadable:
                    self._keep([Result.failed(key, unreadable[key])], [request.id])
                else:
                    self.waiting[key] = request
                    continue
            self.bar.update()
        of_mine = dict(zip(map(id, mine), keys, strict=True))
        return b"".join(of_mine.get(id(request), _NO_KEY) for request in chunk)

    def _is_mine(self, request: Request) -> bool:
        return self.world == 1 or share_of(request) % self.world == self.rank

    def answer(self, most: int) -> None:
        """Has the backend answer the requests that wait longest; each batch is stored as it comes."""
        part = dict(islice(self.waiting.items(), most))
        if not part:
            return
        for results in self.backend.generate(list(part.items()), self.decoding):
            strange = [result.key.hex() for result in results if result.key not in part]
            if strange or len({result.key for result in results}) < len(results):
                raise RuntimeError(
                    f"{type(self.backend).__name__} answered a request twice, or one that it was not given: "
                    f"{(strange or [results[0].key.hex()])[0]}"
                )
            self._keep(results, [part.pop(result.key).id for result in results])
            for result in results:
                del self.waiting[result.key]
            self.bar.update(len(results))
        if part:
            raise RuntimeError(
                f"{type(self.backend).__name__} left {len(part)} requests without a result, for example "
                f"{next(iter(part.values())).id!r}"
            )

    def _keep(self, results: list[Result], request_ids: list[str]) -> None:
        checked = [answered(result) for result in results]
        results = [result for result, _ in checked]
        self.reasoned += sum(found for _, found in checked)
        self.writer.append(results, request_ids)
        failed = [result.key for result in results if result.error is not None]
        self.failed.update(failed)
        self.generated += len(results) - len(failed)


def share_of(request: Request) -> int:
    """Returns a number that is the same for requests of equal content, without reading whole images.

    It decides which rank takes a request: equal images have the same size and the same last bytes.
    """
    digest = hashlib.blake2b(request.prompt_hash.encode(), digest_size=8)
    for path in request.images:
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                digest.update(size.to_bytes(8, "big") + file.read(_TAIL))
        except OSError:
            digest.update(os.fsencode(path))
    return int.from_bytes(digest.digest(), "big")


def _of_all_ranks(keys: bytearray, ids: list[str]) -> bytearray:
    """Returns the keys of all requests, of which each rank has those of its own."""
    world = processes.world_size()
    if world == 1:
        return keys
    (total,) = processes.sum_over_ranks([len(ids)])
    if total != world * len(ids):
        raise RuntimeError(
            f"rank {processes.rank()} was given {len(ids)} requests, other ranks another number"
        )
    merged = processes.sum_bytes_over_ranks(keys)
    for number, request in enumerate(ids):
        if merged[KEY_SIZE * number : KEY_SIZE * (number + 1)] == _NO_KEY:
            raise RuntimeError(
                f"request {request!r} was taken by no rank: the ranks do not see the same requests and images"
            )
    return merged


def _hash_path(path: object) -> str:
    """Stands for the bytes of an image that cannot be read, so that its error is told under its name."""
    return f"unreadable:{path}"
