"""Instruction rows as the dataset that TRL's trainer takes: in tokens, once, kept beside the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from recllm.errors import DataError
from recllm.files import write_file
from recllm.processes import rank
from recllm.progress import Progress
from recllm.training.conversations import ConversationEncoder

if TYPE_CHECKING:
    from datasets import Dataset

    from recllm.data.instructions import InstructionPart
    from recllm.mllm.loading import LoadedModel

_BLOCK = 1024
_COLUMNS = ("id", "prompt", "completion", "images")
_TARGET = ("user", "target_row", "task")
"""Columns by which neighboring rows are about one target: the same user at the same time, one task."""


def training_rows(
    loaded: LoadedModel, part: InstructionPart, cache: Path, *, limit: int | None = None
) -> Dataset:
    """Returns the rows in tokens, as a memory-mapped dataset in the order of the file.

    Rank 0 writes them to `cache`, under a name that holds what decides them; other ranks and later runs read.
    Call it on rank 0 first (`accelerate`'s `main_process_first`).

    Args:
        loaded: The model whose template, tokenizer and pixel budget are used.
        part: The part.
        cache: Folder for the tokens.
        limit: Take the first so many rows.

    Returns:
        Columns id, input_ids, start and end (of the completion), images (files), length, and group: equal
        for neighboring rows of one task about one user at one time, whose prompts mostly begin alike.

    Raises:
        DataError: As `recllm.training.conversations.ConversationEncoder.encode`; or there are no rows.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    path = cache / f"{_fingerprint(loaded, part, limit)}.arrow"
    if not path.exists():
        table = pl.scan_parquet(part.path, glob=False, n_rows=limit)
        names = table.collect_schema().names()
        about = [name for name in _TARGET if name in names] or ["id"]
        groups = table.select(group=pl.struct(about).rle_id()).collect()["group"]
        if groups.is_empty():
            raise DataError(f"{part.path} has no rows to train on")
        write_file(path, lambda temporary: _write_tokens(temporary, loaded, part, groups))
    return Dataset.from_file(str(path))


def _write_tokens(path: Path, loaded: LoadedModel, part: InstructionPart, groups: pl.Series) -> None:
    """Writes the first rows of a part, as many as there are groups, reading a block of prompts at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "id": pa.string(),
            "input_ids": pa.list_(pa.int32()),
            "start": pa.int32(),
            "end": pa.int32(),
            "images": pa.list_(pa.string()),
            "length": pa.int32(),
            "group": pa.int32(),
        }
    )
    with (
        pa.ipc.new_stream(path, schema) as writer,
        pq.ParquetFile(part.path) as table,
        Progress(total=len(groups), desc="tokens", unit="row", disable=rank() > 0) as bar,
    ):
        encoder = ConversationEncoder(loaded, part.dataset)
        done = 0
        for batch in table.iter_batches(_BLOCK, columns=list(_COLUMNS)):
            if done == len(groups):
                break
            block = pl.DataFrame(batch).head(len(groups) - done)
            block = block.with_columns(group=groups[done : done + len(block)])
            done += len(block)
            rows = []
            for row in block.iter_rows(named=True):
                each = encoder.encode(row)
                rows.append(
                    {
                        "id": each.id,
                        "input_ids": each.tokens,
                        "start": each.start,
                        "end": each.end,
                        "images": [str(image) for image in each.images],
                        "length": len(each.tokens),
                        "group": row["group"],
                    }
                )
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            bar.update(len(rows))


def _fingerprint(loaded: LoadedModel, part: InstructionPart, limit: int | None) -> str:
    """Returns a hash of what decides the tokens: rows, template, tokenizer, pixel budget, folder."""
    digest = hashlib.sha256()
    content = {
        "file": part.description,
        "folder": str(part.dataset),
        "template": loaded.processor.chat_template,
        "images": json.loads(loaded.processor.image_processor.to_json_string()),
        "positions": loaded.max_positions,
        "limit": limit,
        "groups": _TARGET,
    }
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    with contextlib.suppress(AttributeError):  # a tokenizer without the fast library has no such text
        tokenizer = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
        unset = {"padding": None, "truncation": None}  # which every call of the tokenizer sets anew
        digest.update(json.dumps(tokenizer | unset, sort_keys=True).encode())
    digest.update(json.dumps(sorted(loaded.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()[:16]
