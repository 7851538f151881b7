"""The whole chain on the embedded model, through the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recllm.builders.chats import Chat
from recllm.builders.instruction_rows import request_of
from recllm.builders.items import SYSTEMS
from recllm.builders.prompt_length import PromptLength
from recllm.cli import main
from recllm.data.texts import read_texts
from recllm.data.toyworld import ToyWorld
from recllm.mllm.loading import load
from recllm.mllm.rendering import encode
from recllm.prompts.keywords import parse_keywords


@pytest.fixture(scope="module")
def toys(tmp_path_factory, tiny_path) -> Path:
    """A small toy world with every text that the builders write about it."""
    folder = tmp_path_factory.mktemp("chain") / "toys"
    build = ["--model", "tiny"]
    main(["data", "toyworld", "--users", "30", "--items", "100", "--seed", "5", str(folder)])
    main(["data", "split", str(folder), "loo"])
    for system in SYSTEMS:
        main(["build", "items", str(folder), *build, "--system", system])
    main(["build", "users", str(folder), *build, "--max-history", "12"])
    main(["build", "users", str(folder), *build, "--system", "mllmrec", "--max-history", "4"])
    main(["build", "image-prompts", str(folder)])
    return folder


def looks_of(folder: Path) -> dict[str, set[str]]:
    answers = ToyWorld.open(folder).item_answers
    return {row[0]: set(row[1:]) for row in answers.select("item", "color", "pattern", "shape").iter_rows()}


def named(text: str) -> set[str]:
    return {word.strip(".,;:") for word in text.split()}


@pytest.mark.parametrize(
    ("name", "least"),
    [("viu", 95), ("imsg", 90), ("grounding", 90), ("description", 85), ("image-keywords", 90)],
)
def test_texts_name_what_the_pictures_show(toys, name, least):
    texts, metadata = read_texts(toys / "texts" / f"{name}.parquet")
    looks = looks_of(toys)
    right = [looks[item] <= named(text) for item, text in texts.select("id", "text").iter_rows()]
    assert len(right) == 100 and sum(right) >= least
    assert set(texts["finish"]) == {"stop"} and metadata["unusable_count"] == 0
    assert (texts["prompt_tokens"] > texts["tokens"]).all()


def test_keywords_are_clean_lists(toys):
    table = pl.read_parquet(toys / "texts" / "keywords.parquet")
    looks = looks_of(toys)
    found = [looks[row["id"]] <= set(row["keywords"]) for row in table.iter_rows(named=True)]
    assert len(found) == 100 and sum(found) >= 95
    assert all(parse_keywords(", ".join(words)) == words for words in table["keywords"].to_list())


def test_summaries_tell_the_latest_look_and_the_one_before(toys):
    tubc, metadata = read_texts(toys / "texts" / "tubc-valid.parquet")
    looks = looks_of(toys)
    log = pl.read_parquet(toys / "interactions.parquet").sort("timestamp", maintain_order=True)
    latest = before = windows = later_windows = 0
    for user, begin, end, text in tubc.select("user", "begin", "end", "text").iter_rows():
        items = log.filter(pl.col("user") == user)["item"].to_list()
        windows += 1
        latest += looks[items[end - 1]] <= named(text.partition("Lately")[0])
        if "Before" in text:
            later_windows += 1
            before += looks[items[begin - 1]] <= named(text.partition("Before")[2])
    assert metadata["part"] == "valid" and windows >= 90 and later_windows >= 60
    assert latest / windows >= 0.9 and before / later_windows >= 0.85


@pytest.mark.parametrize("form", ["plain", "cot"])
def test_tuples_render_for_the_model_within_their_budget(toys, form, tiny_path):
    main(["build", "instructions", str(toys), "--form", form, "--negatives", "2", "--targets-per-user", "2",
          "--history", "4", "--history-as", "image+title", "--processor", "tiny",
          "--max-prompt-tokens", "900", "--name", form])  # fmt: skip
    rows = pl.read_parquet(toys / "instructions" / form / "train.parquet").to_dicts()
    counts = json.loads((toys / "instructions" / form / "manifest.json").read_text())["counts"]["train"]
    assert len(rows) == counts["rows"] == 30 * 2 * 3 and counts["longest_prompt_tokens"] <= 900
    loaded = load(tiny_path)
    length = PromptLength("tiny", toys)
    for row in rows[:24]:
        request = request_of(row, toys)
        inputs = encode(loaded, [request], [[loaded.images.load(path) for path in request.images]])
        features = (inputs["image_grid_thw"].prod(-1) // 4).sum()
        assert (inputs["input_ids"] == loaded.image_token_id).sum() == features
        tokens = length.of(row["id"], Chat(request.messages, tuple(row["images"])))
        assert tokens == inputs["input_ids"].shape[1] <= counts["longest_prompt_tokens"]


def test_a_budget_too_small_for_the_target_names_the_sample(toys, capsys):
    with pytest.raises(SystemExit):
        main(["build", "instructions", str(toys), "--processor", "tiny", "--max-prompt-tokens", "40",
              "--name", "small"])  # fmt: skip
    told = capsys.readouterr().err
    assert "u000000/" in told and "--max-prompt-tokens is 40" in told
    assert not (toys / "instructions" / "small").exists()


def test_a_smaller_budget_leaves_out_the_oldest_items(toys):
    def build(name, budget):
        main(["build", "instructions", str(toys), "--processor", "tiny", "--max-prompt-tokens", str(budget),
              "--history", "6", "--history-as", "image", "--preference", "none", "--parts", "train",
              "--name", name])  # fmt: skip
        folder = toys / "instructions" / name
        counts = json.loads((folder / "manifest.json").read_text())["counts"]["train"]
        return pl.read_parquet(folder / "train.parquet")["shown"].to_list(), counts

    full, counts = build("full", 10_000)
    assert counts["history_items_left_out"] == 0
    cut, counts = build("cut", counts["longest_prompt_tokens"] - 20)
    assert counts["history_items_left_out"] > 0
    for all_of_them, kept in zip(full, cut, strict=True):
        assert kept == all_of_them[len(all_of_them) - len(kept) :]


def test_two_ranks_under_accelerate_launch_write_the_same_files(toys, tmp_path):
    script = Path(__file__).parents[2] / "data_builders" / "summarize_users.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    path = toys / "texts" / "tubc-train.parquet"
    before, metadata = read_texts(path)
    options = [str(toys), "--model", "tiny", "--max-history", "12", "--parts", "train", "--overwrite",
               "--store", str(tmp_path / "store")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, str(script), *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    after, written = read_texts(path)
    assert after.equals(before)
    assert written.pop("run")["command"] != metadata.pop("run")["command"] and written == metadata
    shards = sorted((tmp_path / "store").glob("shard-*.jsonl"))
    assert len(shards) == 2 and all(shard.stat().st_size for shard in shards)


def test_the_posters_of_movielens(shared_data, tmp_path, tiny_path):
    raw = shared_data("ml-latest-small-posters")
    main(["data", "import", "movielens", str(raw), str(tmp_path / "ml")])
    core = ["--user-core", "5", "--item-core", "5", "--require-image"]
    main(["data", "filter", str(tmp_path / "ml"), str(tmp_path / "ml5"), *core])
    main(["data", "split", str(tmp_path / "ml5"), "loo"])
    short = ["--model", "tiny", "--max-new-tokens", "24"]
    main(["build", "items", str(tmp_path / "ml5"), *short, "--limit", "40"])
    texts, _ = read_texts(tmp_path / "ml5" / "texts" / "imsg.parquet")
    assert len(texts) == 40
    main(["build", "users", str(tmp_path / "ml5"), *short, "--limit", "10", "--max-history", "6"])
    main(["build", "instructions", str(tmp_path / "ml5"), "--form", "cot", "--limit", "10"])
    rows = pl.read_parquet(tmp_path / "ml5" / "instructions" / "loo-cot" / "train.parquet")
    assert len(rows) == 20 and set(rows["label"]) == {0, 1}
