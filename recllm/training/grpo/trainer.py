"""TRL's GRPO trainer with our prompts, our rewards, float32 adapters, held-out items and exact resumption."""

from __future__ import annotations

import logging
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import Trainer
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from recllm.progress import Progress
from recllm.training.callbacks import Steps, keep_checkpoint
from recllm.training.grpo.judging import dead_shares, settle
from recllm.training.grpo.sampling import GroupSampler

if TYPE_CHECKING:
    from recllm.runs.log import Journal
    from recllm.training.grpo.encoding import PathEncoder
    from recllm.training.grpo.judging import Judge
    from recllm.training.grpo.packed import PackedAnswers
    from recllm.training.grpo.validation import Validation


_OF_IMAGES = {
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids", "num_images", "num_tiles"),
}


class RecGRPOTrainer(GRPOTrainer):
    """Trains on rows of `recllm.training.grpo.rows.as_dataset`.

    Args:
        encoder: Makes model inputs of prompts.
        judge: The rewards; its functions are TRL's reward functions.
        validation: Answers the held-out prompts; its metrics choose the step that is kept.
        journal: Where metrics are written.
        samples: Where every sampled answer is written, with its rewards and its advantage.
        folder: The dataset folder, which the prompts' images are relative to.
        beta: Weight of the divergence from the model without its adapter. Not given to TRL's own arguments,
            with which a model that has an adapter is compared with a copy of that adapter.
        min_spread: See `recllm.training.grpo.judging.settle`.
        keep: Latest checkpoints that stay, besides the best.
        save_every: Save after each so many steps as well, besides after validations.
        packed: Computes what answers to one prompt share once; None for TRL's own way.
        arguments: As for TRL's trainer.
    """

    def __init__(
        self,
        *arguments: Any,
        encoder: PathEncoder,
        judge: Judge,
        validation: Validation,
        journal: Journal,
        samples: Journal,
        folder: Path,
        beta: float,
        min_spread: float,
        keep: int,
        save_every: int | None,
        packed: PackedAnswers | None = None,
        **named: Any,
    ):
        weights = {
            name: parameter.data
            for name, parameter in named["model"].named_parameters()
            if parameter.requires_grad
        }
        if named["args"].beta:
            raise ValueError("beta is an argument of its own")
        super().__init__(
            *arguments, reward_funcs=judge.functions(), processing_class=encoder.processor(), **named
        )
        self.beta = self.args.beta = beta
        # TRL casts QLoRA's adapter to bfloat16, where steps below 2^-8 of a weight are lost. Ours stay.
        for name, parameter in self.model.named_parameters():
            if name in weights and parameter.dtype != weights[name].dtype:
                parameter.data = weights[name].to(parameter.device)
        self._encoder, self._judge, self._validation = encoder, judge, validation
        self._journal, self._samples = journal, samples
        self._min_spread, self._keep = min_spread, keep
        self._packed, self._folder, self._rows = packed, folder, []
        self._backward = ExitStack()
        self._sampler: GroupSampler | None = None
        self._progress: Progress | None = None
        self.add_callback(Steps(self, save_every))
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_without_none_rewards)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere that was not asked for."""

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """The run has a card of its own, see `recllm.training.grpo.card`."""

    def _get_train_sampler(self, dataset: Any = None) -> GroupSampler:
        self._sampler = GroupSampler(
            self._judge.kinds,
            self.args.generation_batch_size // self.num_generations,
            self.num_generations,
            self.num_iterations * self.args.steps_per_generation,
            self.args.seed,
        )
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

    def _tokenize_prompts(
        self, prompts: list
    ) -> tuple[list[list[int]], list[list[Any]] | None, dict[str, Any]]:
        """Returns prompts in tokens, their images, and the model's other inputs, as TRL's method does."""
        texts, images = self._encoder.texts(prompts)
        if self.use_vllm:
            images = [[self._encoder.decode(image) for image in each] for each in images]
        inputs = self._encoder.encode(texts, images)
        attended = inputs.pop("attention_mask").bool()
        ids = inputs.pop("input_ids")
        fields: dict[str, Any] = {}
        for name, tensor in inputs.items():  # a number for each token is padded again later
            of_tokens = tensor.shape == attended.shape and name.endswith("token_type_ids")
            fields[name] = _unpadded(tensor, attended) if of_tokens else tensor
        return _unpadded(ids, attended), images if any(images) else None, fields

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Takes a step; where activations are not kept, its backward pass goes forward again, packed too."""
        with ExitStack() as self._backward:
            return super().training_step(*arguments, **named)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Returns the answers of a step, as TRL does; where they are packed, those to one prompt together.

        TRL shuffles the answers over the batches of a step, which sum up to the same gradient in any order
        (all of them are within one step of the optimizer).
        """
        if self._packed is None or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        batches = self.args.steps_per_generation
        if self._step % (batches * self.num_iterations) == 0 or self._buffered_inputs is None:
            output = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(output, batches)
        return self._buffered_inputs[self._step % batches]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if self._packed is not None:
            self._rows = inputs["row"].tolist()
            self._backward.enter_context(self._packed.sharing())
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **named: Any,
    ) -> Any:
        """Returns log-probabilities and entropies as TRL does, packed where that is asked for."""
        if self._packed is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **named
            )
        images = self._judge.images(self._rows, self._folder)
        size = batch_size or len(input_ids)
        found = []
        with self._packed.sharing(), self.accelerator.autocast():
            for start in range(0, len(input_ids), size):
                part = slice(start, start + size)
                rows = input_ids[part], attention_mask[part]
                found.append(self._packed(model, *rows, logits_to_keep, images[part], compute_entropy))
        logps = torch.cat([each for each, _ in found])
        return logps, torch.cat([each for _, each in found]) if compute_entropy else None, None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards, dead = settle(rewards, self.num_generations, self._min_spread)
        metrics = self._metrics["train"]
        names, weights = self._judge.rewards.names, self._judge.rewards.settings.weights
        for name, share in dead_shares(dead, names, weights).items():
            metrics[f"dead_groups/{name}"].append(share)
        faults = self._judge.faults()
        counts = torch.tensor([list(faults.values())], device=rewards.device, dtype=torch.float32)
        counts = self.accelerator.gather(counts).sum(0)
        for name, count in zip(list(faults)[1:], counts[1:], strict=True):
            metrics[f"faults/{name}"].append(float(count / counts[0]))
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._rows = [each["row"] for each in inputs]
        output = super()._generate_and_score_completions(inputs)
        if self._packed is not None:  # rows name the images; pixels are not passed on
            output = {name: output[name] for name in output if name not in _OF_IMAGES}
            output["row"] = torch.tensor(self._rows, device=output["prompt_ids"].device)
        rows = []
        table = self._judge.table.tolist()
        for answer, parts, advantage in zip(
            self._judge.answers, table, output["advantages"].tolist(), strict=True
        ):
            judged = {
                name: None if math.isnan(value) else value
                for name, value in zip(self._judge.rewards.names, parts, strict=True)
            }
            rows.append({**answer.as_row(), "rewards": judged, "advantage": advantage})
        for row in gather_object(rows):
            self._samples.write({"step": self.state.global_step + 1, **row})
        return output

    def validate(self) -> dict[str, float]:
        """Answers the held-out prompts with the weights as they are; returns and writes down the metrics."""
        metrics = self._validation.measure(self.model, self.state.global_step)
        self._journal.write({"step": self.state.global_step, "epoch": self.state.epoch or 0.0, **metrics})
        if self.args.should_save:
            told = ", ".join(
                f"{name.removeprefix('valid_')} {value:.3f}"
                for name, value in metrics.items()
                if name != "valid_seconds"
            )
            tqdm.write(f"step {self.state.global_step}, held-out items: {told}")
            sys.stdout.flush()
        Trainer.log(self, {f"eval_{name.removeprefix('valid_')}": value for name, value in metrics.items()})
        return metrics

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validates, in place of a loss over sampled answers."""
        metrics = self.validate()
        named = {f"eval_{name.removeprefix('valid_')}": value for name, value in metrics.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes a line of log.jsonl, with all that TRL measures, and tells callbacks."""
        trained = "loss" in logs
        super().log(logs, start_time)  # adds what was measured since the last line to `logs`
        if trained:
            self._journal.write({"step": self.state.global_step, "epoch": self.state.epoch, **logs})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        keep_checkpoint(self, self._keep)


def _unpadded(tensor: torch.Tensor, attended: torch.Tensor) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(tensor, attended, strict=True)]


def _without_none_rewards(record: logging.LogRecord) -> bool:
    """Answers that were cut off have no reward by design; TRL prints each with its whole prompt."""
    return "All reward functions returned None" not in record.getMessage()
