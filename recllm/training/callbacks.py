"""What the trainers of fine-tuning and of GRPO share: progress, epochs, and checkpoints that are whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from recllm.progress import Progress
from recllm.training.checkpoints import drop_old, mark_complete


class Steps(TrainerCallback):
    """Sets the sampler's epoch, validates the untrained model, and shows progress.

    Args:
        trainer: A trainer with `validate`, `_sampler` and `_progress`.
        save_every: Steps between checkpoints besides those of validations; None for none.
    """

    def __init__(self, trainer: Any, save_every: int | None):
        self._trainer, self._save_every = trainer, save_every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Curves begin before the first step; a run that had stopped early does not go on when resumed."""
        if self._trainer.args.should_save and not sys.stderr.isatty():  # on a terminal transformers has a bar
            self._trainer._progress = Progress(
                desc="training", total=state.max_steps, unit="step", initial=state.global_step
            )
        if state.global_step == 0:
            self._trainer.validate()
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                patience = callback.early_stopping_patience
                control.should_training_stop |= callback.early_stopping_patience_counter >= patience

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves between validations."""
        if self._trainer._progress is not None:
            self._trainer._progress.update()
        if self._save_every is not None and state.global_step % self._save_every == 0:
            control.should_save = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """accelerate passes the epoch on to a sampler, but not through all of its wrappers."""
        self._trainer._sampler.set_epoch(int(state.epoch or 0))


def keep_checkpoint(trainer: Any, keep: int) -> None:
    """Marks the checkpoint that a trainer has just saved as complete, and drops old ones; on all ranks.

    Args:
        trainer: A transformers trainer.
        keep: Latest checkpoints that stay, besides the best one.
    """
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        folder = Path(trainer.args.output_dir)
        mark_complete(folder / f"checkpoint-{trainer.state.global_step}")
        best = trainer.state.best_global_step
        drop_old(folder, keep, best and folder / f"checkpoint-{best}")
    trainer.accelerator.wait_for_everyone()
