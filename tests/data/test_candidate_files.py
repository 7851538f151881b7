"""Candidate files: an altered one is refused by every command, and a copy stands by its own metadata."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest

from recllm.builders.instructions import build_instructions
from recllm.builders.options import InstructionOptions
from recllm.data.candidate_files import Candidates, read_candidates
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.errors import DataError
from recllm.evaluation.commands import RankReportConfig, rank_report
from recllm.rankers.commands import PopularityOptions, popularity
from tests.conftest import make_dataset

NAME = "1+5-uniform-seed42"


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    monkeypatch.chdir(tmp_path)
    dataset = make_dataset(tmp_path / "shop")
    split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    make_candidates(split, CandidateOptions(split.folder, negatives=5))
    return split


def file_of(split: Split) -> Path:
    return split.folder / "candidates" / NAME / "test.parquet"


def ours(path: Path) -> dict[str, str]:
    return {key: text for key, text in pl.read_parquet_metadata(path).items() if key.startswith("recllm.")}


def without_a_list(path: Path, out: Path, metadata: dict[str, str]) -> None:
    rows = pl.read_parquet(path)
    rows.filter(pl.col("user") != rows["user"][0]).write_parquet(out, metadata=metadata)


def commands(split: Split):
    """Every command that reads the file, as (name, call)."""
    options = InstructionOptions(
        split.dataset.folder, preference="none", parts=("test",), candidates=NAME, target_image=False
    )
    return (
        ("score", lambda: popularity(PopularityOptions(split.folder, candidates=NAME, overwrite=True))),
        ("eval", lambda: rank_report(RankReportConfig((Path("scores/popularity.parquet"),), file_of(split)))),
        ("build", lambda: build_instructions(options)),
    )


@pytest.mark.parametrize("kept", ["all", "protocol", "none"])
def test_a_file_that_lost_a_list_is_refused_by_every_command(split, kept, capsys):
    scored = popularity(PopularityOptions(split.folder, candidates=NAME))
    rank_report(RankReportConfig((scored,), file_of(split), resamples=50))
    metadata = ours(file_of(split))
    metadata = {key: text for key, text in metadata.items() if kept == "all" or key == f"recllm.{kept}"}
    without_a_list(file_of(split), file_of(split), metadata)
    for _, call in commands(split):
        with pytest.raises(DataError, match=r"(was altered|is not the file that manifest)"):
            call()


def test_a_copy_stands_by_its_own_metadata(split, tmp_path):
    copy = shutil.copy(file_of(split), tmp_path / "copy.parquet")
    original, copied = Candidates.read(file_of(split)), Candidates.read(copy)
    assert copied.fingerprint == original.fingerprint and copied.protocol == original.protocol
    assert copied.origin.hashes == original.origin.hashes
    assert copied.origin.hashes["split"] == split.split_hash
    without_a_list(copy, copy, ours(copy))
    with pytest.raises(DataError, match=r"copy\.parquet was altered: its metadata states the fingerprint"):
        Candidates.read(copy)
    without_a_list(file_of(split), copy, {})  # the user's own lists: no protocol but their content
    assert Candidates.read(copy).protocol.startswith("candidates-")


def test_candidates_of_another_split_are_refused(split):
    """As when the folder is copied from one split into another."""
    other = make_split(split.dataset, SplitOptions(split.dataset.folder, "ratio"))
    shutil.copytree(split.folder / "candidates", other.folder / "candidates")
    with pytest.raises(DataError, match=r"was drawn from another split than .*make the candidates again"):
        read_candidates(other, NAME, "test")
    assert read_candidates(split, NAME, "test").frame.height == 6 * 60
    for path in (split.folder / "candidates" / NAME).glob("manifest.json"):
        path.unlink()
    read_candidates(split, NAME, "test")  # the file itself still states where it belongs
    pl.read_parquet(file_of(split)).write_parquet(file_of(split))
    with pytest.raises(DataError, match="does not state the hash of the dataset"):
        read_candidates(split, NAME, "test")
