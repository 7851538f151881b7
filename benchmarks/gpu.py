"""Scoring and fine-tuning at the sizes of Qwen2-VL-2B and 7B on one GPU, with random weights.

    python benchmarks/gpu.py

Weights are random, layers and vocabulary have their real sizes, bfloat16. Each user has a history of about
950 tokens with 36 images, and 21 candidates of about 60 tokens with one. `ours` is `YesNoScorer` on prompts
in tokens, `ours, from rows` is `score_table`, which also renders and tokenizes every prompt; `batched` and
`one by one` put whole prompts, tokenized and with pixels on the device beforehand, through
`model(**inputs).logits`, 8 or one at a time. All are given the same prompts, and `prompt_tokens_per_second`
counts whole prompts; the share of the device's peak is of the multiplications that each really does (torch's
FLOP counter; attention counted without what a causal mask saves). In bfloat16 margins agree roughly, so their
rank correlation with `one by one` is given. Then steps of fine-tuning with `RecSFTTrainer`: LoRA on bfloat16
weights and on NF4 (QLoRA), which multiplies in bfloat16, as many numbers.

Without a GPU it says so and writes nothing.

    python benchmarks/gpu.py --smoke     the same code on the CPU with small sizes, nothing written
"""

import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from recllm.builders.instructions import build_instructions
from recllm.builders.options import InstructionOptions
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.splits import SplitOptions, make_split
from recllm.data.toyworld import generate
from recllm.files import write_json
from recllm.mllm.loading import LoadedModel
from recllm.mllm.prefix.groups import share
from recllm.mllm.scoring import YesNoScorer, score_table
from recllm.mllm.scoring.prompts import PromptReader, group_rows, image_sizes
from recllm.mllm.tiny.architecture import SHAPES, Shape, random_model
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "gpu.json"
SMOKE = "--smoke" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() and not SMOKE else "cpu"
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""FLOP/s of dense bfloat16 products by a part of the device's name, from its maker's data sheet."""
USERS, NEGATIVES, HISTORY, TOGETHER = (2, 3, 3, 2) if SMOKE else (8, 20, 36, 8)
ROUNDS, ONE_BY_ONE_USERS = (1, 1) if SMOKE else (5, 2)
BATCH, WARM_UP, STEPS, RANK = (2, 1, 1, 4) if SMOKE else (4, 2, 6, 16)
PIXELS = 112 * 112  # 16 tokens an image
LIMIT_SECONDS = 420  # nothing new is begun after that
SMALL = Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2)
MODELS = {"small": SMALL} if SMOKE else {name: SHAPES[name] for name in ("qwen2-vl-2b", "qwen2-vl-7b")}
STARTED = time.perf_counter()


def say(text: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", flush=True)


# ------------------------------------------------------------------------------------ the rows and the model


def make_rows(folder: Path) -> Path:
    """Writes a dataset with instructions: `sft` to train on, `lists` with candidates; returns its folder."""
    dataset = generate(users=200 if not SMOKE else 20, items=200).write(folder / "world")
    split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    candidates = CandidateOptions(split.folder, negatives=NEGATIVES)
    make_candidates(split, candidates)
    shown = {"preference": "none", "history": HISTORY, "history_as": "image+title"}
    build_instructions(InstructionOptions(dataset.folder, name="sft", parts=("train",), **shown))
    lists = {"parts": ("valid",), "candidates": candidates.name, "limit": USERS}
    build_instructions(InstructionOptions(dataset.folder, name="lists", **lists, **shown))
    return dataset.folder


def make_model(name: str, *, nf4: bool = False) -> LoadedModel:
    dtype = "float32" if SMOKE else "bfloat16"
    shape = replace(MODELS[name], min_pixels=PIXELS, max_pixels=PIXELS)
    model, processor = random_model(shape, dtype=dtype, device=DEVICE)
    processor.tokenizer.padding_side = "left"
    if nf4:
        quantize(model)
    return LoadedModel(model, processor, {"model": f"random {name}", "dtype": dtype})


def quantize(model) -> None:
    """Puts the language model's linear layers into NF4 in place, as loading with `nf4` does from files."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    from recllm.mllm.quantization import check_nf4

    decoder = model.get_decoder()
    options = {"compute_dtype": model.dtype, "quant_type": "nf4", "device": "meta"}
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options)
            packed = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
            new.weight = packed.to(DEVICE)
            new.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(decoder.get_submodule(parent), last, new)
    model.is_loaded_in_4bit = True
    check_nf4(model)


# ----------------------------------------------------------------------------------------------- the scoring


