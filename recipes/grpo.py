"""Tunes what a multimodal model writes about items by rewards (GRPO): keywords, or summaries.

On a laptop, with the embedded model:

    accelerate launch --config_file recipes/launch/cpu.yaml recipes/grpo.py \
        --config recipes/configs/tiny/keywords.yaml --dataset shop --out runs/keywords

On a node with GPUs (also ddp.yaml; `--num_processes` says how many):

    accelerate launch --config_file recipes/launch/zero2.yaml recipes/grpo.py \
        --config recipes/configs/qwen2.5-vl-7b/keywords.yaml --dataset shop --out runs/keywords

The same command with `--resume auto` goes on after a crash. What comes out lies in runs/<name>: the adapter
of the step with the best reward on held-out items, curves, sampled answers and a card. The tuned keywords:

    recllm build items shop --system mmsrarec --model tiny --adapter runs/keywords --quantization nf4
"""

from __future__ import annotations

from pathlib import Path

from recllm.config import run_command
from recllm.training.folder import push_run
from recllm.training.grpo.folder import keep_run, open_run
from recllm.training.grpo.options import GRPOOptions
from recllm.training.grpo.steps import load_data, load_model, make_trainer


def main(options: GRPOOptions) -> Path:
    """Trains one run, or finds it finished; returns its folder."""
    # -- Options: the run's folder, or the checkpoint in it to go on from ------------------------------------
    with open_run(options) as run:
        if not run.finished:
            # -- Model: 4 bits or not, LoRA layers on the language model, no dropout ------------------------
            model = load_model(options)

            # -- Data: prompts of all items, some held out; rewards, judged by frozen models ----------------
            data = load_data(options, model)

            # -- Training: sampled answers, their advantages in their group, held-out items, checkpoints ----
            trainer = make_trainer(options, run, model, data)
            trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))

            # -- What is kept: the best step's weights, metrics, samples, curves, page, card ----------------
            keep_run(options, run, trainer, model, data)

        # -- Upload, by flag only; also of a run that was finished before -----------------------------------
        push_run(options, run)
    return run.path


if __name__ == "__main__":
    run_command(GRPOOptions, main)
