"""Importing small tables that a test has just written."""

from __future__ import annotations

from pathlib import Path

import pytest

from recllm.data.dataset import Dataset
from recllm.data.importing import import_dataset
from recllm.data.raw.findings import Findings
from recllm.data.readers import Table
from recllm.errors import DataError

PAIR = ["user", "item"]


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def take(path: Path, **options: object) -> tuple[Dataset, Findings]:
    return import_dataset(Table(path, path.parent / "out", overwrite=True, **options))


def pairs(path: Path, **options: object) -> list[tuple[str, str]]:
    return take(path, **options)[0].interactions.select(PAIR).rows()


def assert_refused(path: Path, message: str, **options: object) -> None:
    """Checks that an import fails with this message and leaves nothing behind, not even a hidden folder."""
    before = sorted(entry.name for entry in path.parent.iterdir())
    with pytest.raises(DataError, match=message):
        import_dataset(Table(path, path.parent / "refused", **options))
    assert sorted(entry.name for entry in path.parent.iterdir()) == before
