"""What else the recipe tunes and is paid by: summaries, and rewards judged by models and users."""

from __future__ import annotations

import polars as pl
import pytest

from recllm.builders.items import summarize_items
from recllm.builders.options import ItemOptions
from recllm.data.dataset import Dataset
from recllm.errors import DataError
from recllm.files import read_json, write_json
from recllm.mllm.chat import hash_of_messages
from recllm.mllm.loading import load
from recllm.training.grpo.rows import read_rows
from tests.builders.worlds import split_of
from tests.training.grpo.conftest import Options, run_recipe


@pytest.fixture(scope="module")
def summarized(toys, tiny_path):
    """The toy world with VIU and IMSG texts, and a split."""
    summarize_items(ItemOptions(toys, "tiny", tag="own"))
    split_of(Dataset.open(toys))
    return toys


def test_summaries_have_the_builders_prompts(summarized, grpo: Options):
    loaded = load("tiny")
    for task, kind in (("viu", "image"), ("imsg", "text")):
        visual = {"visual": "viu-own"} if task == "imsg" else {}
        options = grpo(task=task, prompts=("image", "text"), rewards=("length",), templates=None, **visual)
        rows = read_rows(options, loaded)
        told = pl.read_parquet(summarized / "texts" / f"{task}-own.parquet")
        expected = dict(told.select("id", "prompt_hash").iter_rows())
        sources = [*rows.train, *rows.valid]
        assert {source.kind for source in sources} == {kind}
        assert {source.item: hash_of_messages(source.messages) for source in sources} == expected
        assert all(source.form == "summary" for source in sources)


def test_summaries_are_tuned_by_the_same_recipe(summarized, grpo: Options):
    run = run_recipe(
        grpo(
            task="imsg", visual="viu-own", prompts=("image", "text"), templates=None, least=4, most=12,
            rewards=("information", "reconstruction", "length", "distinctness"), max_new_tokens=24,
            max_steps=1, valid_every=1,
        )
    )  # fmt: skip
    valid = read_json(run / "metrics.json", "a run")["valid"]
    assert 0.3 < valid["information"] <= 1 and 0 <= valid["reconstruction"] <= 1
    assert valid["length"] == 1 and 4 < valid["units"] < 12
    assert "--system mllm_srec" in (run / "README.md").read_text()


def test_utility_judges_by_training_users_and_may_choose_the_step(summarized, grpo: Options):
    settings = {
        "rewards": ("length", "utility=0"), "metric": "utility", "split": "loo", "utility_users": 2,
        "utility_history": 2, "max_steps": 1, "valid_every": 1, "least": 1, "most": 8,
    }  # fmt: skip
    run = run_recipe(grpo(**settings))
    metrics = read_json(run / "metrics.json", "a run")
    assert metrics["metric"] == "utility" and 0 < metrics["valid"]["utility"] < 1
    manifest = read_json(run / "manifest.json", "a run")
    assert manifest["data"]["split_hash"]
    samples = pl.read_parquet(run / "completions.parquet")
    assert samples["utility"].drop_nulls().is_between(0, 1).all()
    with pytest.raises(DataError, match="expected the folder of a run"):
        run_recipe(grpo(out="other", scorer="nowhere", **settings))
    scorer = run.parent / "scorer"
    scorer.mkdir()
    write_json(
        scorer / "manifest.json", {"kind": "sft run", "instructions": {"data_hash": "a", "split_hash": "b"}}
    )
    with pytest.raises(DataError, match="was trained on another"):
        run_recipe(grpo(out="other", overwrite=True, scorer=str(scorer), **settings))


def test_texts_that_are_missing_are_named(grpo: Options):
    with pytest.raises(DataError, match=r"texts/none\.parquet does not exist"):
        run_recipe(grpo(rewards=("information", "length"), reference="none"))
