"""`texts/<name>.parquet`: what a model wrote, one row a request, for the steps that come after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from recllm.data.texts import COLUMNS, METADATA_KEY, check_unique
from recllm.files import write_file
from recllm.mllm.generation.run import Generated

UNUSABLE_LISTED = 1000
_ROW_GROUP = 16_384


def write_texts(
    path: Path,
    generated: Generated,
    *,
    id_name: str = "id",
    metadata: Mapping[str, Any],
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Writes the texts of a run, atomically, with memory for one row group.

    Columns: the id, `text`, `prompt_hash` (16 hex digits), `prompt_tokens`, `tokens` (of the text), `finish`,
    then the extra ones. A request without an answer has no row; the file's metadata lists it. The bytes
    depend on the requests, the results and `metadata` alone, so a run that was interrupted and resumed
    writes the same file.

    Args:
        path: The parquet file; replaced where it exists.
        generated: The results.
        id_name: What the id column is called, for example `item`.
        metadata: JSON types; kept in the file under `recllm.texts`, with `unusable` (id -> reason, the first
            1,000) and `unusable_count` added.
        extra: Further columns, a value for each request, in the order of the requests.

    Raises:
        DataError: Two requests have the same id, or the file cannot be written.
        ValueError: An extra column has another length or a taken name.
    """
    extra = dict(extra or {})
    if taken := {id_name, *COLUMNS} & set(extra) or ({id_name} & set(COLUMNS)):
        raise ValueError(f"the column names {sorted(taken)} are taken")
    if wrong := [name for name, values in extra.items() if len(values) != len(generated)]:
        raise ValueError(f"extra column {wrong[0]!r}: expected {len(generated)} values")
    check_unique(generated.ids, path)
    write_file(path, lambda temporary: _write(temporary, generated, id_name, metadata, extra))


def _write(
    path: Path,
    generated: Generated,
    id_name: str,
    metadata: Mapping[str, Any],
    extra: Mapping[str, Sequence[Any]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The types of extra columns are those of all their values, not of the first row group's.
    columns = {name: pa.array(values) for name, values in extra.items()}
    fields = [(id_name, pa.string()), ("text", pa.string()), ("prompt_hash", pa.string())]
    fields += [("prompt_tokens", pa.int32()), ("tokens", pa.int32()), ("finish", pa.string())]
    schema = pa.schema([*fields, *((name, column.type) for name, column in columns.items())])
    unusable: dict[str, str] = {}
    unusable_count = 0
    rows: list[tuple] = []
    numbers: list[int] = []

    def flush() -> None:
        parts = [
            pa.array(part, type) for part, (_, type) in zip(zip(*rows, strict=True), fields, strict=True)
        ]
        parts += [column.take(pa.array(numbers, pa.int64())) for column in columns.values()]
        writer.write_table(pa.Table.from_arrays(parts, schema=schema), row_group_size=_ROW_GROUP)
        rows.clear()
        numbers.clear()

    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for number, (request_id, result) in enumerate(generated.results()):
            if result.error is not None:
                unusable_count += 1
                if len(unusable) < UNUSABLE_LISTED:
                    unusable[request_id] = result.error
                continue
            tokens = (result.prompt_tokens, result.completion_tokens)
            rows.append((request_id, result.text, generated.prompt_hash(number), *tokens, result.finish))
            numbers.append(number)
            if len(rows) == _ROW_GROUP:
                flush()
        if rows:
            flush()
        content = {**metadata, "unusable": unusable, "unusable_count": unusable_count}
        writer.add_key_value_metadata({METADATA_KEY: orjson.dumps(content, option=orjson.OPT_SORT_KEYS)})
