"""Vectors of images under prompts on disk: those kept for later cycles, and the file that rankers read.

`DATASET/embeddings/prompted/<model, order, pooling>/part-NNNNN` holds what was encoded, by the SHA-256 of
image and prompt. A refinement cycle rewrites some prompts; the vectors of the others are read from here.
Parts are never changed; each rank writes one of its own, batch by batch, and a killed run resumes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl

from recllm import processes
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, write_file
from recllm.mllm.vision.building import BITS, INDEX, TOKENS, Journal
from recllm.progress import Progress
from recllm.reveal.encoding import Conditioned, PromptedEncoder
from recllm.runs.provenance import describe_run

KIND = "vectors of images under prompts"
_PART = "part-"
_ROUND = 8192  # pairs whose prompts are tokenized, and batched by length, at a time
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16"}


def pair_key(image_key: str, prompt: str) -> str:
    """Returns the SHA-256 of an image's content and a prompt, in hex.

    Args:
        image_key: As `recllm.mllm.vision.store.image_key` returns it.
        prompt: As the model reads it (`PromptedEncoder.safe`).
    """
    return hashlib.sha256(f"{image_key}\0{prompt}".encode()).hexdigest()


class VectorStore:
    """The vectors of one model, order and pooling.

    Args:
        folder: Where such stores are kept, for example DATASET/embeddings/prompted.
        identity: `PromptedEncoder.identity`; vectors of another one are kept apart.
        width: The length of a vector.
        dtype: How they are stored: `float32` or `bfloat16`.

    Raises:
        DataError: A part is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], width: int, dtype: str) -> None:
        self._head = {"kind": KIND, **identity, "width": width, "dtype": dtype}
        name = hashlib.sha256(orjson.dumps(self._head, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
        self.folder, self._width, self._bits = folder / name, width, BITS[dtype]
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return self._place(key) is not None

    def refresh(self) -> None:
        """Reads what other processes have added."""
        keys, places, self._rows = [np.empty(0, "S64")], [np.empty((0, 2), np.int64)], []
        for number, part in enumerate(self._parts()):
            manifest = read_json(part / MANIFEST, f"a part of a store of {KIND}")
            path = part / TOKENS
            expected = manifest["vectors"] * self._width * self._bits.itemsize
            if (found := path.stat().st_size if path.is_file() else 0) != expected:
                raise DataError(f"{path}: {found} bytes where {expected} should be; remove {part}")
            own = pl.read_parquet(part / INDEX, glob=False, columns=["key", "start"])
            keys.append(own["key"].to_numpy().astype("S64"))
            starts = own["start"].to_numpy()
            places.append(np.stack([np.full(len(own), number), starts], axis=1))
            self._rows.append(np.memmap(path, self._bits, "r", shape=(manifest["vectors"], self._width)))
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        self._keys, self._places = joined[order], np.concatenate(places)[order]

    def row(self, key: str) -> np.ndarray:
        """Returns a vector's bits, as `recllm.mllm.vision.building.BITS` has them; shape [width].

        Raises:
            KeyError: There is none.
        """
        if (place := self._place(key)) is None:
            raise KeyError(key)
        part, row = self._places[place]
        return self._rows[part][row]

    def add(self, encoder: PromptedEncoder, pairs: Mapping[str, Conditioned]) -> int:
        """Encodes what the store lacks. Every rank calls it with the same pairs; each encodes a share.

        A batch is on the disk before the next begins.

        Args:
            encoder: The encoder.
            pairs: By `pair_key`.

        Returns:
            How many pairs the ranks had to encode in all, including what a killed run left unfinished.
        """
        missing = sorted(key for key in pairs if key not in self)
        rank, world = processes.rank(), processes.world_size()
        numbers = [int(part.name.removeprefix(_PART)) for part in self._parts()]
        processes.sum_over_ranks([0])  # every rank has seen the same parts
        if share := missing[rank::world]:
            part = self.folder / f"{_PART}{1 + max(numbers, default=-1) + rank:05}"
            self._encode(encoder, pairs, share, part)
        processes.sum_over_ranks([0])
        if missing:
            self.refresh()
        return len(missing)

    def _encode(
        self,
        encoder: PromptedEncoder,
        pairs: Mapping[str, Conditioned],
        share: Sequence[str],
        part: Path,
    ) -> None:
        with Journal(part, self._head, KIND) as journal:
            left = [key for key in share if key not in journal.keys]
            done, silent = len(share) - len(left), processes.rank() > 0
            with Progress(None, "encoding", len(share), unit="image", initial=done, disable=silent) as bar:
                for start in range(0, len(left), _ROUND):
                    keys = left[start : start + _ROUND]
                    for places, vectors in encoder.encode([pairs[key] for key in keys]):
                        journal.append(
                            {
                                "layout": {"columns": [self._width], "tile": None},
                                "keys": [keys[place] for place in places],
                                "rows": list(vectors[:, None]),
                                "notes": [{}] * len(places),
                            }
                        )
                        bar.update(len(places))
            manifest = {**self._head, "vectors": len(journal.keys), "run": describe_run()}
            journal.finish(part, manifest)

    def _parts(self) -> list[Path]:
        parts = sorted(self.folder.glob(f"{_PART}*"))
        return [part for part in parts if part.name.removeprefix(_PART).isdecimal()]

    def _place(self, key: str) -> int | None:
        place = int(np.searchsorted(self._keys, key.encode()))
        return place if place < len(self._keys) and self._keys[place] == key.encode() else None


def write_vectors(
    path: Path,
    ids: Sequence[str],
    row_of: Callable[[int], np.ndarray],
    *,
    width: int,
    dtype: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes a .safetensors file with a tensor for each id, atomically, one vector in memory at a time.

    Args:
        path: The file; replaced where it exists.
        ids: The tensors' names.
        row_of: Returns the bits of the n-th id's vector; shape [width].
        width: The length of a vector.
        dtype: `float32` or `bfloat16`.
        metadata: Of the file.

    Raises:
        DataError: An id is `__metadata__`, which the format keeps for itself, or there is none.
    """
    if not ids or "__metadata__" in ids:
        what = "an item is called '__metadata__', a name that the format reserves" if ids else "no vectors"
        raise DataError(f"{path} was not written: {what}")
    size = width * BITS[dtype].itemsize
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for number, name in enumerate(ids):
        offsets = [number * size, (number + 1) * size]
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": [width], "data_offsets": offsets}
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for number in range(len(ids)):
                file.write(np.ascontiguousarray(row_of(number)).data)

    write_file(path, write)


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a .safetensors file; empty where it has none.

    Raises:
        DataError: It is not readable.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not readable as safetensors ({error})") from None
