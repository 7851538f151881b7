"""Whole runs on the embedded model: what a reward teaches, what is kept, and that the builders can use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file
from trl import GRPOTrainer

from recllm.builders.items import summarize_items
from recllm.builders.options import ItemOptions
from recllm.data.texts import read_texts
from recllm.errors import DataError
from recllm.files import read_json
from recllm.mllm.chat import hash_of_messages
from recllm.mllm.loading import load
from recllm.mllm.rendering import encode_texts, render
from recllm.runs.log import read_log
from recllm.runs.reading import read_run
from recllm.training.grpo.rows import read_rows
from recllm.training.grpo.steps import load_data, load_model, make_trainer
from recllm.training.grpo.trainer import RecGRPOTrainer
from tests.training.grpo.conftest import Options, run_recipe
from tests.training.grpo.planted import WORD
from tests.training.ports import free_port

ROOT = Path(__file__).parents[3]
PLANTED, DIFFERS = "tests.training.grpo.planted:says_it", "tests.training.grpo.planted:differs"


@pytest.fixture(scope="module")
def planted(tmp_path_factory, toys, templates, tiny_path):
    """A run that was paid for one word."""
    from recllm.training.grpo.options import GRPOOptions

    options = GRPOOptions(
        dataset=toys,
        out=tmp_path_factory.mktemp("planted") / "run",
        templates=templates,
        prompts=("image",),
        rewards=(PLANTED, "length=0"),
        method="lora",
        valid_items=4,
        group=4,
        batch_size=16,
        accumulation=1,
        max_new_tokens=12,
        max_steps=12,
        valid_every=6,
        learning_rate=4e-3,
        warmup=0.0,
        temperature=1.5,
        epochs=4.0,
    )
    return options, run_recipe(options)


def word_probability(loaded, options) -> float:
    """The mean probability of the planted word behind "red,", over the held-out prompts."""
    rows = read_rows(options, loaded)
    (token, *_) = loaded.tokenizer(f" {WORD}")["input_ids"]
    found = []
    for source in rows.valid:
        request = rows.request(source)
        text = render(loaded, request) + "red,"
        inputs = encode_texts(loaded, [text], [[loaded.images.load(path) for path in request.images]])
        with torch.no_grad():
            found.append(loaded.model(**inputs).logits[0, -1].softmax(-1)[token].item())
    return float(np.mean(found))


def test_the_probability_of_a_rewarded_word_rises(planted):
    options, run = planted
    before, after = (
        word_probability(load("tiny"), options),
        word_probability(load("tiny", adapter=run), options),
    )
    assert after > 1.2 * before
    metrics = read_json(run / "metrics.json", "a run")
    assert metrics["valid"]["reward"] > metrics["untrained"]["reward"]
    assert metrics["best_step"] in (6, 12)


def test_what_is_kept_of_a_run(planted):
    options, run = planted
    manifest = read_json(run / "manifest.json", "a run")
    assert (manifest["kind"], manifest["status"]) == ("grpo run", "finished")
    assert manifest["settings"]["rewards"] == [PLANTED, "length=0"]
    assert read_run(run).best_step in (6, 12)
    table = pl.read_parquet(run / "completions.parquet")
    assert len(table) == 12 * 16
    groups = table.group_by("step", "id").agg(pl.col("advantage").sum(), pl.len())
    assert set(groups["len"]) <= {4, 8, 12, 16}
    held = {row["item"] for row in read_log(run / "held_out.jsonl")}
    assert len(held) == 4 and not held & set(table["item"])
    says = table.filter(pl.col("text").str.contains(WORD) & pl.col("finished"))
    other = table.filter(~pl.col("text").str.contains(WORD) & pl.col("finished"))
    assert says["advantage"].min() > -1e-6 and other["advantage"].max() < 1e-6
    empty = table.filter((pl.col("text").str.strip_chars() == "") & pl.col("finished"))
    assert (empty[PLANTED] == 0).all()
    lines = [line for line in read_log(run / "log.jsonl") if "loss" in line]
    assert len(lines) == 12
    for name in (
        "kl",
        f"dead_groups/{PLANTED}",
        "dead_groups/all",
        "faults/empty",
        "completions/mean_length",
    ):
        assert all(np.isfinite(line[name]) for line in lines)
    page = (run / "completions.html").read_text()
    assert "data:image/jpeg" in page and "<script" not in page
    card = (run / "README.md").read_text()
    assert "recllm build items DATASET --system mmsrarec --model tiny" in card
    assert str(options.dataset) not in card.split("## Settings")[0]
    assert (run / "curves.png").stat().st_size > 10_000
    assert not [name for name in load_file(run / "adapter_model.safetensors") if "ref" in name.split(".")]


def test_the_builder_writes_the_tuned_keywords(planted, toys):
    options, run = planted
    shared = {"dataset": toys, "model": "tiny", "system": "mmsrarec", "templates": options.templates}
    summarize_items(ItemOptions(**shared, tag="untuned"))
    summarize_items(ItemOptions(**shared, tag="tuned", adapter=str(run)))
    told, hashes = [], set()
    for tag in ("untuned", "tuned"):
        table, _ = read_texts(toys / "texts" / f"image-keywords-{tag}.parquet")
        told.append(table["text"].str.contains(WORD).sum())
        hashes |= set(table["prompt_hash"])
    assert told[1] > told[0]
    rows = read_rows(options, load("tiny"))
    assert hashes == {hash_of_messages(source.messages) for source in rows.train}


def test_a_run_is_exported_as_a_model_of_its_own(planted, tmp_path, capsys):
    from recllm.data.instructions import check_trained_on
    from recllm.training.export import ExportOptions, export

    options, run = planted
    export(ExportOptions(run, tmp_path / "model", dtype="float32"))
    assert "adapter against base alone" in capsys.readouterr().out
    assert word_probability(load(tmp_path / "model"), options) == pytest.approx(
        word_probability(load("tiny", adapter=run), options), abs=1e-4
    )
    # Fine-tuning may begin from both: neither learned from a split.
    for weights in (run, tmp_path / "model"):
        assert check_trained_on(weights, None, allow_other_split=False)


def test_a_step_of_a_millionth_changes_the_weights_of_a_quantized_run(planted, grpo: Options):
    """In bfloat16, where TRL puts QLoRA's adapters, it would change next to none."""
    _, start = planted
    options = grpo(
        method="qlora", adapter=str(start), learning_rate=1e-6, max_steps=1, valid_every=1,
        rewards=(DIFFERS,), temperature=1.5, schedule="constant",
    )  # fmt: skip
    run = run_recipe(options)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, run))
    assert {weight.dtype for weight in after.values()} == {np.dtype("float32")}
    moved = np.concatenate([(after[name] != before[name]).ravel() for name in before])
    assert moved.mean() > 0.9
    apart = max(np.abs(after[name] - before[name]).max() for name in before)
    assert 0 < apart < 2e-6


