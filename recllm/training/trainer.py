"""TRL's SFT trainer with the vocabulary at label positions alone, our validation, and whole checkpoints."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Trainer
from trl import SFTTrainer

from recllm.mllm.prefix.attention import shared_prefix_attention
from recllm.progress import Progress
from recllm.training.callbacks import Steps, keep_checkpoint
from recllm.training.collate import IMAGE_KEYS
from recllm.training.packing import IGNORED
from recllm.training.sampling import EpochSampler

if TYPE_CHECKING:
    from recllm.mllm.vision.store import VisualStore
    from recllm.runs.log import Journal
    from recllm.training.validation import Validation


class RecSFTTrainer(SFTTrainer):
    """Trains on batches of `recllm.training.collate.Collator`.

    Args:
        validation: Scores the candidate lists; its metrics choose the best step.
        journal: Where metrics are written.
        keep: Latest checkpoints that stay, besides the best.
        save_every: Save after each so many steps as well, besides after validations.
        group_by_length: Batch rows of about equal length.
        visual_store: Where the batches' image keys lead to.
        shared_decoder: The language model, where batches are packed so that prompts share their beginnings.
        arguments: As for TRL's trainer.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the labels of the whole step

    def __init__(
        self,
        *arguments: Any,
        validation: Validation,
        journal: Journal,
        keep: int,
        save_every: int | None,
        group_by_length: bool,
        visual_store: VisualStore | None = None,
        shared_decoder: torch.nn.Module | None = None,
        **named: Any,
    ):
        weights = {
            name: parameter.data
            for name, parameter in named["model"].named_parameters()
            if parameter.requires_grad
        }
        super().__init__(*arguments, **named)
        # TRL casts QLoRA's adapter to bfloat16, where steps below 2^-8 of a weight are lost. Ours stay.
        for name, parameter in self.model.named_parameters():
            if name in weights and parameter.dtype != weights[name].dtype:
                parameter.data = weights[name].to(parameter.device)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True  # count the labels of each step
        self._validation, self._journal, self._keep = validation, journal, keep
        self._group_by_length, self._store = group_by_length, visual_store
        self._shared_decoder = shared_decoder
        self._sampler: EpochSampler | None = None
        self._progress: Progress | None = None
        self._seen = {"tokens": 0, "rows": 0}
        self._clock = time.perf_counter()
        self.add_callback(Steps(self, save_every))

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere that was not asked for."""

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """The run has a card of its own, see `recllm.training.card`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = rows["length"] if self._group_by_length else None
        self._sampler = EpochSampler(rows["group"], step, self.args.seed, lengths)
        return self._sampler

    def train(self, *arguments: Any, **named: Any) -> Any:
        """Trains; without a terminal, a line every 30 seconds says how far it is."""
        try:
            return super().train(*arguments, **named)
        finally:
            if self._progress is not None:
                self._progress.close()

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        if not self.control.should_training_stop:
            super()._run_epoch(*arguments, **named)

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Takes a step; where activations are not kept, its backward pass goes forward again, sharing too."""
        with self._sharing():
            return super().training_step(*arguments, **named)

    def _sharing(self) -> AbstractContextManager[None]:
        return shared_prefix_attention(self._shared_decoder) if self._shared_decoder else nullcontext()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the sum of the labels' cross-entropies over the number of labels of the optimizer step.

        The wrapped model runs as it is, so that DDP and ZeRO see their forward; a hook before `lm_head` lets
        only those hidden states through whose next token is a label. Ours.
        """
        inputs = self._with_stored_images(dict(inputs))
        labels = inputs.pop("labels")[:, 1:]
        rows = sum(len(group.suffixes) for group in inputs["layout"]) if "layout" in inputs else len(labels)
        labeled = labels != IGNORED
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, :-1][labeled], *given[1:]))
        try:
            with self._sharing():
                outputs = model(**inputs, use_cache=False)
        finally:
            hook.remove()
        total = cross_entropy(outputs.logits.float(), labels[labeled], reduction="sum")
        if num_items_in_batch is None:
            loss = total / labeled.sum().clamp(min=1)
        else:
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:  # it counts all ranks' labels; DDP averages gradients
                loss = loss * self.accelerator.num_processes
        self._seen["tokens"] += int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
        self._seen["rows"] += rows
        return (loss, outputs) if return_outputs else loss

    def _with_stored_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        keys = inputs.pop(IMAGE_KEYS, None)
        if not keys:
            return inputs
        dtype = self.model.get_input_embeddings().weight.dtype
        return inputs | self._store.mm_inputs(keys, inputs["input_ids"].device, dtype)

    def validate(self) -> dict[str, float]:
        """Scores the validation lists with the weights as they are; returns and writes down the metrics."""
        metrics = self._validation.measure(self.model)
        self._journal.write({"step": self.state.global_step, "epoch": self.state.epoch or 0.0, **metrics})
        if self.args.should_save:
            told = ", ".join(f"{name.removeprefix('valid_')} {value:.3f}" for name, value in metrics.items())
            tqdm.write(f"step {self.state.global_step}, validation: {told}")
            sys.stdout.flush()
        Trainer.log(self, {f"eval_{name.removeprefix('valid_')}": value for name, value in metrics.items()})
        self._clock = time.perf_counter()
        self._seen = {"tokens": 0, "rows": 0}
        return metrics

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validates, in place of a loss over an evaluation set."""
        metrics = self.validate()
        named = {f"eval_{name.removeprefix('valid_')}": value for name, value in metrics.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes a line of log.jsonl, with the tokens and rows of this rank a second, and tells callbacks."""
        if "loss" in logs:
            seconds = max(time.perf_counter() - self._clock, 1e-9)
            for name, count in self._seen.items():
                logs[f"{name}_per_second"] = round(count / seconds, 2)
            self._seen = {"tokens": 0, "rows": 0}
            self._clock = time.perf_counter()
            self._journal.write({"step": self.state.global_step, "epoch": self.state.epoch, **logs})
        self._metrics["train"].clear()
        Trainer.log(self, logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._saves_whole_model():
            self._load_whole_model(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._saves_whole_model():
            self._load_whole_model(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _saves_whole_model(self) -> bool:
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(self.model, PeftModel))

    def _load_whole_model(self, folder: str) -> None:
        """Loads a model's weights as `from_pretrained` does, which knows the names that they are saved under.
        transformers' trainer compares them with the names in memory, and leaves out what has another."""
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype, local_files_only=True)
        self.model.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        keep_checkpoint(self, self._keep)
