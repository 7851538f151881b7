"""Trains a discriminative recommender: the systems that a multimodal LLM must beat.

    accelerate launch --config_file recipes/launch/cpu.yaml recipes/train_ranker.py \
        --config recipes/configs/rankers/sasrec.yaml --split shop/splits/loo

On GPUs take single_gpu.yaml or ddp.yaml. The same command with `--resume auto` goes on after a crash. What
comes out lies in runs/<ranker>: the weights of the epoch with the best validation metric, metrics and log.
Then `recllm score ranker runs/<ranker>` (eval/score_ranker.py) writes its rank records or scores.
"""

from __future__ import annotations

from recllm.config import run_command
from recllm.rankers.fit import fit
from recllm.rankers.options import TrainRankerOptions, class_of_arguments
from recllm.rankers.run_folder import begin_run, keep_run, make_ranker, open_run
from recllm.reveal.avl import AVL
from recllm.runs.folder import release_run


def main(options: TrainRankerOptions) -> None:
    """Trains one run."""
    avl = AVL.of(options)  # None without --avl

    # -- Data: the training part, frozen features; never the test part --------------------------------------
    run = open_run(options)
    if run.finished:
        print(f"{run.path} is finished; --overwrite trains it again")
        return

    # -- Model: one of recllm/rankers, with the options of its own ------------------------------------------
    ranker = make_ranker(options, run.data)

    # -- Training: the one loop, early stopping on validation lists -----------------------------------------
    lock = begin_run(options, run)
    fitted = fit(ranker, run.data, run.split, options, run.path, resume=run.resumed, plugin=avl)

    # -- What is kept: the best epoch's weights, metrics, log -----------------------------------------------
    keep_run(options, run, fitted, ranker)
    release_run(lock)


if __name__ == "__main__":
    run_command(class_of_arguments, main)
