"""The choice among candidates: how answers are read, what they are paid, and the recipe on such rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.errors import DataError
from recllm.files import read_json
from recllm.mllm.chat import message
from recllm.mllm.loading import load
from recllm.runs.log import read_log
from recllm.training.grpo.options import GRPOOptions
from recllm.training.grpo.rows import read_rows
from recllm.training.rewards import Answer, RewardSettings, Source, make_rewards
from recllm.training.rewards.choice import choice_fault, rank
from recllm.training.rewards.wording import faults
from tests.training.conftest import write_part
from tests.training.grpo.conftest import run_recipe


def choice(
    text: str, *, right: int = 3, candidates: int = 5, picks: int = 3, finished: bool = True
) -> Answer:
    source = Source("u/i", "i", "text", (), form="choice", right=right, candidates=candidates, picks=picks)
    return Answer(source, text, finished)


@pytest.mark.parametrize(
    ("text", "worth", "fault"),
    [
        ("3", 1, None),
        (" 3.\n", 1, None),
        ("1, 3", 1 / 2, None),
        ("5 > 1 > 3", 1 / 3, None),
        ("<think>Perhaps 2.</think>3", 1, None),
        ("1, 2", 0, "wrong"),
        ("4", 0, "wrong"),
        ("3, 3", 0, "repeated"),
        ("1, 2, 4, 3", 0, "invalid"),
        ("6", 0, "invalid"),
        ("0, 3", 0, "invalid"),
        ("The answer is 3.", 0, "invalid"),
        ("3 of 5 candidates", 0, "invalid"),
        ("-", 0, "invalid"),
    ],
)
def test_a_choice_is_paid_by_rank_and_no_fault_is_paid(text, worth, fault):
    answer = choice(text)
    assert rank(answer) == pytest.approx(worth)
    assert choice_fault(answer) == fault


def test_validity_alone_is_worth_nothing():
    """A well-formed wrong answer is worth what nonsense is: no part of the reward tells them apart."""
    rewards = make_rewards(RewardSettings({"rank": 1.0}, gate=False))
    table = rewards([choice(text) for text in ("4", "nonsense", "3, 3", "", "3")])
    np.testing.assert_array_equal(table[:, 0], [0, 0, 0, 0, 1])
    assert np.isnan(rewards([choice("3", finished=False)])[0, 0])
    told = faults(choice("4")), faults(choice("nonsense")), faults(choice("3, 3")), faults(choice(""))
    assert [next((name for name, value in each.items() if value), None) for each in told] == [
        "wrong",
        "invalid",
        "repeated",
        "empty",
    ]


@pytest.fixture(scope="module")
def choices(world: Path) -> Path:
    """Rows that ask for one of three candidates, made of plain ones, beside rows of another task."""
    folder = world / "instructions" / "choices"
    for part in ("train", "valid"):
        plain = pl.read_parquet(folder.parent / "text" / f"{part}.parquet").filter(pl.col("label") == 1)
        rows = []
        for number, row in enumerate(plain.to_dicts()):
            prompt = (
                f"Choose the next item.\nSeen:\n1. this\n2. that\nCandidates:\n1. a\n2. {row['item']}\n3. c"
            )
            rows.append(
                {
                    **row,
                    "id": f"choose:{row['id']}",
                    "prompt": [message("user", prompt)],
                    "completion": [message("assistant", str(1 + number % 3))],
                    "images": [],
                    "task": "choose",
                }
            )
        table = pl.concat(
            [pl.DataFrame(rows, infer_schema_length=None), plain.with_columns(task=pl.lit("yes_no"))],
            how="diagonal_relaxed",
        )
        write_part(folder, part, table)
    return folder


def options(choices: Path, out: Path, **changes) -> GRPOOptions:
    settings = {
        "task": "choose", "instructions": choices, "method": "lora", "lora_rank": 4, "lora_alpha": 8,
        "valid_items": 3, "group": 4, "batch_size": 8, "accumulation": 1, "max_new_tokens": 6, "max_steps": 1,
        "valid_every": 1, "warmup": 0.0, "temperature": 2.0, "out": out,
    }  # fmt: skip
    return GRPOOptions(**{**settings, **changes})


def test_rows_of_the_task_alone_are_read(choices, tmp_path, tiny_path):
    rows = read_rows(options(choices, tmp_path / "run"), load("tiny"))
    train = pl.read_parquet(choices / "train.parquet").filter(pl.col("task") == "choose")
    assert [source.id for source in rows.train] == train["id"].to_list()
    assert {(source.candidates, source.picks, source.form) for source in rows.train} == {(3, 1, "choice")}
    assert [source.right for source in rows.train[:4]] == [1, 2, 3, 1]
    assert len(rows.valid) == 3 and not {s.id for s in rows.valid} & {s.id for s in rows.train}
    with pytest.raises(DataError, match="no rows of the task choose"):
        read_rows(options(choices.parent / "plain", tmp_path / "run"), load("tiny"))


def test_the_recipe_tunes_choices(choices, tmp_path, tiny_path):
    run = run_recipe(options(choices, tmp_path / "run"))
    manifest = read_json(run / "manifest.json", "a run")
    assert manifest["data"]["split_hash"] and manifest["settings"]["task"] == "choose"
    line = next(line for line in read_log(run / "log.jsonl") if "loss" in line)
    assert {"faults/invalid", "faults/repeated", "faults/wrong", "rewards/rank/mean"} <= set(line)
    valid = read_json(run / "metrics.json", "a run")["valid"]
    assert 0 <= valid["rank"] <= 1 and {"invalid", "repeated", "wrong", "empty"} <= set(valid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": Path("x")}, "--dataset has no effect with --task choose"),
        ({"rewards": ("length",)}, "judges texts about items"),
        ({"task": "keywords", "instructions": None, "picks": 2}, "--picks has no effect"),
        ({"task": "keywords", "instructions": None, "rewards": ("rank",)}, "judges choices"),
    ],
)
def test_options_without_effect_are_refused(choices, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        replace(options(choices, tmp_path / "run"), **changes)


def test_an_answer_that_no_candidate_has_is_named(choices, tmp_path, tiny_path, world):
    broken = world / "instructions" / "broken"
    for part in ("train", "valid"):
        table = pl.read_parquet(choices / f"{part}.parquet").filter(pl.col("task") == "choose")
        wrong = pl.Series([[message("assistant", "7")]] * len(table), dtype=table["completion"].dtype)
        write_part(broken, part, table.with_columns(completion=wrong))
    with pytest.raises(DataError, match="the answer '7' is not the number of one of the 3 candidates"):
        read_rows(options(broken, tmp_path / "run"), load("tiny"))
