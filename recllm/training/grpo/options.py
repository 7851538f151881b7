"""What `recipes/grpo.py` takes, from a YAML file and from flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from recllm.config import refuse_given
from recllm.errors import DataError
from recllm.mllm.embedding import DEFAULT_ENCODER
from recllm.runs.folder import setting_differences, settings_of
from recllm.training.rewards.table import CHOICES_ONLY, KEYWORDS_ONLY, RewardSettings

# What may differ between a run and its resumption: it changes neither a weight nor a chosen checkpoint.
_FREE_ON_RESUME = (
    "out",
    "resume",
    "overwrite",
    "keep",
    "report_to",
    "logging_steps",
    "push_to_hub",
)

_CONTENT = {"information": 1.0, "reconstruction": 1.0, "agreement": 1.0, "length": 1.0}
_GUARDS = {"distinctness": 0.5, "originality": 0.5}


@dataclass
class GRPOOptions:
    """Tunes what a model writes about items by rewards: keywords (MMSRARec, stage 1) or summaries."""

    lora_dropout: ClassVar[float] = 0.0
    """Dropout would make the probabilities of sampling and of training differ."""
    trained_parts: ClassVar[tuple[str, ...]] = ("language model",)
    """The tower and the projector are frozen."""

    # -- Model ---------------------------------------------------------------------------------------------
    model: str = "tiny"
    """A local folder, a hub id such as Qwen/Qwen2.5-VL-7B-Instruct, or `tiny`, the embedded model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; `auto` is the one they were saved in. The adapter is always float32."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; by default what transformers chooses."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels; by default the model's own setting."""
    max_pixels: int | None = None
    """Larger images are reduced to this many pixels; by default 200,704 (256 tokens of Qwen2-VL), or less."""

    # -- Data ----------------------------------------------------------------------------------------------
    dataset: Annotated[Path | None, arg(metavar="DATASET")] = None
    """The dataset folder: each item is one or two prompts."""
    instructions: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """For choose: DATASET/instructions/NAME with rows of the task `choose` (`recllm build instructions --form
    mmsrarec`); in place of --dataset."""
    task: Literal["keywords", "viu", "imsg", "choose"] = "keywords"
    """keywords: MMSRARec's, of the image and of the text separately. viu, imsg: MLLM-SRec's summaries of the
    image, and of that summary and the text together. The prompts are those of `recllm build items`.
    choose: MMSRARec's choice of the next item among candidates, paid by rank."""
    picks: int = 1
    """For choose: how many candidates an answer may name, best first."""
    prompts: tuple[Literal["image", "text"], ...] = ("image", "text")
    """For keywords: which of the two prompts are trained on."""
    visual: str = "viu"
    """For imsg: name of the texts that VIU wrote."""
    templates: Path | None = None
    """Folder with prompt templates of your own; `recllm prompts cp FOLDER` makes it."""
    valid_items: int = 64
    """Items that are held out, drawn by the seed: never trained on, they choose the step that is kept. For
    choose: targets of the validation part, spread evenly over all."""
    limit: int | None = None
    """Only the first N items; for choose, training rows."""
    max_prompt_tokens: int | None = None
    """Refuse prompts that are longer, images included; by default those that the model cannot take."""

    # -- Rewards -------------------------------------------------------------------------------------------
    rewards: tuple[str, ...] = ()
    """Parts, each NAME or NAME=WEIGHT: information, reconstruction, length (MMSRARec's), paper_reconstruction
    and paper_length (as printed), agreement, utility, originality, distinctness, form, or module:function of
    your own. A part of weight 0 is reported and teaches nothing. By default information, reconstruction,
    agreement and length with weight 1, and form (of keywords), distinctness and originality with 0.5."""
    least: int | None = None
    """The fewest keywords that have the whole reward for length; by default 3, for summaries 8 words."""
    most: int | None = None
    """The most; by default 6, for summaries 60 words."""
    gate: bool = True
    """Outside that band, what an answer says is worth nothing; --no-gate rewards it all the same."""
    truncated: Literal["none", "minimum"] = "none"
    """An answer that was cut off at its longest counts nowhere (none), or like an empty one (minimum)."""
    reference: str = "catalog"
    """What information and reconstruction compare with: `catalog` (title and text, as in the paper; image
    prompts, which show neither, are then judged by agreement), or the name of a file of item texts, for both
    prompts: imsg tells of the image as well."""
    encoder: str = DEFAULT_ENCODER
    """Sentence encoder of information."""
    information_cap: float = 1.0
    """Cosine that is worth the whole reward; below 1, copying the text gains nothing over naming it."""
    reconstruction_clip: float = 8.0
    """Mean negative log-likelihood, in nats a token, that is worth nothing."""
    judge: str | None = None
    """The frozen model of reconstruction and agreement: hub id or folder; by default the model itself without
    its adapter."""
    split: str | None = None
    """For utility: name of a split below DATASET/splits; its training part alone is read."""
    utility_users: int = 4
    """For utility: training users an item who took it next, and as many who never did."""
    utility_history: int = 4
    """For utility: latest items of a user that the scorer is shown."""
    utility_texts: str = "catalog"
    """For utility: what it is shown of them: `catalog`, or the name of a file of item texts."""
    scorer: str | None = None
    """For utility: the adapter of a yes/no scorer (a run of recipes/sft.py on the same split); by default the
    model itself without its adapter."""

    # -- Method --------------------------------------------------------------------------------------------
    method: Literal["qlora", "lora"] = "qlora"
    """`qlora`: LoRA on a language model in 4 bits (NF4). `lora`: LoRA on the weights as they are."""
    lora_rank: int = 16
    """Rank of each LoRA update."""
    lora_alpha: int = 32
    """An update counts alpha / rank."""
    rslora: bool = False
    """An update counts alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed updates (arXiv 2402.09353)."""
    adapter: str | None = None
    """Go on from this LoRA adapter, with its rank and layers, instead of a new one."""

    # -- Policy optimization -------------------------------------------------------------------------------
    group: int = 8
    """Answers that are sampled to each prompt and compared with each other."""
    temperature: float = 1.0
    """Of sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    max_new_tokens: int = 96
    """Longest answer in tokens."""
    iterations: int = 1
    """Passes over the same answers, each a step of the optimizer."""
    beta: float = 0.04
    """Weight of the divergence from the base model, which is the model with the adapter off."""
    epsilon: float = 0.2
    """Probability ratios are clipped below 1 - epsilon,"""
    epsilon_high: float = 0.28
    """and above 1 + epsilon_high (DAPO's value)."""
    loss: Literal["dapo", "dr_grpo", "bnpo", "grpo"] = "dapo"
    """How tokens are averaged: dapo over all of a batch, dr_grpo over batch x longest answer, bnpo over a
    device's batch, grpo in each answer first."""
    aggregation: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum"
    """normalize_then_sum: each part is standardized in its group, then they are added (GDPO, arXiv
    2601.05242). sum_then_normalize: the weighted sum is standardized, as in the paper."""
    scale: Literal["group", "batch", "none"] = "group"
    """For sum_then_normalize: by the standard deviation of the group, of the batch, or not at all."""
    min_spread: float = 0.01
    """A part whose values differ less than this in a group does not count there: standardized, they would
    weigh as much as any."""

    # -- Optimization --------------------------------------------------------------------------------------
    epochs: float = 1.0
    """Passes over the prompts."""
    max_steps: int | None = None
    """Optimizer steps; in place of epochs."""
    batch_size: int = 8
    """Answers a device and step of gradient accumulation."""
    accumulation: int = 8
    """Batches whose gradients are summed up to one step; batch size x accumulation x devices answers are
    sampled at once."""
    learning_rate: float = 1e-5
    """The highest learning rate."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "constant_with_warmup"
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
    """Seed of new LoRA weights, the held-out items, the order of prompts and sampling."""
    share_prefixes: bool = True
    """In training, compute prompt and picture once for all answers to a prompt in a batch, in attention of
    our own: the same gradients for less work. Models that it has not been tried with, and
    --attn-implementation, do without."""
    visual_store: str | None = None
    """With shared prefixes: read the images' tokens from this visual store; `auto`: from DATASET/visual/...,
    to which the images are added where that pays. Sampling runs the tower all the same."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, far less memory."""
    bf16: Literal["auto", "yes", "no"] = "auto"
    """Mixed precision with bfloat16; `auto`: where the accelerator has it."""
    vllm: Literal["none", "colocate", "server"] = "none"
    """Sample by vLLM on the same devices (colocate), or by a server of `trl vllm-serve`."""
    vllm_memory: float = 0.3
    """For colocate: share of a device's memory that vLLM takes."""
    vllm_url: str = "http://localhost:8000"
    """For server: its address."""

    # -- Validation ----------------------------------------------------------------------------------------
    valid_every: int = 50
    """Answer the held-out prompts, greedily, and save a checkpoint after this many steps."""
    metric: str = "reward"
    """What chooses the step that is kept: `reward` (the weighted mean of all parts), or the name of one part,
    for example utility (which may have weight 0)."""
    patience: int | None = None
    """Stop after this many validations without a better one."""

    # -- Output --------------------------------------------------------------------------------------------
    out: Path | None = None
    """The run's folder; by default runs/<model>-<task>-<dataset>."""
    resume: str = "none"
    """Where the run is there: `auto` goes on from its latest complete checkpoint; `none` is an error; or a
    checkpoint's folder."""
    overwrite: bool = False
    """Replace the run in the folder, with its checkpoints."""
    save_every: int | None = None
    """Also save a checkpoint after each so many steps, without validation."""
    keep: int = 2
    """Latest checkpoints that stay; the best one stays as well."""
    logging_steps: int = 1
    """Steps that are averaged in one line of log.jsonl."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also report to these; each needs its package."""
    push_to_hub: str | None = None
    """Upload the finished run to this repository of the hub (USER/NAME)."""

    def __post_init__(self) -> None:
        for name in (
            *(
                "lora_rank",
                "lora_alpha",
                "batch_size",
                "accumulation",
                "keep",
                "logging_steps",
                "valid_items",
            ),
            *("picks", "max_new_tokens", "iterations", "valid_every", "utility_users", "utility_history"),
        ):
            self._at_least(name, 1)
        self._at_least("group", 2)
        for name in ("max_steps", "patience", "save_every", "limit", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if not 0 <= self.seed < 2**32:
            raise DataError(f"--seed {self.seed}: expected 0 to 4294967295")
        for name in ("epochs", "learning_rate", "max_grad_norm", "temperature", "epsilon", "epsilon_high"):
            if not 0 < getattr(self, name) < float("inf"):
                raise DataError(f"--{_flag(name)} {getattr(self, name)}: expected a number above 0")
        for name in ("warmup", "weight_decay", "beta", "min_spread"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DataError(f"--{_flag(name)} {getattr(self, name)}: expected 0 or more")
        for name in ("top_p", "vllm_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise DataError(f"--{_flag(name)} {getattr(self, name)}: expected above 0, and at most 1")
        self._check_boundaries()
        self._check_effects()

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise DataError(f"--{_flag(name)} {getattr(self, name)}: expected {least} or more")

    def _check_boundaries(self) -> None:
        """A checkpoint holds no answers: to resume exactly, it must lie where new ones are sampled."""
        for name in ("valid_every", "save_every", "max_steps"):
            steps = getattr(self, name)
            if steps is not None and steps % self.iterations:
                raise DataError(
                    f"--{_flag(name)} {steps}: with --iterations {self.iterations} answers are sampled every "
                    f"{self.iterations} steps, and only between them a checkpoint can be resumed exactly; "
                    f"give a multiple of {self.iterations}"
                )

    def _check_effects(self) -> None:
        """Refuses options that would have no effect."""
        settings = self.reward_settings
        if self.metric != "reward" and self.metric not in settings.weights:
            raise DataError(
                f"--metric {self.metric}: expected reward, or one of the parts, whose weight may be 0 "
                f"({', '.join(settings.weights)})"
            )
        if self.task == "choose":
            refuse_given(
                self,
                ("dataset", "templates", "least", "most", "gate"),
                "with --task choose, whose rows are in --instructions",
            )
            if wrong := [name for name in settings.weights if name not in CHOICES_ONLY and ":" not in name]:
                raise DataError(
                    f"--rewards {wrong[0]} judges texts about items; --task choose takes rank, or "
                    "module:function"
                )
        else:
            refuse_given(self, ("instructions", "picks"), "without --task choose")
            if wrong := [name for name in CHOICES_ONLY if name in settings.weights]:
                raise DataError(f"--rewards {wrong[0]} judges choices; it goes with --task choose alone")
        if self.task != "keywords":
            refuse_given(self, ("prompts",), f"with --task {self.task}")
            if wrong := [name for name in KEYWORDS_ONLY if name in settings.weights]:
                raise DataError(f"--rewards {wrong[0]} judges lists of keywords, not --task {self.task}")
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise DataError("--prompts: expected image, text, or both, each once")
        if self.task != "imsg":
            refuse_given(self, ("visual",), "without --task imsg")
        used = set(settings.weights)
        reconstructs = used & {"reconstruction", "paper_reconstruction"}
        for names, needed, what in (
            (("encoder", "information_cap"), "information" in used, "information"),
            (("reconstruction_clip",), reconstructs, "reconstruction"),
            (("judge",), reconstructs or "agreement" in used, "reconstruction or agreement"),
            (("reference",), reconstructs or "information" in used, "information or reconstruction"),
            (
                ("split", "utility_users", "utility_history", "utility_texts", "scorer"),
                "utility" in used,
                "utility",
            ),
        ):
            if not needed:
                refuse_given(self, names, f"without {what} among --rewards")
        if "utility" in used and self.split is None:
            raise DataError("--rewards utility: give --split NAME, whose training users it asks")
        if self.aggregation == "normalize_then_sum":
            refuse_given(self, ("scale",), "with --aggregation normalize_then_sum")
        if self.vllm != "colocate":
            refuse_given(self, ("vllm_memory",), "without --vllm colocate")
        if self.vllm != "server":
            refuse_given(self, ("vllm_url",), "without --vllm server")
        if not self.share_prefixes:
            refuse_given(self, ("visual_store",), "with --no-share-prefixes")
        if self.adapter is not None:
            refuse_given(
                self, ("lora_rank", "lora_alpha", "rslora", "dora"), "with --adapter, which has its own"
            )
        if self.schedule == "constant" and self.warmup > 0:
            refuse_given(
                self, ("warmup",), "with --schedule constant. Leave it out, or give constant_with_warmup"
            )

    @property
    def reward_settings(self) -> RewardSettings:
        """What decides the rewards."""
        listed = self.task == "keywords"
        if self.task == "choose":
            return RewardSettings(
                read_weights(self.rewards) or {"rank": 1.0}, gate=False, truncated=self.truncated
            )
        default = {**_CONTENT, **({"form": 0.5} if listed else {}), **_GUARDS}
        least, most = (3, 6) if listed else (8, 60)
        return RewardSettings(
            read_weights(self.rewards) or default,
            least=least if self.least is None else self.least,
            most=most if self.most is None else self.most,
            gate=self.gate,
            truncated=self.truncated,
            cap=self.information_cap,
            clip=self.reconstruction_clip,
            encoder=self.encoder,
        )

    def as_json(self) -> dict[str, Any]:
        """Returns all options as a manifest keeps them, with `quantization` as `load` takes it."""
        return {**settings_of(self), "quantization": "nf4" if self.method == "qlora" else None}

    def differences(self, settings: dict[str, Any]) -> list[str]:
        """Returns what would make a resumed run another one, as `name: then, now`."""
        return setting_differences(self.as_json(), settings, _FREE_ON_RESUME)


def read_weights(parts: Sequence[str]) -> dict[str, float]:
    """Returns the weight of each part of `--rewards`, in order.

    Raises:
        DataError: A part is named twice, or its weight is no number.
    """
    weights: dict[str, float] = {}
    for part in parts:
        name, sign, weight = part.partition("=")
        if name in weights:
            raise DataError(f"--rewards {part}: {name} is named twice")
        try:
            weights[name] = float(weight) if sign else 1.0
        except ValueError:
            raise DataError(f"--rewards {part}: expected NAME or NAME=WEIGHT") from None
    return weights


def _flag(name: str) -> str:
    return name.replace("_", "-")