def measure_scoring(loaded: LoadedModel, dataset: Path) -> dict:
    rows = pl.read_parquet(dataset / "instructions" / "lists" / "valid.parquet")
    scorer = YesNoScorer(loaded)
    groups = group_rows(rows)
    with scorer.session() as session:
        reader = PromptReader(loaded, dataset, image_sizes(rows, dataset), session.key_of)
        prompts = [[reader.read(row, rows.row(row, named=True)) for row in group] for group in groups]
        flat = [prompt for group in prompts for prompt in group]
        lengths = [len(prompt.tokens) for prompt in flat]
        shared = [share(group).shared for group in prompts]
        own = np.mean(lengths) - np.mean(shared)
        say(f"{len(flat)} prompts: {np.mean(shared):.0f} tokens shared, {own:.0f} of each candidate")

        def ours():
            margins = np.empty(rows.height, np.float32)
            with scorer.session() as fresh:  # no image is held from the round before
                for scored in fresh.score([lambda: prompts], reader.paths):
                    margins[scored.rows] = scored.margin
            return margins

        def from_rows():
            return score_table(scorer, rows, dataset)["margin"].to_numpy()

        batches = {size: whole_prompts(loaded, reader, flat, size) for size in (TOGETHER, 1)}
        few = sum(map(len, prompts[:ONE_BY_ONE_USERS]))
        contenders = {
            "ours": (ours, len(groups)),
            "ours, from rows": (from_rows, len(groups)),
            "batched": (lambda: full(loaded, scorer, batches[TOGETHER]), len(groups)),
            "one by one": (lambda: full(loaded, scorer, batches[1][:few]), ONE_BY_ONE_USERS),
        }
        margins, figures = {}, {}
        for name, (score, users) in contenders.items():
            margins[name] = score()  # warms up
            with FlopCounterMode(display=False) as counter:
                score()
            figures[name] = {"users": users, "flops": counter.get_total_flops(), "seconds": []}
        for _ in range(ROUNDS):
            for name, (score, _) in contenders.items():
                forget_peak()
                seconds = timed(score)
                figures[name]["seconds"].append(seconds)
                figures[name]["peak_mib"] = peak_mib()
    for name, figure in figures.items():
        seconds = figure["seconds"] = statistics.median(figure["seconds"])
        count = sum(map(len, prompts[: figure["users"]]))
        figure["users_per_second"] = figure["users"] / seconds
        figure["prompt_tokens_per_second"] = sum(lengths[:count]) / seconds
        figure["share_of_peak"] = share_of_peak(figure["flops"], seconds)
        figure["rank_correlation"] = rank_correlation(margins[name][:few], margins["one by one"])
    for figure in figures.values():
        figure["time_ratio"] = figures["ours"]["users_per_second"] / figure["users_per_second"]
    show(figures)
    about = {"shared": float(np.mean(shared)), "own": float(own), "candidates": NEGATIVES + 1}
    return {"prompts": about, "batch_tokens": scorer.batch_tokens, "ways": figures}


def whole_prompts(loaded: LoadedModel, reader: PromptReader, prompts: list, size: int) -> list[dict]:
    """Returns model inputs of whole prompts, padded on the left, on the device."""
    tokenizer, batches = loaded.tokenizer, []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        inputs = tokenizer.pad({"input_ids": [prompt.tokens for prompt in part]}, return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == loaded.image_token_id).long()
        images = [loaded.images.load(reader.paths[key]) for prompt in part for key in prompt.images]
        inputs |= loaded.processor.image_processor(images, return_tensors="pt")
        batches.append({name: value.to(DEVICE) for name, value in inputs.items()})
    return batches


@torch.inference_mode()
def full(loaded: LoadedModel, scorer: YesNoScorer, batches: list[dict]) -> np.ndarray:
    yes, no = list(scorer.answers.yes), list(scorer.answers.no)
    margins = []
    for inputs in batches:
        logits = loaded.model(**inputs).logits[:, -1].float()
        margins.append(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1))
    return torch.cat(margins).cpu().numpy()


def rank_correlation(found: np.ndarray, reference: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(found, reference).statistic)


# --------------------------------------------------------------------------------------------- a step of SFT


class NoValidation:
    """Stands where recllm scores candidate lists, which no measured step does."""

    def measure(self, model):
        return {"valid_auc": 0.5}


class Clock(TrainerCallback):
    """Times steps from end to end, and counts the multiplications of the first where asked."""

    def __init__(self, counts: bool):
        self.seconds, self.counter = [], FlopCounterMode(display=False) if counts else None

    def on_step_begin(self, args, state, control, **_):
        if self.counter and state.global_step == 0:
            self.counter.__enter__()

    def on_step_end(self, args, state, control, **_):
        if self.counter and state.global_step == 1:
            self.counter.__exit__(None, None, None)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            synchronize()
            now = time.perf_counter()
            if state.global_step > WARM_UP:
                self.seconds.append(now - self.started)
            self.started = now


