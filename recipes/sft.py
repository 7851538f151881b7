"""Fine-tunes a multimodal model on instruction rows: QLoRA, LoRA or all weights.

On a laptop, with the embedded model:

    accelerate launch --config_file recipes/launch/cpu.yaml recipes/sft.py \
        --config recipes/configs/tiny/yes_no.yaml --instructions toys/instructions/plain

On a node with GPUs (also ddp.yaml, zero3.yaml; `--num_processes` says how many):

    accelerate launch --config_file recipes/launch/zero2.yaml recipes/sft.py \
        --config recipes/configs/qwen2-vl-7b/cot.yaml --instructions shop/instructions/loo-cot

The same command with `--resume auto` goes on after a crash. What comes out lies in runs/<name>: the adapter
of the step with the best validation AUC, its metrics, curves and card.
"""

from __future__ import annotations

from pathlib import Path

from recllm.config import run_command
from recllm.training.folder import keep_run, open_run, push_run
from recllm.training.options import SFTOptions
from recllm.training.sft import load_data, load_model, make_trainer


def main(options: SFTOptions) -> Path:
    """Trains one run, or finds it finished; returns its folder."""
    # -- Options: the run's folder, or the checkpoint in it to go on from ------------------------------------
    with open_run(options) as run:
        if not run.finished:
            # -- Model: 4 bits or not, LoRA layers, which parts train ---------------------------------------
            model = load_model(options)

            # -- Data: training rows in tokens, validation lists; never the test part -----------------------
            data = load_data(options, run, model)

            # -- Training: completion-only loss, validation by AUC, checkpoints -----------------------------
            trainer = make_trainer(options, run, model, data)
            trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))

            # -- What is kept: the best step's weights, metrics, curves, card -------------------------------
            keep_run(options, run, trainer, model, data)

        # -- Upload, by flag only; also of a run that was finished before -----------------------------------
        push_run(options, run)
    return run.path


if __name__ == "__main__":
    run_command(SFTOptions, main)
