"""log.jsonl: one JSON object for each logged step and each validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson

from recllm.files import write_file
from recllm.processes import rank


class Journal:
    """Appends lines on rank 0; other ranks write nothing.

    Args:
        path: The file.
        step: Keep lines up to this step, as a run that goes on from there does; 0 begins a new file.
    """

    def __init__(self, path: Path, step: int = 0):
        self._path = path
        if rank() == 0:
            kept = [line for line in read_log(path) if line["step"] <= step] if step else []
            content = b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in kept)
            write_file(path, lambda temporary: temporary.write_bytes(content))

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line."""
        if rank() == 0:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; a last one that a kill cut off does not count."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
