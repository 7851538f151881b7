"""A GRPO step with what answers share computed once, beside plain TRL, on the same rows, seeds and rewards.

    python benchmarks/grpo_steps.py WORK

The embedded model, 8 prompts with a picture of 256 tokens each, 8 answers to each, float32 on the CPU.
`passes` are the reference's log-probabilities and the forward and backward pass of the loss; `step` is these
with sampling and rewards. Ways alternate; medians over repeats.
"""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

from recllm.config import run_command
from recllm.data.toyworld import generate
from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run
from recllm.training.grpo.folder import open_run
from recllm.training.grpo.options import GRPOOptions
from recllm.training.grpo.steps import load_data, load_model, make_trainer

PIXELS = 200_704  # 256 tokens of 28 x 28


@dataclass
class Config:
    """Times GRPO steps both ways."""

    work: Positional[Path] = Path("grpo-steps")
    """Folder to work in."""
    out: Path = Path("results/grpo_steps.json")
    """Where the figures go."""
    repeats: int = 3
    """Steps of each way."""


def main(config: Config) -> None:
    toys = config.work / "toys"
    if not toys.exists():
        generate(users=12, items=24, shortest=3, longest=3, phases=2).write(toys)
    options = GRPOOptions(
        dataset=toys, out=config.work / "run", overwrite=True, prompts=("image",), rewards=("length", "form"),
        valid_items=4, group=8, batch_size=16, accumulation=4, max_new_tokens=12, method="lora",
        min_pixels=PIXELS, max_pixels=PIXELS, temperature=1.5,
    )  # fmt: skip
    with open_run(options) as run:
        model = load_model(options)
        trainer = make_trainer(options, run, model, load_data(options, model))
        trainer.current_gradient_accumulation_steps = options.accumulation
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        packed, seconds = trainer._packed, {}
        for repeat in range(config.repeats + 1):  # the first warms up
            for name, way in (("ours", packed), ("plain TRL", None)):
                trainer._packed, trainer._buffered_inputs, trainer._step = way, None, 0
                torch.manual_seed(repeat)
                found = one_step(trainer, batch, options.accumulation)
                if repeat:
                    for part, value in found.items():
                        seconds.setdefault(name, {}).setdefault(part, []).append(value)
    figures = {
        name: {f"{part}_seconds": round(statistics.median(values), 3) for part, values in parts.items()}
        for name, parts in seconds.items()
    }
    figures["ratio"] = {
        part: round(
            statistics.median(
                one / other
                for one, other in zip(seconds["plain TRL"][part], seconds["ours"][part], strict=True)
            ),
            2,
        )
        for part in ("passes", "step")
    }
    figures["peak memory of the process, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    write_json(
        config.out,
        {
            "what": "a GRPO step of the embedded model, 8 prompts with a picture of 256 tokens, 8 answers "
            "each",
            "repeats": config.repeats,
            "figures": figures,
            "machine": describe_machine(),
            "run": describe_run(),
        },
    )
    print(figures)


def one_step(trainer: Any, batch: Any, batches: int) -> dict[str, float]:
    """Samples, judges and goes through a batch; returns the seconds."""
    began = time.perf_counter()
    measured = {"reference": 0.0}
    passes = type(trainer)._get_per_token_logps_and_entropies

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = passes(trainer, *arguments, **named)
        measured["reference"] += time.perf_counter() - start
        return found

    trainer._get_per_token_logps_and_entropies = timed
    inputs = trainer._prepare_inputs(batch)
    del trainer._get_per_token_logps_and_entropies
    reference = measured["reference"]
    start = time.perf_counter()
    trainer.model.zero_grad()
    for number in range(batches):
        trainer._step = number
        inputs = trainer._buffered_inputs[number]
        with trainer._backward:
            loss = trainer._compute_loss(trainer.model, dict(inputs))
            loss.backward()
    ended = time.perf_counter()
    return {"passes": ended - start + reference, "step": ended - began}


if __name__ == "__main__":
    run_command(Config, main)
