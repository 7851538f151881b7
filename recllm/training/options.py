"""What `recipes/sft.py` takes, from a YAML file and from flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from recllm.config import refuse_given
from recllm.errors import DataError
from recllm.runs.folder import setting_differences, settings_of

# What may differ between a run and its resumption: it changes neither a weight nor a chosen checkpoint.
_FREE_ON_RESUME = (
    "out",
    "resume",
    "overwrite",
    "keep",
    "save_every",
    "report_to",
    "logging_steps",
    "workers",
    "push_to_hub",
    "allow_other_split",
)


@dataclass
class SFTOptions:
    """Fine-tunes a multimodal model on instruction rows; the loss is on the completions alone."""

    # -- Model ---------------------------------------------------------------------------------------------
    model: str = "tiny"
    """A local folder, a hub id such as Qwen/Qwen2-VL-2B-Instruct, or `tiny`, the embedded model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; `auto` is the one they were saved in. Full fine-tuning without DeepSpeed
    trains and saves float32 weights whatever this says, for 16 bits lose small updates (DeepSpeed keeps a
    float32 copy of its own); --bf16 decides what products are computed in."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; by default what transformers chooses."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels; by default the model's own setting."""
    max_pixels: int | None = None
    """Larger images are reduced to this many pixels; by default 200,704 (256 tokens of Qwen2-VL), or less."""

    # -- Data ----------------------------------------------------------------------------------------------
    instructions: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """DATASET/instructions/NAME, made by `recllm build instructions`: its train.parquet is trained on."""
    valid_instructions: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder whose valid.parquet has candidate lists (built with --candidates); by default the same one."""
    visual_store: str | None = None
    """Read the images' tokens from this visual store and run no vision tower; `auto`: from
    DATASET/visual/..., to which the images that the rows use are added where that pays and fits on the disk.
    Only where tower and projector are frozen."""
    allow_other_split: bool = False
    """Train further from a run (as --model or --adapter) that was trained on another split or dataset.
    Without it this is an error: what that run was trained on may be among the targets of this split."""
    limit: int | None = None
    """Use the first so many training rows only, for a trial."""

    # -- Method --------------------------------------------------------------------------------------------
    method: Literal["qlora", "lora", "full"] = "qlora"
    """`qlora`: LoRA on a language model in 4 bits (NF4). `lora`: LoRA on the weights as they are. `full`: the
    weights themselves."""
    train_language: bool = True
    """Train the language model's layers."""
    train_projector: bool = False
    """Train what maps visual features to tokens. With qlora and lora: LoRA on its linear layers."""
    train_vision: bool = False
    """Train the vision tower. With qlora and lora: LoRA on its linear layers, which are never in 4 bits."""
    train_embeddings: bool = False
    """Train the token embeddings and lm_head; with full alone."""
    lora_rank: int = 16
    """Rank of each LoRA update."""
    lora_alpha: int = 32
    """An update counts alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before each LoRA update."""
    rslora: bool = False
    """An update counts alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed updates (arXiv 2402.09353)."""
    adapter: str | None = None
    """Go on from this LoRA adapter, with its rank and layers, instead of a new one."""

    # -- Optimization --------------------------------------------------------------------------------------
    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps; in place of epochs."""
    batch_size: int = 8
    """Rows a device and step of gradient accumulation."""
    accumulation: int = 1
    """Batches whose gradients are summed up to one step."""
    learning_rate: float = 2e-4
    """The highest learning rate."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.03
    """Share of all steps (below 1), or steps, in which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    optimizer: str = "adamw_torch"
    """An optimizer of transformers: `adamw_torch`, `adamw_torch_fused`, `adamw_8bit`, ..."""
    seed: int = 0
    """Seed of new LoRA weights, dropout and the order of rows."""
    group_by_length: bool = True
    """Batch rows of about equal length, so that little is computed on padding."""
    share_prefixes: bool = True
    """Compute what the prompts of a user's neighboring rows have in common once, in attention of our own: the
    same gradients for less work, but that dropout, if any, drops the same of it for all. Models that it has
    not been tried with (Gemma 3), and --attn-implementation, do without."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: about 20 % slower, far less memory."""
    bf16: Literal["auto", "yes", "no"] = "auto"
    """Mixed precision with bfloat16; `auto`: where the accelerator has it."""
    workers: int = 0
    """Processes that prepare batches ahead, a device; 0: the training process itself."""

    # -- Validation ----------------------------------------------------------------------------------------
    valid_every: float = 0.25
    """Score the validation lists and save a checkpoint after this share of an epoch (1 or below), or after
    this many steps (above 1)."""
    valid_users: int | None = None
    """Score the lists of this many users only, spread evenly over all; by default everyone's."""
    metric: Literal["auc"] = "auc"
    """What chooses the best checkpoint: the mean AUC of the validation lists, ties one half."""
    patience: int | None = None
    """Stop after this many validations without a better one."""

    # -- Output --------------------------------------------------------------------------------------------
    out: Path | None = None
    """The run's folder; by default runs/<model>-<method>-<instructions>."""
    resume: str = "none"
    """Where the run is there: `auto` goes on from its latest complete checkpoint; `none` is an error; or a
    checkpoint's folder."""
    overwrite: bool = False
    """Replace the run in the folder, with its checkpoints."""
    save_every: int | None = None
    """Also save a checkpoint after each so many steps, without validation."""
    keep: int = 2
    """Latest checkpoints that stay; the best one stays as well."""
    logging_steps: int = 10
    """Steps that are averaged in one line of log.jsonl."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also report to these; each needs its package."""
    push_to_hub: str | None = None
    """Upload the finished run to this repository of the hub (USER/NAME)."""

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha", "batch_size", "accumulation", "keep", "logging_steps"):
            self._at_least(name, 1)
        for name in ("max_steps", "valid_users", "patience", "save_every", "limit"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        self._at_least("workers", 0)
        if not 0 <= self.seed < 2**32:
            raise DataError(f"--seed {self.seed}: expected 0 to 4294967295")
        for name in ("epochs", "learning_rate", "valid_every", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise DataError(f"--{_flag(name)} {getattr(self, name)}: expected a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise DataError(f"--lora-dropout {self.lora_dropout}: expected 0 or more, and below 1")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DataError(f"--{_flag(name)} {getattr(self, name)}: expected 0 or more")
        if not (self.train_language or self.train_projector or self.train_vision or self.train_embeddings):
            raise DataError(
                "nothing is to train: leave out --no-train-language, or give --train-projector or -vision"
            )
        if self.train_embeddings and self.method != "full":
            raise DataError("--train-embeddings goes with --method full alone")
        if self.adapter is not None and self.method == "full":
            raise DataError("--adapter goes with --method qlora or lora")
        if self.schedule == "constant" and self.warmup > 0:
            refuse_given(
                self, ("warmup",), "with --schedule constant. Leave it out, or give constant_with_warmup"
            )
        if self.visual_store is not None and (self.train_projector or self.train_vision):
            raise DataError(
                "--visual-store has what the frozen tower and projector gave; leave it out where they train"
            )

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise DataError(f"--{_flag(name)} {getattr(self, name)}: expected {least} or more")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The names of the parts that train; see `recllm.training.parts`."""
        chosen = {
            "vision tower": self.train_vision,
            "projector": self.train_projector,
            "language model": self.train_language,
            "embeddings and lm_head": self.train_embeddings,
        }
        return tuple(part for part, trains in chosen.items() if trains)

    def as_json(self) -> dict[str, Any]:
        """Returns all options as a manifest keeps them, with `quantization` as `load` takes it."""
        return {**settings_of(self), "quantization": "nf4" if self.method == "qlora" else None}

    def differences(self, settings: dict[str, Any]) -> list[str]:
        """Returns what would make a resumed run another one, as `name: then, now`."""
        return setting_differences(settings_of(self), settings, _FREE_ON_RESUME)


def _flag(name: str) -> str:
    return name.replace("_", "-")
