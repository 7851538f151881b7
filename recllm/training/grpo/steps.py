"""The steps that `recipes/grpo.py` goes through: model, data and rewards, trainer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recllm.data.origins import Origin, check_same_origin
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json
from recllm.processes import rank, world_size
from recllm.runs.log import Journal
from recllm.training import launching
from recllm.training.grpo.options import GRPOOptions
from recllm.training.grpo.rows import Rows, as_dataset, read_rows
from recllm.training.parts import Parts
from recllm.training.rewards import Rewards, make_rewards
from recllm.training.sft import TrainableModel
from recllm.training.sft import load_model as load_for_sft

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.training.folder import RunFolder
    from recllm.training.grpo.packed import PackedAnswers
    from recllm.training.grpo.trainer import RecGRPOTrainer
    from recllm.training.rewards.likelihood import FrozenModel
    from recllm.training.rewards.utility import Utility

_JUDGED = ("reconstruction", "paper_reconstruction", "agreement")


@dataclass(frozen=True)
class TrainingData:
    """The prompts and what judges the answers.

    Attributes:
        rows: The prompts.
        rewards: The parts.
    """

    rows: Rows
    rewards: Rewards


def load_model(options: GRPOOptions) -> TrainableModel:
    """Loads the model with LoRA layers on its language model, without dropout, and prints the parts.

    Raises:
        DataError: The model or the adapter cannot be loaded, or it was launched with ZeRO-3.
    """
    if launching.zero_stage() == 3:
        raise DataError(
            "ZeRO-3 shares out the weights that answers are sampled with; use --config_file "
            "recipes/launch/zero2.yaml, and --method qlora where a device is too small"
        )
    return load_for_sft(options)


def load_data(options: GRPOOptions, model: TrainableModel) -> TrainingData:
    """Writes the prompts of all items, counts their tokens, and makes the rewards.

    Raises:
        DataError: A prompt is too long, a text or image cannot be used, or a reward lacks what it judges by.
    """
    rows = read_rows(options, model.loaded)
    if rank() == 0:
        print(
            f"{len(rows.train):,} prompts to train on, {len(rows.valid):,} of held-out items; "
            f"{rows.tokens[0]:,} to {rows.tokens[1]:,} tokens, images included",
            flush=True,
        )
        if rows.unusable:
            item, reason = next(iter(rows.unusable.items()))
            print(f"{len(rows.unusable):,} images cannot be shown, for example of {item}: {reason}")
    settings = options.reward_settings
    folder = rows.dataset.folder
    judge = _judge(options, model.loaded, folder) if set(settings.weights) & {*_JUDGED} else None
    utility = _utility(options, model.loaded, rows) if "utility" in settings.weights else None
    rewards = make_rewards(settings, judge=judge, others=rows.others, utility=utility)
    return TrainingData(rows, rewards)


def make_trainer(
    options: GRPOOptions, run: RunFolder, model: TrainableModel, data: TrainingData
) -> RecGRPOTrainer:
    """Returns the trainer, after a check that what should train does and nothing else."""
    from transformers import EarlyStoppingCallback, PrinterCallback
    from transformers.utils import logging

    from recllm.training.grpo.encoding import PathEncoder
    from recllm.training.grpo.judging import Judge
    from recllm.training.grpo.trainer import RecGRPOTrainer
    from recllm.training.grpo.validation import Validation

    if rank() > 0 or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of saving and loading checkpoints
    loaded, rows = model.loaded, data.rows
    train = as_dataset(rows.train, rows.dataset.folder)
    callbacks = [] if options.patience is None else [EarlyStoppingCallback(options.patience)]
    trainer = RecGRPOTrainer(
        model=loaded.model,
        args=_arguments(options, run, model, rows),
        train_dataset=train,
        eval_dataset=train.select([0]),  # never read: `evaluate` answers the held-out prompts
        callbacks=callbacks,
        encoder=PathEncoder(loaded),
        judge=Judge(data.rewards, rows.train, loaded.stop_token_ids),
        validation=Validation(
            loaded,
            rows,
            data.rewards,
            max_new_tokens=options.max_new_tokens,
            journal=Journal(run.path / "held_out.jsonl", run.step),
        ),
        journal=Journal(run.path / "log.jsonl", run.step),
        samples=Journal(run.path / "completions.jsonl", run.step),
        folder=rows.dataset.folder,
        beta=options.beta,
        min_spread=options.min_spread,
        keep=options.keep,
        save_every=options.save_every,
        packed=_packed(options, model, rows),
    )
    trainer.remove_callback(PrinterCallback)
    Parts(trainer.model).check(options.trained_parts, adapter=True)
    return trainer


def _packed(options: GRPOOptions, model: TrainableModel, rows: Rows) -> PackedAnswers | None:
    from recllm.mllm.scoring.scorer import can_share_prefix
    from recllm.mllm.vision.of_dataset import open_visual_store
    from recllm.training.grpo.packed import PackedAnswers

    loaded = model.loaded
    shares = options.share_prefixes and not options.attn_implementation
    if not (shares and can_share_prefix(loaded.base_model)):
        return None
    store = None
    if options.visual_store is not None:
        import polars as pl

        used = pl.Series([image for source in rows.train for image in source.images], dtype=pl.String)
        passes = max(1.0, options.epochs) * 2
        store = open_visual_store(options.visual_store, loaded, rows.dataset.folder, used, passes=passes)
    return PackedAnswers(loaded, store)


def _judge(options: GRPOOptions, loaded: LoadedModel, folder: Path) -> FrozenModel:
    from recllm.mllm.loading import load
    from recllm.training.rewards.likelihood import FrozenModel

    if options.judge is None:
        return FrozenModel(loaded, folder, policy=True)
    other = load(options.judge, dtype=options.dtype, max_pixels=options.max_pixels)
    return FrozenModel(other, folder)


def _utility(options: GRPOOptions, loaded: LoadedModel, rows: Rows) -> Utility:
    from recllm.mllm.loading import load
    from recllm.training.rewards.utility import Utility, training_contexts

    assert options.split is not None
    folder = rows.dataset.folder
    split = Split.open(folder / "splits" / options.split, dataset=rows.dataset)
    contexts = training_contexts(
        split,
        rows.catalog,
        users=options.utility_users,
        history=options.utility_history,
        texts=options.utility_texts,
        seed=options.seed,
    )
    if options.scorer is None:
        return Utility(loaded, contexts, folder, policy=True)
    check_scorer(Path(options.scorer), split)
    scorer = load(
        options.model,
        adapter=options.scorer,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        quantization="nf4" if options.method == "qlora" else None,
        revision=options.revision,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
    )
    return Utility(scorer, contexts, folder)


def check_scorer(run: Path, split: Split) -> None:
    """Refuses a scorer that was trained on another split, whose training part may hold what is held out here.

    Raises:
        DataError: It was, or it does not say on which.
    """
    if not (run / MANIFEST).is_file():
        raise DataError(f"--scorer {run}: expected the folder of a run of recipes/sft.py")
    trained = read_json(run / MANIFEST, "a run's folder").get("instructions") or {}
    check_same_origin(
        Origin.of_manifest(run, trained, "was trained on"),
        split.origin,
        remedy="train a scorer on this split",
        required=("dataset", "split"),
    )


def _arguments(options: GRPOOptions, run: RunFolder, model: TrainableModel, rows: Rows) -> Any:
    import torch
    from trl import GRPOConfig

    answers = options.batch_size * options.accumulation * world_size()
    if answers % options.group:
        raise DataError(
            f"--batch-size {options.batch_size} x --accumulation {options.accumulation} x {world_size()} "
            f"devices = {answers} answers, which is no multiple of --group {options.group}"
        )
    kinds = {source.kind for source in rows.train}
    most = max(sum(source.kind == kind for source in rows.train) for kind in kinds)
    if most < answers // options.group:
        raise DataError(
            f"{answers // options.group} prompts of one kind are answered at once, but there are {most:,}; "
            "lower --batch-size or --accumulation"
        )
    shown = rank() == 0 and sys.stderr.isatty()
    rewards = options.reward_settings.weights
    return GRPOConfig(
        output_dir=str(run.checkpoints),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.group,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=options.optimizer,
        seed=options.seed,
        bf16=launching.uses_bf16(options),
        fp16=False,
        activation_checkpointing=options.gradient_checkpointing,
        num_generations=options.group,
        max_completion_length=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        num_iterations=options.iterations,
        beta=0.0,  # `RecGRPOTrainer` has it
        epsilon=options.epsilon,
        epsilon_high=options.epsilon_high,
        loss_type=options.loss,
        reward_weights=list(rewards.values()),
        multi_objective_aggregation=options.aggregation,
        scale_rewards=options.scale,
        disable_dropout=True,
        log_completions=False,  # `RecGRPOTrainer` writes them
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=options.valid_every,
        save_strategy="steps",
        save_steps=options.valid_every,
        save_total_limit=None,  # `RecGRPOTrainer` removes old checkpoints once the new one is whole
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{options.metric}",
        greater_is_better=True,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=list(options.report_to) or "none",
        run_name=run.path.name,
        disable_tqdm=not shown,
        restore_callback_states_from_checkpoint=True,
        **_vllm(options),
        **model.arguments,
    )


def _vllm(options: GRPOOptions) -> dict[str, Any]:
    if options.vllm == "none":
        return {}
    try:
        import vllm  # noqa: F401
    except ImportError:
        raise DataError("--vllm needs vLLM: pip install 'recllm[vllm]'") from None
    if options.vllm == "server":
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": options.vllm_url}
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": options.vllm_memory,
    }
