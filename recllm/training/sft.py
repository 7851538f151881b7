"""Supervised fine-tuning on instruction rows: the steps that `recipes/sft.py` goes through."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recllm.data.prompt_files import image_paths
from recllm.processes import rank, sum_over_ranks, world_size
from recllm.training import launching
from recllm.training.options import SFTOptions
from recllm.training.parts import PartCount, Parts, lora_pattern, parts_table

if TYPE_CHECKING:
    from datasets import Dataset

    from recllm.data.instructions import InstructionPart
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore
    from recllm.training.folder import RunFolder
    from recllm.training.trainer import RecSFTTrainer
    from recllm.training.validation import Validation


@dataclass(frozen=True)
class TrainableModel:
    """A model that is ready to train.

    Attributes:
        loaded: The model, with LoRA layers around its own where an adapter trains.
        counts: What each part has, and what of it trains.
        arguments: What the launch asks of the trainer's arguments.
    """

    loaded: LoadedModel
    counts: list[PartCount]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is judged by; the test part is no part of it.

    Attributes:
        train: The rows in tokens.
        validation: Scores the candidate lists.
        parts: The training and the validation part on disk.
        visual_store: Where images' tokens are read; None to run the vision tower.
    """

    train: Dataset
    validation: Validation
    parts: tuple[InstructionPart, InstructionPart]
    visual_store: VisualStore | None


def load_model(options: SFTOptions) -> TrainableModel:
    """Loads the model for training, leaves what should train to train, and prints the parts.

    Raises:
        DataError: The model or the adapter cannot be loaded, or a part that should train is not there.
    """
    from transformers import set_seed

    from recllm.mllm.loading import load

    arguments = launching.prepare(options)
    loaded = load(
        options.model,
        adapter=options.adapter,
        dtype=_dtype(options),
        attn_implementation=options.attn_implementation,
        quantization="nf4" if options.method == "qlora" else None,
        revision=options.revision,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        training=True,
    )
    launching.keep_used_renamings(loaded.base_model)
    set_seed(options.seed)  # equal LoRA weights on all ranks
    if options.method == "full":
        Parts(loaded.model).freeze_all_but(options.trained_parts)
    elif options.adapter is None:
        loaded = _with_lora(options, loaded)
    counts = Parts(loaded.model).counts()
    if rank() == 0:
        print(parts_table(counts), flush=True)
    return TrainableModel(loaded, counts, arguments)


def load_data(options: SFTOptions, run: RunFolder, model: TrainableModel) -> TrainingData:
    """Reads the training rows, into tokens, and the validation lists.

    Raises:
        DataError: A row cannot be used, or validation has no candidate lists.
    """
    from recllm.mllm.vision.of_dataset import open_visual_store
    from recllm.training.rows import training_rows
    from recllm.training.validation import Validation

    assert run.parts is not None
    parts = run.parts
    loaded, store = model.loaded, None
    for turn in ("first", "others"):  # rank 0 writes what the others then read
        if (turn == "first") == (rank() == 0):
            rows = training_rows(loaded, parts[0], run.path / "rows", limit=options.limit)
        sum_over_ranks([0])
    if options.visual_store is not None:
        import polars as pl

        lists = Validation(loaded, parts[1], users=options.valid_users).rows
        used = pl.read_parquet(parts[0].path, columns=["images"], glob=False, n_rows=options.limit)
        used = pl.concat([image_paths(used), image_paths(lists)])
        dataset, passes = parts[0].dataset, max(1.0, options.epochs)
        store = open_visual_store(options.visual_store, loaded, dataset, used, passes=passes)
    validation = Validation(loaded, parts[1], users=options.valid_users, visual_store=store)
    if rank() == 0:
        lengths = rows["length"]
        print(
            f"{len(rows):,} training rows of {min(lengths):,} to {max(lengths):,} tokens, "
            f"{sum(lengths) / len(lengths):,.0f} on average; {len(validation.rows):,} validation rows",
            flush=True,
        )
    return TrainingData(rows, validation, parts, store)