def test_an_empty_answer_has_the_lowest_advantage(grpo: Options, monkeypatch):
    """Answers that say something or nothing, whatever the model samples."""
    options = grpo(rewards=("length", "form", "distinctness"), max_steps=1, valid_every=1)
    said = ["red, striped, star", "", "red, dotted, mug", "red"]
    decoded = GRPOTrainer._generate

    def planted_answers(self, prompts):
        ids, _, *rest = decoded(self, prompts)
        texts = [said[place % 4] for place in range(len(prompts))]
        tokens = [self._tokenizer(text)["input_ids"] + [self.eos_token_ids[0]] for text in texts]
        rest[1] = [[{"role": "assistant", "content": text}] for text in texts]
        return (ids, tokens, *rest)

    monkeypatch.setattr(GRPOTrainer, "_generate", planted_answers)
    run = run_recipe(options)
    table = pl.read_parquet(run / "completions.parquet")
    for _, group in table.group_by("id"):
        by_text = dict(group.select("text", "advantage").iter_rows())
        assert min(by_text, key=by_text.get) == ""
        assert by_text["red, striped, star"] > by_text["red"] > by_text[""] < 0


def test_the_reference_is_the_base_model(grpo: Options):
    """Also where training goes on from an adapter: TRL would compare with a copy of that adapter."""
    options = grpo(out="first", rewards=(DIFFERS,), temperature=1.5, learning_rate=5e-3)
    first = run_recipe(options)
    lines = [line for line in read_log(first / "log.jsonl") if "kl" in line]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[1]["kl"] > 1e-5
    second = run_recipe(grpo(out="second", adapter=str(first), rewards=(DIFFERS,), temperature=1.5))
    assert next(line["kl"] for line in read_log(second / "log.jsonl") if "kl" in line) > 1e-5


