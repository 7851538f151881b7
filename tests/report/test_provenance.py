"""`recllm whatis` tells what made a file, from what, and what has changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from recllm.cli import main
from recllm.errors import DataError
from recllm.report.provenance import describe

CANDIDATES = "1+9-uniform-seed42"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    split = str(folder / "toys" / "splits" / "loo")
    commands = (
        ["data", "toyworld", str(folder / "toys"), "--users", "40", "--items", "100"],
        ["data", "split", str(folder / "toys"), "loo"],
        ["data", "candidates", split, "--negatives", "9"],
        ["score", "popularity", split, "--candidates", CANDIDATES, "--out", str(folder)],
    )
    for words in commands:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["recllm", *words])  # what a command line is remembered by
            main(words)
    return folder


@pytest.fixture
def copy(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(world, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_score_file_is_followed_back_to_the_source(copy: Path, capsys: pytest.CaptureFixture[str]):
    main(["whatis", "toys/splits/loo/candidates/" + CANDIDATES + "/test.parquet"])
    text = capsys.readouterr().out
    assert text.startswith(f"toys/splits/loo/candidates/{CANDIDATES}/test.parquet: candidate lists\n")
    assert "  toys/splits/loo: split (unchanged)" in text
    assert "    toys: dataset (unchanged)" in text and "source: kind toyworld" in text


def test_scores_name_command_candidates_split_and_dataset(copy: Path):
    lines = list(describe(Path("scores/popularity.parquet")))
    assert lines[0] == "scores/popularity.parquet: scores"
    assert any(line.startswith("  command: ") for line in lines)
    for what in ("candidate lists", "split", "dataset"):
        (line,) = [line for line in lines if line.endswith(f": {what} (unchanged)")]
        assert line.startswith("  ")
    assert not any("not found" in line for line in lines)


def test_what_has_changed_since_is_named(copy: Path, world: Path):
    moved = copy / "scores" / "popularity.parquet"
    original = str(world / "toys")
    manifest = copy / "toys" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["items.parquet"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    text = "\n".join(describe(copy / "toys" / "splits" / "loo"))
    assert "dataset (NOT AS WRITTEN: items.parquet" in text
    # A command names the first world, which is as it was.
    assert f"{original}/splits/loo: split (unchanged)" in "\n".join(describe(moved))
    altered = copy / "toys" / "splits" / "loo" / "candidates" / CANDIDATES / "test.parquet"
    altered.write_bytes(altered.read_bytes()[:-1])
    with pytest.raises(DataError, match="not readable as parquet"):
        list(describe(altered))


def test_a_missing_input_is_named(copy: Path):
    alone = copy / "elsewhere" / "deep" / "er" / "down" / "popularity.parquet"
    alone.parent.mkdir(parents=True)
    shutil.copy(copy / "toys" / "splits" / "loo" / "candidates" / CANDIDATES / "test.parquet", alone)
    shutil.rmtree(copy / "toys")
    text = "\n".join(describe(alone))
    assert "the split that it was made from (hash " in text and "was not found from here" in text


def test_a_dataset_of_the_same_name_in_another_folder_is_no_ancestor(copy: Path):
    inner = copy / "inner"
    inner.mkdir()
    shutil.copytree(copy / "toys", inner / "toys")
    manifest = inner / "toys" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["run"]["command"] = ["recllm", "data", "toyworld", "toys"]
    manifest.write_text(json.dumps(content))
    lines = list(describe(inner / "toys"))
    assert [line for line in lines if ": dataset" in line] == [f"{inner / 'toys'}: dataset"]


def test_scores_by_texts_of_items_name_the_texts_file(copy: Path):
    run = {"command": ["recllm", "score", "profile", "toys/splits/loo"], "recllm": "0"}
    texts = pl.DataFrame({"id": ["1"], "text": ["t"]})
    (copy / "toys" / "texts").mkdir()
    texts.write_parquet(
        copy / "toys" / "texts" / "mine.parquet", metadata={"recllm.texts": json.dumps({"run": run})}
    )
    made = {"recllm.made": json.dumps({"texts": "title+mine", "dataset": str(copy / "toys"), "run": run})}
    scores = pl.DataFrame({"user": ["1"], "item": ["1"], "score": [1.0]})
    scores.write_parquet(copy / "scores" / "profile.parquet", metadata=made)
    lines = list(describe(copy / "scores" / "profile.parquet"))
    assert lines[0].endswith("profile.parquet: scores")
    assert any(line.endswith("texts/mine.parquet: texts") for line in lines)


def test_a_table_of_a_dataset_belongs_to_it(copy: Path):
    assert next(describe(Path("toys/items.parquet"))) == "toys/items.parquet: part of toys, a dataset"


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear")
    for path in (tmp_path / "letter.txt", tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=r"recllm did not write it|does not exist"):
            list(describe(path))