def measure_step(name: str, dataset: Path, folder: Path, *, nf4: bool, flops: int | None) -> dict:
    """Returns the figures of one way to train; counts the multiplications where they are not given."""
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig

    from recllm.data.instructions import open_part
    from recllm.runs.log import Journal
    from recllm.training.collate import Collator
    from recllm.training.parts import LANGUAGE, Parts, lora_pattern
    from recllm.training.rows import training_rows
    from recllm.training.trainer import RecSFTTrainer

    loaded = make_model(name, nf4=nf4)
    part = open_part(dataset / "instructions" / "sft", "train")
    rows = training_rows(loaded, part, folder / name, limit=(WARM_UP + STEPS) * BATCH)
    layers = lora_pattern(Parts(loaded.model).linear_layers((LANGUAGE,)))
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers)
    loaded = replace(loaded, model=get_peft_model(loaded.model, adapter).train())
    arguments = SFTConfig(
        output_dir=str(folder / "run"),
        max_steps=WARM_UP + STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        bf16=DEVICE == "cuda",
        gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu",
        max_length=None,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock(counts=flops is None)
    trainer = RecSFTTrainer(
        model=loaded.model,
        args=arguments,
        data_collator=Collator(loaded, share_prefixes=True),
        train_dataset=rows,
        processing_class=loaded.processor,
        callbacks=[clock],
        validation=NoValidation(),
        journal=Journal(folder / "log.jsonl"),
        keep=1,
        save_every=None,
        group_by_length=True,
        shared_decoder=loaded.base_model.get_decoder(),
    )
    trainer.remove_callback(PrinterCallback)
    forget_peak()
    trainer.train()
    seconds = statistics.median(clock.seconds)
    flops = clock.counter.get_total_flops() if flops is None else flops
    tokens = sum(rows["length"]) / len(rows) * BATCH
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_row": tokens / BATCH,
        "flops": flops,
        "share_of_peak": share_of_peak(flops, seconds),
        "peak_mib": peak_mib(),
    }


# ---------------------------------------------------------------------------------------------- the measures


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(score: Callable) -> float:
    synchronize()
    started = time.perf_counter()
    score()
    synchronize()
    return time.perf_counter() - started


def forget_peak() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float | None:
    """What torch allocated at most, the weights included; None on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else None


def peak_flops() -> float | None:
    if DEVICE == "cpu":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def share_of_peak(flops: int, seconds: float) -> float | None:
    """Returns the share of a known device's peak, else None."""
    return None if peak_flops() is None else flops / seconds / peak_flops()


def show(figures: dict[str, dict]) -> None:
    for name, figure in figures.items():
        numbers = (f"{key} {value:.4g}" for key, value in figure.items() if value is not None)
        say(f"{name:16} {'  '.join(numbers)}")


def main() -> None:
    if DEVICE == "cpu" and not SMOKE:
        print("benchmarks/gpu.py: there is no GPU here; nothing was measured and nothing written")
        return
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        dataset = make_rows(folder)
        say("rows are made")
        for name in MODELS:
            say(name)
            figures[name] = {"scoring": measure_scoring(make_model(name), dataset), "sft": {}}
            write(figures)
            for way, nf4 in (("LoRA", False), ("QLoRA", True)):
                if time.perf_counter() - STARTED > LIMIT_SECONDS:
                    say(f"{way}: no time is left for it")
                    continue
                if nf4 and importlib.util.find_spec("bitsandbytes") is None:
                    say(f"{way}: bitsandbytes is not installed")
                    continue
                forget_peak()
                try:
                    counted = figures[name]["sft"].get("LoRA", {}).get("flops")
                    figures[name]["sft"][way] = measure_step(name, dataset, folder, nf4=nf4, flops=counted)
                except torch.OutOfMemoryError:
                    say(f"{way}: out of memory with {BATCH} rows a step")
                    continue
                show({way: figures[name]["sft"][way]})
                write(figures)


def write(figures: dict) -> None:
    """Writes what is measured so far."""
    if SMOKE:
        return
    content = {
        "benchmark": "gpu",
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name(),
        "peak_flops": peak_flops(),
        "run": describe_run(),
        "setting": {"rows_together": TOGETHER, "rounds": ROUNDS, "sft_batch": BATCH, "lora_rank": RANK},
        "figures": figures,
    }
    write_json(RESULTS, content)
    if "OUT" in os.environ:
        write_json(Path(os.environ["OUT"]) / RESULTS.name, content)


if __name__ == "__main__":
    main()
