"""A run from options to its folder: what is kept, what is chosen, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file

from recllm.errors import DataError
from recllm.mllm.loading import load
from recllm.mllm.scoring import YesNoScorer, score_table
from recllm.mllm.scoring.command import score_yes_no
from recllm.mllm.scoring.options import YesNoOptions
from recllm.runs.log import read_log
from recllm.training.validation import Validation
from tests.training.conftest import write_part
from tests.training.recipe import run_recipe


@pytest.fixture
def scripted(monkeypatch):
    """Replaces what validation measures by given AUCs, one after the other."""

    def script(*values: float) -> list[float]:
        left = list(values)
        monkeypatch.setattr(Validation, "measure", lambda self, model: {"valid_auc": left.pop(0)})
        return left

    return script


def checkpoint(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_run_leaves_a_folder_that_loads_and_scores_as_it_did(sft, world, method):
    options = sft(method=method)
    run = run_recipe(options)
    assert run == options.out
    names = {path.name for path in run.iterdir()}
    weights = {"model.safetensors", "config.json"} if method == "full" else {"adapter_model.safetensors"}
    assert names >= {
        *weights,
        "README.md",
        "manifest.json",
        "log.jsonl",
        "metrics.json",
        "loss.png",
        "auc.png",
    }
    assert "rows" not in names
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["kind"] == "sft run"
    assert manifest["status"] == "finished"
    assert manifest["settings"]["learning_rate"] == 1e-3
    assert manifest["settings"]["quantization"] == ("nf4" if method == "qlora" else None)
    assert [part for part, _, trained in manifest["parts"] if trained] == ["language model"]

    metrics = json.loads((run / "metrics.json").read_text())
    lines = read_log(run / "log.jsonl")
    validated = {line["step"]: line["valid_auc"] for line in lines if "valid_auc" in line}
    assert sorted(validated) == [0, 2, 4]
    assert metrics["valid"]["auc"] == validated[metrics["best_step"]] == max(validated[2], validated[4])
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)

    probes = pl.read_parquet(run / "probes.parquet")
    assert 4 <= len(probes) <= 16
    assert probes["label"].n_unique() == 2
    again = load(run) if method == "full" else load("tiny", adapter=run, quantization="nf4")
    margins = score_table(YesNoScorer(again), probes.drop("margin"), world)["margin"]
    assert (margins - probes["margin"]).abs().max() < 0.02 * max(1.0, probes["margin"].abs().max())


def test_the_step_with_the_best_auc_is_kept_and_not_the_last(sft, scripted):
    left = scripted(0.99, 0.5, 0.8, 0.7)  # before training, then after steps 2, 4 and 6
    run = run_recipe(sft(max_steps=6, keep=1))
    assert not left
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["best_step"], metrics["valid"]["auc"]) == (4, 0.8)
    kept = (run / "adapter_model.safetensors").read_bytes()
    assert kept == checkpoint(run, 4) != checkpoint(run, 6)
    assert not (run / "checkpoints" / "checkpoint-2").exists()


def test_it_stops_when_validations_get_no_better(sft, scripted):
    left = scripted(0.5, 0.6, 0.6, 0.6, 0.9)
    run = run_recipe(sft(max_steps=40, patience=2))
    assert left == [0.9]
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["best_step"], metrics["train"]["steps"]) == (2, 6)


def test_the_test_part_is_never_opened(sft, world, tmp_path):
    dataset = tmp_path / "world"
    shutil.copytree(world, dataset)
    for path in dataset.rglob("test.parquet"):
        path.write_bytes(b"opened")  # whoever reads it fails
    folder = dataset / "instructions" / "plain"
    (folder / "test.parquet").write_bytes(b"opened")
    options = sft(max_steps=2)
    options.instructions = folder
    assert run_recipe(options).is_dir()


def test_a_run_learns_what_its_rows_say(sft, world):
    """Rows that say yes to one word and no to another: after some steps the lists are in order."""
    folder = world / "instructions" / "words"
    for part in ("train", "valid"):
        rows = pl.read_parquet(world / "instructions" / "text" / f"{part}.parquet")
        prompts = [
            [{"role": "user", "content": [{"type": "text", "text": "purple" if label else "green"}]}]
            for label in rows["label"]
        ]
        write_part(folder, part, rows.with_columns(prompt=pl.Series(prompts, dtype=rows.schema["prompt"])))
    options = sft("words", max_steps=40, valid_every=40.0, learning_rate=3e-3, batch_size=8, lora_rank=8)
    metrics = json.loads((run_recipe(options) / "metrics.json").read_text())
    assert metrics["valid"]["auc"] > 0.9
    assert metrics["train"]["loss"] < metrics["train"]["first_loss"] / 2


def test_training_goes_on_from_an_adapter(sft):
    first = run_recipe(sft(out="first", max_steps=2))
    second = run_recipe(sft(out="second", max_steps=2, adapter=str(first), lora_rank=16))
    before, after = (load_file(run / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    name = next(name for name in before if "lora_B" in name)
    assert before[name].shape == after[name].shape  # its own rank, 4
    assert 0 < (before[name] - after[name]).abs().max() < 0.1


def test_folders_are_not_overwritten_by_mistake(sft, tmp_path):
    options = sft(max_steps=2)
    run_recipe(options)
    with pytest.raises(DataError, match="exists already; give --resume auto"):
        run_recipe(options)
    (tmp_path / "run" / "export").mkdir()
    (tmp_path / "run" / "export" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="holds export, made by other commands"):
        run_recipe(sft(max_steps=2, overwrite=True))
    assert (tmp_path / "run" / "metrics.json").exists()
    with pytest.raises(DataError, match=r"other settings \(learning_rate: 0.001 then, 0.5 now\)"):
        run_recipe(sft(max_steps=2, learning_rate=0.5, resume="auto"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="not a run of recipes/sft"):
        run_recipe(sft(out="other", overwrite=True))
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"


def test_rows_of_another_split_are_refused_before_anything_changes(sft, world, capsys):
    """Validation lists, and weights to start from, of another split hold what was trained on here."""
    run = run_recipe(sft(max_steps=2))
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = world / "instructions" / "other-split"
    for part in ("train", "valid"):
        write_part(other, part, pl.read_parquet(world / "instructions" / "plain" / f"{part}.parquet"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "split_hash": "b" * 64}))
    with pytest.raises(DataError, match=r"other-split/valid\.parquet was built from another split than"):
        run_recipe(sft(max_steps=2, valid_instructions=other, overwrite=True))
    for weights in ({"adapter": str(run)}, {"model": str(run), "method": "full"}):
        with pytest.raises(DataError, match=r"was trained on another split than .*--allow-other-split"):
            run_recipe(sft("other-split", max_steps=2, overwrite=True, **weights))
    assert kept == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    further = sft("other-split", out="further", max_steps=1, adapter=str(run), allow_other_split=True)
    assert json.loads((run_recipe(further) / "manifest.json").read_text())["status"] == "finished"
    assert "allowed by --allow-other-split" in capsys.readouterr().out


def test_what_is_missing_is_named(sft, world, tmp_path):
    options = sft()
    options.instructions = None
    for option, value, said in (
        ("seed", -5, "expected 0 to"),
        ("weight_decay", float("nan"), "expected 0 or more"),
        ("warmup", float("nan"), "expected 0 or more"),
        ("optimizer", "adam_torch", "did you mean adamw_torch"),
        ("resume", "nowhere", "there is no run in"),
    ):
        with pytest.raises(DataError, match=f"--{option.replace('_', '-')}.*{said}"):
            run_recipe(sft(out="refused", **{option: value}))
        assert not (tmp_path / "refused").exists()
    with pytest.raises(DataError, match="--instructions is missing"):
        run_recipe(options)
    options.instructions = tmp_path
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        run_recipe(options)
    with pytest.raises(DataError, match="--report-to wandb: its package is not installed"):
        run_recipe(sft(report_to=("wandb",)))
    folder = world / "instructions" / "without-lists"
    for part, source in (("train", "train"), ("valid", "valid")):
        rows = pl.read_parquet(world / "instructions" / "plain" / f"{source}.parquet")
        write_part(folder, part, rows.filter(pl.col("label") == 1))
    with pytest.raises(DataError, match="targets without candidates"):
        run_recipe(sft("without-lists"))


def test_scoring_reads_the_visual_store_that_training_made(sft, world, tmp_path):
    dataset = shutil.copytree(world, tmp_path / "world")
    instructions = dataset / "instructions" / "plain"
    run = run_recipe(sft(instructions=str(instructions), visual_store="auto", max_steps=1))
    (store,) = (dataset / "visual").iterdir()
    scores = {}
    for choice in (None, "auto"):
        options = YesNoOptions(
            instructions, run=run, part="valid", visual_store=choice, out=tmp_path / str(choice)
        )
        score_yes_no(options)
        scores[choice] = pl.read_parquet(tmp_path / str(choice) / "scores" / "run-valid.parquet")
    assert [*(dataset / "visual").iterdir()] == [store]
    assert (scores[None]["score"] - scores["auto"]["score"]).abs().max() < 1e-4
