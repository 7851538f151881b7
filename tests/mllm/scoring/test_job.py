"""Scores on disk: resumed, shared among ranks, refused where settings differ, and the command around them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recllm.data.dataset import describe_file, hash_of_files
from recllm.errors import BusyError, DataError
from recllm.mllm import load
from recllm.mllm.loading import LoadOptions
from recllm.mllm.scoring import YesNoScorer, score_table
from recllm.mllm.scoring.command import model_of, score_yes_no
from recllm.mllm.scoring.job import score_into, tied_pairs
from recllm.mllm.scoring.options import YesNoOptions
from recllm.mllm.scoring.scorer import Session
from recllm.mllm.scoring.shards import ScoreShards
from tests.mllm.scoring import killed_job
from tests.mllm.scoring.killed_job import BATCH, JOB, METADATA
from tests.mllm.scoring.worlds import make_images, make_rows
from tests.mllm.small_models import save_adapter, save_small

PROGRAM = Path(killed_job.__file__)
SPLIT = "a" * 64


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path, pl.DataFrame]:
    """A model, a folder with images and rows of 40 users, and the rows."""
    root = tmp_path_factory.mktemp("job")
    images = make_images(root, 6)
    rows = make_rows(images, users=40, seed=11)
    rows.write_parquet(root / "rows.parquet")
    return save_small("qwen2_vl", root / "model", seed=4), root, rows


@pytest.fixture
def scorer(world):
    return YesNoScorer(load(world[0]), yes=("y",), no=("n",), batch_tokens=BATCH)


def into(scorer, world, out, **options):
    return score_into(scorer, world[2], world[1], out, **{"job": JOB, "metadata": METADATA, **options})


def environment() -> dict[str, str]:
    root = str(PROGRAM.parents[3])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "TOKENIZERS_PARALLELISM": "false"}


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started: the number of threads decides the last bit of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(world, one_thread, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "small.parquet"
    into(YesNoScorer(load(world[0]), yes=("y",), no=("n",), batch_tokens=BATCH), world, out)
    return out.read_bytes()


def test_ten_kills_end_in_the_same_bytes(world, uninterrupted, tmp_path):
    out = tmp_path / "small.parquet"
    told = run([sys.executable, str(PROGRAM), str(world[0]), str(world[1]), str(out), "10"])
    assert out.read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["small.parquet"]
    rows = world[2].height
    scored = int(told.split(" scored now")[0].rpartition("; ")[2])
    assert f"{rows} rows" in told
    assert 0 < scored < rows - 10  # ten attempts left a batch or two each


def test_two_ranks_go_on_from_one_to_the_same_bytes(world, uninterrupted, scorer, tmp_path, monkeypatch):
    out = tmp_path / "small.parquet"
    interrupt(monkeypatch, after=4)
    with pytest.raises(KeyboardInterrupt):
        into(scorer, world, out)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    told = run([*launcher, str(PROGRAM), str(world[0]), str(world[1]), str(out), "0"])
    assert out.read_bytes() == uninterrupted
    assert 0 < int(told.split(" scored now")[0].rpartition("; ")[2]) < world[2].height


def interrupt(monkeypatch, after: int) -> list[int]:
    """Lets so many batches be scored, then interrupts; returns the rows of each batch that was begun."""
    run_batch, begun = Session._run, []

    def run_or_stop(self, batch, pixels):
        if len(begun) == after:
            raise KeyboardInterrupt
        begun.append(sum(len(group.prompts) for group in batch))
        return run_batch(self, batch, pixels)

    monkeypatch.setattr(Session, "_run", run_or_stop)
    return begun


def test_the_file_holds_what_score_table_returns(world, scorer, tmp_path):
    out = tmp_path / "scores" / "small.parquet"
    summary = into(scorer, world, out)
    expected = score_table(scorer, world[2], world[1])
    found = pl.read_parquet(out)
    assert found.columns == ["user", "target", "item", "score", "probability", "outside"]
    assert found.select("user", "target", "item").equals(expected.select("user", "target", "item"))
    np.testing.assert_allclose(found["score"], expected["margin"], atol=1e-5)
    assert found["score"].dtype == found["probability"].dtype == pl.Float32
    metadata = pl.read_parquet_metadata(out)
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert (summary.users, summary.rows, summary.scored) == (40, world[2].height, world[2].height)
    assert summary.computed < summary.full
    assert summary.outside == pytest.approx(expected["outside"].mean(), abs=1e-6)


def test_a_resumed_run_scores_what_is_missing_and_heeds_the_settings(world, scorer, tmp_path, monkeypatch):
    out = tmp_path / "small.parquet"
    with monkeypatch.context() as patch:
        begun = interrupt(patch, after=5)
        with pytest.raises(KeyboardInterrupt):
            into(scorer, world, out)
    shard = tmp_path / ".small.scoring" / "shard-00000.jsonl"
    with pytest.raises(DataError, match=r"other settings \(instructions differ\)"):
        into(scorer, world, out, job={"instructions": "others"})
    other = YesNoScorer(scorer.loaded, yes=("s",), no=("n",))
    with pytest.raises(DataError, match=r"\(scorer differ\)"):
        into(other, world, out)
    (image, *_) = sorted((world[1] / "images").iterdir())
    before = image.read_bytes()
    image.write_bytes(before + b"another picture")
    with pytest.raises(DataError, match=r"\(images differ\)"):
        into(scorer, world, out)
    image.write_bytes(before)
    with shard.open("ab") as file:
        file.write(b'{"rows":[0,1],"mar')  # torn
    assert into(scorer, world, out).scored == world[2].height - sum(begun)
    expected = score_table(scorer, world[2], world[1])["margin"]
    np.testing.assert_allclose(pl.read_parquet(out)["score"], expected, atol=1e-5)


def test_overwrite_drops_scores_of_other_settings(world, scorer, tmp_path, monkeypatch, capsys):
    out = tmp_path / "small.parquet"
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            into(scorer, world, out)
    summary = into(scorer, world, out, job={"instructions": "others"}, overwrite=True)
    assert summary.scored == summary.rows
    assert "dropping the unfinished scores" in capsys.readouterr().out


def test_damage_and_a_second_writer_are_refused(world, scorer, tmp_path, monkeypatch):
    out = tmp_path / "small.parquet"
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            into(scorer, world, out)
    shard = tmp_path / ".small.scoring" / "shard-00000.jsonl"
    whole = shard.read_bytes()
    with shard.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="another process is scoring"):
            into(scorer, world, out)
    first = whole.index(b"margin") + 12
    shard.write_bytes(whole[:first] + bytes([whole[first] ^ 1]) + whole[first + 1 :])
    with pytest.raises(DataError, match="line 1: damaged"):
        list(ScoreShards(shard.parent).lines())


def test_tied_pairs_are_counted_within_lists():
    scores = np.array([1, 1, 2, 2, 1], np.float32)
    assert tied_pairs(scores, [[0, 1, 2], [3, 4]]) == 1 / 4
    assert tied_pairs(scores, [[0], [1]]) == 0


@pytest.fixture
def dataset(world, tmp_path) -> Path:
    """A dataset folder with instructions, whose test part has the rows of the world."""
    folder = tmp_path / "data"
    instructions = folder / "instructions" / "plain"
    instructions.mkdir(parents=True)
    (folder / "images").symlink_to(world[1] / "images")
    files = {"items.parquet": {"sha256": "0" * 64}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    world[2].with_columns(images=pl.lit([], pl.List(pl.String)), prompt=text_only()).write_parquet(
        instructions / "test.parquet"
    )
    manifest = {
        "protocols": {"test": "loo/1+5"},
        "data_hash": hash_of_files(files),
        "split_hash": SPLIT,
        "candidates": {"test": "0123456789abcdef"},
        "settings": {"form": "plain"},
        "files": {"test.parquet": describe_file(instructions / "test.parquet")},
    }
    (instructions / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_run(folder: Path, settings: dict, dataset: Path, **changes) -> None:
    """Writes the manifest of a run that was trained on the split of the dataset's instructions."""
    rows = json.loads((dataset / "instructions" / "plain" / "manifest.json").read_text())
    facts = {key: rows[key] for key in ("data_hash", "split_hash")}
    facts = {**facts, "form": "plain", **changes}
    manifest = {"kind": "sft run", "settings": settings, "instructions": facts}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def text_only() -> pl.Expr:
    turn = pl.col("prompt").list.last().struct.field("content")
    kept = turn.list.eval(pl.element().filter(pl.element().struct.field("type") == "text"))
    return pl.concat_list(pl.struct(role=pl.lit("user"), content=kept))


