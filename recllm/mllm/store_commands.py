"""What the `recllm store ...` commands do and print, over the generation store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
from tyro.conf import Positional, arg

from recllm.errors import DataError
from recllm.files import MANIFEST, write_file
from recllm.mllm.store import GenerationStore
from recllm.mllm.store_shards import iterate_lines, repair_shard, shard_numbers, shard_path

_ROW_GROUP = 16_384
_COLUMNS = ("key", "id", "text", "prompt_tokens", "tokens", "finish", "model")


@dataclass
class StatsOptions:
    """Shows what is in a generation store: by model and decoding, how many texts and how long."""

    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """The store's folder."""


@dataclass
class VerifyOptions:
    """Reads every line of a generation store and compares it with its check."""

    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """The store's folder."""
    repair: bool = False
    """Move damaged lines to `shard-....bad`; what they held is generated again by the next run."""


@dataclass
class ExportOptions:
    """Writes the texts of a generation store as one table: key, id, text, tokens, finish, model."""

    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """The store's folder."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The table: OUT.parquet or OUT.jsonl."""
    overwrite: bool = False
    """Replace OUT where it exists."""


@dataclass
class _Tally:
    """Figures of one identity."""

    texts: int = 0
    errors: int = 0
    tokens: int = 0
    longest: int = 0
    finishes: Counter[str] = field(default_factory=Counter)


def stats(options: StatsOptions) -> None:
    """Prints the figures of a store, over the lines that count."""
    store = GenerationStore.open(options.store, create=False)
    identities = store.identities()
    tallies: dict[str, _Tally] = {}
    for content in store.read_all():
        tally = tallies.setdefault(content["identity"], _Tally())
        if content["error"] is not None:
            tally.errors += 1
            continue
        tally.texts += 1
        tally.tokens += content["completion_tokens"]
        tally.longest = max(tally.longest, content["completion_tokens"])
        tally.finishes[content["finish"]] += 1
    paths = [shard_path(store.folder, number) for number in shard_numbers(store.folder)]
    lines = sum(_count_lines(path) for path in paths)
    texts = sum(tally.texts for tally in tallies.values())
    size = sum(path.stat().st_size for path in paths)
    print(
        f"{store.folder}: {texts:,} texts, {len(store) - texts:,} errors, {lines - len(store):,} further "
        f"lines of the same requests, {len(paths)} shards, {size / 1e6:,.1f} MB"
    )
    for name, tally in sorted(tallies.items(), key=lambda pair: (-pair[1].texts, pair[0])):
        known = identities.get(name, {})
        finishes = ", ".join(f"{count:,} {finish}" for finish, count in tally.finishes.most_common())
        decoding = ", ".join(f"{key} {value}" for key, value in known.get("decoding", {}).items())
        print(f"  {_model(known, name)} ({name}; {decoding})")
        print(
            f"    {tally.texts:,} texts of {tally.tokens / max(tally.texts, 1):,.1f} tokens, at most "
            f"{tally.longest:,}; finish: {finishes or 'none'}; {tally.errors:,} errors"
        )


def verify(options: VerifyOptions) -> None:
    """Checks every line; prints what is damaged.

    Raises:
        DataError: Lines are damaged and were not moved away.
    """
    store = GenerationStore(options.store)
    if not (store.folder / MANIFEST).is_file():
        raise DataError(f"{store.folder} is not a generation store: it has no manifest.json.")
    damaged: dict[Path, list[int]] = {}
    keys = bytearray()
    lines = 0
    for path in (shard_path(store.folder, number) for number in shard_numbers(store.folder)):
        for number, _, content in iterate_lines(path):
            lines += 1
            if content is None:
                print(f"{path}, line {number}: damaged")
                damaged.setdefault(path, []).append(number)
            elif content["error"] is None:
                keys += bytes.fromhex(content["key"])
    written = np.frombuffer(keys, "S32")
    again = len(written) - len(np.unique(written))
    bad = sum(map(len, damaged.values()))
    print(
        f"{store.folder}: {lines:,} lines, {bad:,} damaged; {again:,} texts of requests that had one already"
    )
    if not damaged:
        return
    if not options.repair:
        raise DataError(
            f"{bad:,} damaged lines; `recllm store verify {store.folder} --repair` moves them to a .bad "
            "file, and the next run generates what they held again."
        )
    for path, numbers in damaged.items():
        repair_shard(path, numbers)
        print(f"{path}: {len(numbers):,} lines moved to {path.with_suffix('.bad').name}")


def export(options: ExportOptions) -> None:
    """Writes one row for every request that has a text, in the order of the store.

    Raises:
        DataError: OUT exists or is of another kind, or a line is damaged.
    """
    if options.out.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"{options.out}: expected a name that ends in .parquet or .jsonl")
    if options.out.exists() and not options.overwrite:
        raise DataError(f"{options.out} exists already; give another name, or --overwrite to replace it.")
    store = GenerationStore.open(options.store, create=False)
    write = _write_parquet if options.out.suffix == ".parquet" else _write_jsonl
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in _rows(store):
            count += 1
            yield row

    write_file(options.out, lambda temporary: write(temporary, counted()))
    print(f"{options.out}: {count:,} texts")


def _rows(store: GenerationStore) -> Iterator[dict[str, Any]]:
    models = {name: _model(content, name) for name, content in store.identities().items()}
    for content in store.read_all():
        if content["error"] is None:
            content["tokens"] = content["completion_tokens"]
            content["model"] = models.get(content["identity"], content["identity"])
            yield {name: content[name] for name in _COLUMNS}


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = ("prompt_tokens", "tokens")
    schema = pa.schema([(name, pa.int32() if name in numbers else pa.string()) for name in _COLUMNS])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while part := list(islice(rows, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _model(identity: dict[str, Any], name: str) -> str:
    return str(identity.get("identity", {}).get("model", name))


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
