"""Prompts take kilobytes a row: only those that are used are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pyarrow.parquet as pq
import pytest

from recllm.mllm.scoring.command import rows_to_score
from recllm.training.validation import Validation

READERS = {
    "scoring": lambda path, users: rows_to_score(SimpleNamespace(path=path), users),
    "validation": lambda path, users: Validation(None, SimpleNamespace(path=path), users=users).rows,
}


@pytest.mark.parametrize("users", ["some", "all"])
@pytest.mark.parametrize("reader", READERS)
def test_no_prompt_is_read_before_it_is_used(reader, users, tmp_path: Path, monkeypatch):
    path = tmp_path / "test.parquet"
    rows = [(f"u{n // 3}", "a", "abc"[n % 3], int(n % 3 == 0), f"prompt {n}") for n in range(30)]
    columns = ["user", "target", "item", "label", "prompt"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(path, row_group_size=4)
    read, collect = [], pl.LazyFrame.collect

    def collected(frame: pl.LazyFrame, **options):
        found = collect(frame, **options)
        read.extend(found.columns)
        return found

    monkeypatch.setattr(pl.LazyFrame, "collect", collected)
    monkeypatch.delattr(pl, "read_parquet")
    monkeypatch.delattr(pq.ParquetFile, "read_row_group")
    expected = ["u0", "u1"] if reader == "scoring" else ["u0", "u9"]
    found = READERS[reader](path, 2 if users == "some" else None)
    if users == "some":
        assert found["user"].unique(maintain_order=True).to_list() == expected
        assert found["item"].to_list() == list("abcabc")
    else:
        assert found["file_row"].to_list() == list(range(30))
    assert "user" in read and "prompt" not in read and "prompt" not in found.columns