def make_trainer(
    options: SFTOptions, run: RunFolder, model: TrainableModel, data: TrainingData
) -> RecSFTTrainer:
    """Returns the trainer, after a check that what should train does and nothing else."""
    from transformers import EarlyStoppingCallback, PrinterCallback
    from transformers.utils import logging

    from recllm.mllm.scoring.scorer import can_share_prefix
    from recllm.runs.log import Journal
    from recllm.training.collate import Collator
    from recllm.training.trainer import RecSFTTrainer

    if rank() > 0 or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of saving and loading checkpoints
    loaded = model.loaded
    shares = (
        options.share_prefixes and not options.attn_implementation and can_share_prefix(loaded.base_model)
    )
    vision_trains = options.train_vision or options.train_projector
    in_step = launching.zero_stage() == 3 or (world_size() > 1 and vision_trains)
    callbacks = [] if options.patience is None else [EarlyStoppingCallback(options.patience)]
    trainer = RecSFTTrainer(
        model=loaded.model,
        args=_arguments(options, run, model, len(data.train)),
        data_collator=Collator(
            loaded, visual_store=data.visual_store, blank_image=in_step, share_prefixes=shares
        ),
        train_dataset=data.train,
        eval_dataset=data.train.select([0]),  # never read: `evaluate` scores the validation lists
        processing_class=loaded.processor,
        callbacks=callbacks,
        validation=data.validation,
        journal=Journal(run.path / "log.jsonl", run.step),
        keep=options.keep,
        save_every=options.save_every,
        group_by_length=options.group_by_length,
        visual_store=data.visual_store,
        shared_decoder=loaded.base_model.get_decoder() if shares else None,
    )
    trainer.remove_callback(PrinterCallback)
    Parts(trainer.model).check(options.trained_parts, adapter=options.method != "full")
    return trainer


def steps_between_validations(options: SFTOptions, rows: int) -> int:
    """Returns after how many optimizer steps the lists are scored: `valid_every` in steps."""
    if options.valid_every > 1:
        return round(options.valid_every)
    return max(1, round(options.valid_every * steps_per_epoch(options, rows)))


def steps_per_epoch(options: SFTOptions, rows: int) -> int:
    """Returns the optimizer steps of one pass over the rows by all ranks."""
    batches = math.ceil(rows / (options.batch_size * world_size()))
    return math.ceil(batches / options.accumulation)


def _dtype(options: SFTOptions) -> str:
    """Full fine-tuning keeps weights in float32, unless DeepSpeed keeps a copy of them in float32.

    Whatever number type was asked for: in 16 bits an update below 0.4 % of a weight would be lost. Products
    are in bfloat16 all the same where `bf16` says so.
    """
    has_copy = launching.zero_stage() > 0 and launching.uses_bf16(options)
    return "float32" if options.method == "full" and not has_copy else options.dtype


def _with_lora(options: SFTOptions, loaded: LoadedModel) -> LoadedModel:
    from dataclasses import replace

    from peft import LoraConfig, get_peft_model

    layers = Parts(loaded.model).linear_layers(options.trained_parts)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=lora_pattern(layers),
    )
    # ZeRO-3 gathers weights of one number type only; else LoRA's own stay in float32.
    one_type = launching.zero_stage() == 3 and options.method != "qlora"
    return replace(loaded, model=get_peft_model(loaded.model, config, autocast_adapter_dtype=not one_type))


def _arguments(options: SFTOptions, run: RunFolder, model: TrainableModel, rows: int) -> Any:
    import torch
    from trl import SFTConfig

    every = steps_between_validations(options, rows)
    shown = rank() == 0 and sys.stderr.isatty()
    return SFTConfig(
        output_dir=str(run.checkpoints),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
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
        max_length=None,
        remove_unused_columns=False,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=None,  # `RecSFTTrainer` removes old checkpoints once the new one is whole
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
        **model.arguments,
    )
