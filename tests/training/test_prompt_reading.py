"""Prompts take kilobytes a row: only those that are used are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from recllm.mllm.scoring.command import rows_to_score
from recllm.training.validation import Validation

READERS = {
    "scoring": lambda path: rows_to_score(SimpleNamespace(path=path), 2),
    "validation": lambda path: Validation(None, SimpleNamespace(path=path), users=2).rows,
}


@pytest.mark.parametrize("reader", READERS)
def test_only_the_prompts_of_the_chosen_users_are_read(reader, tmp_path: Path, monkeypatch):
    path = tmp_path / "test.parquet"
    rows = [(f"u{n // 3}", "a", "abc"[n % 3], int(n % 3 == 0), f"prompt {n}") for n in range(30)]
    columns = ["user", "target", "item", "label", "prompt"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(path, row_group_size=4)
    read, collect = [], pl.LazyFrame.collect

    def collected(frame: pl.LazyFrame, **options):
        found = collect(frame, **options)
        read.extend([found.height] * ("prompt" in found.columns))
        return found

    monkeypatch.setattr(pl.LazyFrame, "collect", collected)
    monkeypatch.delattr(pl, "read_parquet")
    expected = ["u0", "u1"] if reader == "scoring" else ["u0", "u9"]
    found = READERS[reader](path)
    assert found["user"].unique(maintain_order=True).to_list() == expected
    assert found["item"].to_list() == list("abcabc") and max(read) == 6