def test_the_command_scores_a_run_folder(world, dataset, tmp_path, capsys):
    instructions = dataset / "instructions" / "plain"
    run_folder = save_adapter(world[0], tmp_path / "runs" / "mine")
    settings = {"model": str(world[0]), "quantization": None, "max_pixels": 9408, "dtype": "float32"}
    write_run(run_folder, settings, dataset)
    options = YesNoOptions(instructions, run=run_folder, yes=("y",), no=("n",), limit=7, out=tmp_path)
    score_yes_no(options)
    out = tmp_path / "scores" / "mine.parquet"
    found = pl.read_parquet(out)
    assert found["user"].n_unique() == 7
    assert pl.read_parquet_metadata(out)["recllm.protocol"] == "loo/1+5"
    metadata = pl.read_parquet_metadata(out)
    assert metadata["recllm.system"] == "mine" and metadata["recllm.candidates"] == "0123456789abcdef"
    told = json.loads(metadata["recllm.made"])
    assert told["split_hash"] == SPLIT and told["form"] == "plain" and told["run"]["command"]
    assert told["weights"] == [str(run_folder)] and "trained_on_other_split" not in told
    assert "7 users" in capsys.readouterr().out
    adapted = YesNoScorer(load(world[0], adapter=run_folder), yes=("y",), no=("n",))
    rows = pl.read_parquet(instructions / "test.parquet")
    expected = score_table(adapted, rows, dataset).join(found, on=["user", "target", "item"])
    np.testing.assert_allclose(expected["score"], expected["margin"], atol=1e-5)
    with pytest.raises(DataError, match="exists already"):
        score_yes_no(options)
    options.overwrite, options.probability, options.limit = True, "paper", 3
    score_yes_no(options)
    paper = pl.read_parquet(out)
    by_score, by_probability = (paper[name].to_numpy() for name in ("score", "probability"))
    assert paper["score"].dtype == paper["probability"].dtype == pl.Float64
    assert (np.argsort(by_score) == np.argsort(by_probability)).all()
    assert paper["probability"].is_between(0.26, 0.74).all()