def test_several_passes_over_the_same_answers_clip_their_ratios(grpo: Options):
    options = grpo(rewards=(DIFFERS,), iterations=2, temperature=1.5, learning_rate=2e-2, max_steps=4)
    run = run_recipe(options)
    lines = [line for line in read_log(run / "log.jsonl") if "loss" in line]
    assert [line["clip_ratio/region_mean"] > 0 for line in lines] == [False, True, False, True]
    assert sorted(set(pl.read_parquet(run / "completions.parquet")["step"])) == [1, 3]


def test_right_padding_or_another_beta_never_starts(grpo: Options):
    options = grpo()
    from recllm.training.grpo.folder import open_run

    with open_run(options) as run:
        model = load_model(options)
        model.loaded.tokenizer.padding_side = "right"
        with pytest.raises(RuntimeError, match="left padding"):
            make_trainer(options, run, model, load_data(options, model))


def test_batches_that_make_no_whole_groups_are_refused(grpo: Options):
    with pytest.raises(DataError, match="= 6 answers, which is no multiple of --group 4"):
        run_recipe(grpo(batch_size=6))
    with pytest.raises(DataError, match="64 prompts of one kind are answered at once, but there are 20"):
        run_recipe(grpo(out="other", batch_size=256))


def test_every_guard_reaches_the_trainer(grpo: Options):
    from recllm.training.grpo.folder import open_run

    options = grpo(method="qlora", rewards=("length",))
    with open_run(options) as run:
        model = load_model(options)
        trainer = make_trainer(options, run, model, load_data(options, model))
    assert isinstance(trainer, RecGRPOTrainer)
    assert (trainer.beta, trainer.loss_type, trainer.epsilon_high) == (0.04, "dapo", 0.28)
    assert trainer.ref_model is None and list(trainer.model.peft_config) == ["default"]
    assert trainer.processing_class.tokenizer.padding_side == "left"
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert trained and all(weight.dtype == torch.float32 for weight in trained)
    dropouts = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(dropouts)


@pytest.mark.slow
def test_the_recipe_as_a_user_launches_it(toys, tmp_path, tiny_path):
    """Through accelerate, with the shipped config and all prompts, and once more, when it is finished."""
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        *("--config_file", "recipes/launch/cpu.yaml", "--main_process_port", str(free_port())),
        *("recipes/grpo.py", "--config", "recipes/configs/tiny/keywords.yaml"),
        *("--dataset", str(toys), "--out", str(tmp_path / "run"), "--resume", "auto"),
        *("--max-steps", "2", "--valid-every", "2", "--valid-items", "4", "--batch-size", "8"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step 0, held-out items" in done.stdout and "step 2, held-out items" in done.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["prompts"] == {"train": 40, "valid": 8}
    assert load("tiny", adapter=tmp_path / "run", quantization="nf4").identity["adapter"]
