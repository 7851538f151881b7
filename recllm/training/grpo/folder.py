"""A GRPO run's folder: opened, resumed or replaced at the start, and made complete at the end."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.splits import Split
from recllm.data.texts import CATALOG
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, sha256, write_file, write_json
from recllm.processes import rank, sum_over_ranks, world_size
from recllm.prompts import TEMPLATES
from recllm.prompts.templates import load_templates
from recllm.runs.folder import FINISHED, GRPO, TRAINING, check_resumable
from recllm.runs.log import read_log
from recllm.runs.provenance import describe_run
from recllm.training.folder import (
    RunFolder,
    begun,
    check_optimizer,
    check_reports,
    checkpoint_to_resume,
    keep_weights,
    start_run,
)
from recllm.training.grpo.options import GRPOOptions
from recllm.training.grpo.rows import open_parts

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.training.grpo.steps import TrainingData
    from recllm.training.grpo.trainer import RecGRPOTrainer
    from recllm.training.sft import TrainableModel

_PROBES = 16


def open_run(options: GRPOOptions) -> RunFolder:
    """Makes the run's folder, or finds the checkpoint in it to go on from.

    Raises:
        DataError: The folder is there and neither --resume nor --overwrite was given, it is no run's, or its
            run had other settings, items or texts; or there is no dataset.
    """
    if options.task == "choose" and options.instructions is None:
        raise DataError("--instructions is missing: give a folder made by `recllm build instructions`")
    if options.task != "choose" and options.dataset is None:
        raise DataError("--dataset is missing: give a folder made by `recllm data import` or `data toyworld`")
    check_reports(options)
    check_optimizer(options)
    name = f"{Path(options.model).name}-{options.task}-{(options.dataset or options.instructions).name}"
    run = RunFolder(options.out or Path("runs") / name)
    data = _data(options)
    if begun(run.path, GRPO) and not options.overwrite:
        run = _resumed(options, run, data)
    elif options.resume not in ("auto", "none"):
        raise DataError(f"--resume {options.resume}: there is no run in {run.path} to go on with")
    return start_run(run, lambda: _manifest(options, data, TRAINING))


def keep_run(
    options: GRPOOptions,
    run: RunFolder,
    trainer: RecGRPOTrainer,
    model: TrainableModel,
    data: TrainingData,
) -> None:
    """Puts the best step's weights, metrics, samples, curves, page and card into the run's folder; the
    manifest last."""
    if rank() == 0:
        step = trainer.state.best_global_step
        keep_weights(run, step)
        probes = _probes(replace(model.loaded, model=trainer.model), data)
        write_file(run.path / "probes.parquet", probes.write_parquet)
        samples = read_log(run.path / "completions.jsonl")
        write_file(run.path / "completions.parquet", completion_table(samples).write_parquet)
        metrics = _metrics(run, trainer, options.metric)
        write_json(run.path / "metrics.json", metrics)
        manifest = {
            **_manifest(options, _data(options), FINISHED),
            "model": model.loaded.identity,
            "parts": [list(astuple(each)) for each in model.counts],
            "ranks": world_size(),
            "prompts": {"train": len(data.rows.train), "valid": len(data.rows.valid)},
        }
        _draw_and_describe(run.path, manifest, metrics, samples, data)
        write_json(run.path / MANIFEST, manifest)
        if metrics["untrained"][options.metric] >= metrics["valid"][options.metric]:
            print(
                f"warning: no step was better on held-out items than the model before training "
                f"({options.metric} {metrics['untrained'][options.metric]:.4f}, best step "
                f"{metrics['valid'][options.metric]:.4f})"
            )
    sum_over_ranks([0])


def _probes(loaded: LoadedModel, data: TrainingData) -> pl.DataFrame:
    """Returns some held-out prompts with their margins of yes against no: no one asks them that, but whether
    `recllm export` writes the same model shows in any number."""
    from recllm.mllm.scoring import YesNoScorer, score_table

    sources = data.rows.valid[:_PROBES]
    parts = [[part for turn in source.messages for part in turn["content"]] for source in sources]
    rows = pl.DataFrame(
        {
            "id": [source.id for source in sources],
            "user": [source.id for source in sources],
            "target": [source.item for source in sources],
            "item": [source.item for source in sources],
            "label": [0] * len(sources),
            "prompt": [
                [{"role": "user", "content": [{"type": p["type"], "text": p.get("text")} for p in each]}]
                for each in parts
            ],
            "images": pl.Series([list(source.images) for source in sources], dtype=pl.List(pl.String)),
        }
    )
    scored = score_table(YesNoScorer(loaded), rows, data.rows.dataset.folder)
    return rows.with_columns(margin=scored["margin"])


def completion_table(samples: list[dict[str, Any]]) -> pl.DataFrame:
    """Returns sampled answers as a table: step, id, item, text, keywords, finished, a column for each part of
    the reward, and advantage."""
    rows = [
        {**{name: value for name, value in line.items() if name != "rewards"}, **line["rewards"]}
        for line in samples
    ]
    parts = list(samples[0]["rewards"]) if samples else []
    schema = {
        "step": pl.Int64,
        "id": pl.String,
        "item": pl.String,
        "text": pl.String,
        "keywords": pl.List(pl.String),
        "finished": pl.Boolean,
        **dict.fromkeys(parts, pl.Float64),
        "advantage": pl.Float64,
    }
    return pl.DataFrame(rows, schema=schema)


def _draw_and_describe(
    path: Path,
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    samples: list[dict[str, Any]],
    data: TrainingData,
) -> None:
    from recllm.training.grpo.card import write_card
    from recllm.training.grpo.curves import draw_curves
    from recllm.training.grpo.page import write_page

    draw_curves(path, data.rewards.names)
    write_page(path / "completions.html", manifest, metrics, samples, read_log(path / "held_out.jsonl"), data)
    write_card(path, manifest, metrics)


def _resumed(options: GRPOOptions, run: RunFolder, data: dict[str, Any]) -> RunFolder:
    """Returns where the run in the folder goes on."""
    manifest = read_json(run.path / MANIFEST, "a run")
    check_resumable(run.path, resume=options.resume, differences=options.differences(manifest["settings"]))
    if manifest["status"] == FINISHED:
        return replace(run, finished=True)
    then = manifest["data"]
    if changed := [name for name in data if name != "dataset" and data[name] != then.get(name)]:
        raise DataError(
            f"{run.path} was begun with another {changed[0]} than {data['dataset']} has now; put that back, "
            "or train a new run in another --out"
        )
    return replace(run, checkpoint=checkpoint_to_resume(run, options.resume))


def _data(options: GRPOOptions) -> dict[str, Any]:
    """What the prompts and rewards are made from: hashes of the dataset, texts, templates and split."""
    if options.task == "choose":
        train, valid = open_parts(options)
        facts = {"train": train.description["sha256"], "valid": valid.description["sha256"]}
        return {"dataset": str(train.dataset), "instructions": facts, **train.facts()}
    dataset = Dataset.open(options.dataset)
    templates = load_templates(TEMPLATES, options.templates)
    used = {
        name: each.sha256 for name, each in templates.items() if name.startswith(("mmsrarec", "mllm_srec"))
    }
    texts = {options.reference, options.utility_texts} - {CATALOG}
    if options.task == "imsg":
        texts.add(options.visual)
    data: dict[str, Any] = {
        "dataset": str(options.dataset),
        "data_hash": dataset.data_hash,
        "templates": used,
        "texts": {},
    }
    for name in sorted(texts):
        path = dataset.folder / "texts" / f"{name}.parquet"
        if path.is_file():  # what reads it says that it is missing
            data["texts"][name] = sha256(path)
    if options.split is not None:
        data["split_hash"] = Split.open(dataset.folder / "splits" / options.split, dataset=dataset).split_hash
    return data


def _manifest(options: GRPOOptions, data: dict[str, Any], status: str) -> dict[str, Any]:
    return {
        "kind": GRPO,
        "status": status,
        "settings": options.as_json(),
        "data": data,
        "run": describe_run(),
    }


def _metrics(run: RunFolder, trainer: RecGRPOTrainer, metric: str) -> dict[str, Any]:
    lines = read_log(run.path / "log.jsonl")
    best = trainer.state.best_global_step
    valid = {line["step"]: line for line in lines if "valid_reward" in line}
    trained = [line for line in lines if "loss" in line]
    last = trained[-1] if trained else {}
    return {
        "best_step": best,
        "metric": metric,
        "valid": _plain(valid[best]),
        "untrained": _plain(valid[0]),
        "train": {
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            **{
                name: last[name]
                for name in ("loss", "kl", "entropy", "reward", "completions/mean_length")
                if name in last
            },
        },
    }


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    return {name[6:]: value for name, value in line.items() if name.startswith("valid_")}