@pytest.mark.parametrize("way", ["run", "adapter", "export"])
def test_a_run_meets_only_rows_of_its_own_split_and_form(world, dataset, tmp_path, capsys, way):
    instructions = dataset / "instructions" / "plain"
    folder = save_adapter(world[0], tmp_path / "runs" / "mine")
    settings = {"model": str(world[0]), "quantization": None, "max_pixels": 9408, "dtype": "float32"}
    which = {"run": folder} if way == "run" else {"model": str(world[0]), "adapter": str(folder)}
    if way == "export":
        which = {"model": str(save_small("qwen2_vl", tmp_path / "export", seed=4))}
        folder = Path(which["model"])
    options = YesNoOptions(instructions, yes=("y",), no=("n",), limit=2, out=tmp_path, name="mine", **which)

    def stating(kind=None, **changes):
        write_run(folder, settings, dataset, **changes)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["kind"] = kind or ("exported model" if way == "export" else "sft run")
        (folder / "manifest.json").write_text(json.dumps(manifest))

    for changes, said in (
        (
            {"split_hash": "b" * 64},
            "was trained on another split than .*test.parquet .hash bbbb.*--allow-other",
        ),
        ({"data_hash": "b" * 64}, "was trained on another state of the dataset"),
        ({"split_hash": None}, "does not state the hash of the split that it was trained on"),
    ):
        stating(**changes)
        with pytest.raises(DataError, match=said):
            score_yes_no(options)
        assert not (tmp_path / "scores").exists()
    options.allow_other_split = True
    stating(split_hash="b" * 64)
    score_yes_no(options)
    assert f"warning: {folder} was trained on another split" in capsys.readouterr().out
    made = json.loads(pl.read_parquet_metadata(tmp_path / "scores" / "mine.parquet")["recllm.made"])
    assert made["trained_on_other_split"] is True
    options.allow_other_split, options.overwrite = False, True
    for form, warned in (("plain", False), ("cot", True), (None, False)):
        stating(form=form)
        score_yes_no(options)
        assert ("was trained on cot rows, but" in capsys.readouterr().out) == warned
    made = json.loads(pl.read_parquet_metadata(tmp_path / "scores" / "mine.parquet")["recllm.made"])
    assert "trained_on_other_split" not in made


def test_options_that_make_no_sense_are_refused(world, dataset, tmp_path):
    instructions = dataset / "instructions" / "plain"
    cases = [
        ({}, "one of them"),
        ({"model": "tiny", "run": tmp_path}, "one of them"),
        ({"run": tmp_path}, "manifest.json is missing"),
        ({"model": "tiny", "part": "valid"}, "valid.parquet does not exist"),
        ({"model": "tiny", "limit": 0}, "--limit 0"),
        ({"model": "tiny", "name": "../x"}, "--name"),
        ({"model": str(world[0]), "yes": ("y",), "no": ("n",), "visual_store": "nowhere"}, "no such folder"),
        ({"model": str(world[0]), "yes": ("yess s",), "no": ("n",)}, "--yes 'yess s' is"),
    ]
    for options, reason in cases:
        with pytest.raises(DataError, match=reason):
            score_yes_no(YesNoOptions(instructions, out=tmp_path, **options))
    (instructions / "test.parquet").write_bytes(b"other")
    with pytest.raises(DataError, match="not the file that manifest"):
        score_yes_no(YesNoOptions(instructions, model="tiny", out=tmp_path))
    assert not (tmp_path / "scores").exists()


def test_a_run_is_loaded_as_it_was_trained(tmp_path):
    settings = {"model": "org/base", "quantization": "nf4", "max_pixels": 784, "dtype": "auto", "lr": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "adapter_config.json").write_text("{}")
    given = YesNoOptions(Path("x"), run=tmp_path, dtype="float32", quantization="none")
    which, name = model_of(given)
    assert which == LoadOptions("org/base", adapter=str(tmp_path), dtype="float32", max_pixels=784)
    assert name == tmp_path.name
    (tmp_path / "adapter_config.json").unlink()  # trained in full
    which, _ = model_of(YesNoOptions(Path("x"), run=tmp_path))
    assert which == LoadOptions(str(tmp_path), quantization="nf4", max_pixels=784)
