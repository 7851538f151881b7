"""Prompts that are read from the file as they are needed score as those of a table in memory."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recllm.data.prompt_files import FILE_ROW, PromptFile, small_columns
from recllm.errors import DataError
from recllm.mllm import load
from recllm.mllm.scoring import YesNoScorer, prompts, score_table
from recllm.mllm.scoring.job import score_into
from recllm.mllm.scoring.scorer import Session
from tests.mllm.scoring.worlds import make_images, make_rows
from tests.mllm.small_models import save_small

GROUP = 9
BATCH = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def rows(folder) -> pl.DataFrame:
    """Rows of 40 users; those of a user are together, as `recllm build instructions` writes them."""
    table = make_rows(make_images(folder, 5), users=40, seed=5).sort("target_row", maintain_order=True)
    table.write_parquet(folder / "test.parquet", row_group_size=GROUP)
    return table


@pytest.fixture(scope="module")
def model(folder):
    return load(save_small("qwen2_vl", folder / "model", seed=4))


@pytest.fixture
def scorer(model):
    return YesNoScorer(model, yes=("y",), no=("n",), batch_tokens=BATCH)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The row groups that are decoded, in order; none may be alive when the next one is."""
    groups, alive = [], []
    read = pq.ParquetFile.read_row_group

    def counted(self, group, **options):
        assert not any(table() is not None for table in alive)
        groups.append(group)
        return read(self, group, **options)

    def watched(self, group, columns):
        found = get(self, group, columns)
        alive.append(weakref.ref(found))
        return found

    get = PromptFile._group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(PromptFile, "_group", watched)
    return groups


@pytest.mark.parametrize("order", ["as written", "shuffled", "a part"])
def test_scores_from_the_file_equal_those_of_the_table(folder, rows, scorer, monkeypatch, order):
    monkeypatch.setattr(prompts, "UNIT", 7)
    small = small_columns(folder / "test.parquet")
    assert "prompt" not in small.columns
    if order == "shuffled":
        small = small.sample(fraction=1.0, shuffle=True, seed=3)
    if order == "a part":
        small = small.filter(pl.col("target_row") % 3 == 1)
    expected = score_table(scorer, rows[small[FILE_ROW]], folder)
    found = score_table(scorer, small, folder, prompts=PromptFile(folder / "test.parquet"))
    assert found.equals(expected)


def test_files_of_scores_are_the_same_bytes_also_when_resumed(folder, rows, scorer, tmp_path, monkeypatch):
    job = {"job": {"instructions": "these"}, "metadata": {"recllm.system": "small"}}
    score_into(scorer, rows, folder, tmp_path / "memory" / "s.parquet", **job)
    small, out = small_columns(folder / "test.parquet"), tmp_path / "disk" / "s.parquet"
    run, begun = Session._run, []

    def run_or_stop(self, batch, pixels):
        begun.append(len(batch))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return run(self, batch, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_run", run_or_stop)
        with pytest.raises(KeyboardInterrupt):
            score_into(scorer, small, folder, out, prompts=PromptFile(folder / "test.parquet"), **job)
    summary = score_into(scorer, small, folder, out, prompts=PromptFile(folder / "test.parquet"), **job)
    assert 0 < summary.scored < summary.rows
    assert out.read_bytes() == (tmp_path / "memory" / "s.parquet").read_bytes()


def test_each_row_group_is_decoded_once_and_held_alone(folder, rows, scorer, decoded, monkeypatch):
    monkeypatch.setattr(prompts, "UNIT", 3)
    small = small_columns(folder / "test.parquet")
    score_table(scorer, small, folder, prompts=PromptFile(folder / "test.parquet"))
    assert decoded == list(range(-(-rows.height // GROUP))) and len(decoded) > 5


def test_rows_in_any_order_from_several_threads(folder, rows):
    file = PromptFile(folder / "test.parquet")
    rng = np.random.default_rng(1)
    asked = [rng.integers(0, rows.height, 20) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(file.take, asked))
    assert all(table.equals(rows[numbers]) for table, numbers in zip(found, asked, strict=True))
    assert file.take([]).equals(rows.clear())


def test_rows_that_were_read_do_not_keep_their_row_groups_in_memory(tmp_path):
    prompts_of_10_kb = [f"{number:05}" * 2000 for number in range(1000)]
    pl.DataFrame({"prompt": prompts_of_10_kb}).write_parquet(tmp_path / "test.parquet", row_group_size=100)
    file, before = PromptFile(tmp_path / "test.parquet"), pa.total_allocated_bytes()
    found = file.take(range(0, 1000, 100))  # one of each group of a megabyte
    assert found["prompt"].to_list() == prompts_of_10_kb[::100]
    assert pa.total_allocated_bytes() - before < 1.5e6


def test_what_is_not_in_the_file_is_an_error(folder, rows, tmp_path):
    file = PromptFile(folder / "test.parquet")
    for number in (-1, rows.height):
        with pytest.raises(DataError, match=rf"test.parquet has {rows.height} rows"):
            file.take([0, number])
    rows.drop("prompt").write_parquet(tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="no column 'prompt'"):
        PromptFile(tmp_path / "bare.parquet")
