"""What the yes/no scorer can be told on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass
class YesNoOptions:
    """Scores instruction rows by a model's log-odds of yes against no: scores/NAME.parquet."""

    instructions: Positional[Annotated[Path, arg(metavar="INSTRUCTIONS")]]
    """A folder below DATASET/instructions, built with --candidates for the part that is scored."""
    part: Literal["train", "valid", "test"] = "test"
    """Which of its parts."""
    model: str | None = None
    """A hub id, a local folder, or `tiny`, the embedded model."""
    run: Path | None = None
    """Instead of --model: a folder that fine-tuning made. Its base model, adapter, number type, quantization
    and pixel budget are taken as it was trained; give those here to have them otherwise."""
    adapter: str | None = None
    """A LoRA adapter for --model: hub id or local folder."""
    allow_other_split: bool = False
    """Score rows of another split or dataset than the run (or adapter) was trained on, to measure transfer.
    Without it this is an error: rows that it was trained on may be among those that are scored."""
    revision: str | None = None
    """Revision on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number type of the weights; by default the run's, or that of the files (auto)."""
    device_map: str | None = None
    """Where the weights go, for example `auto` or `cuda:1`; by default one GPU a process, else the CPU."""
    attn_implementation: str | None = None
    """Attention kernels of the vision tower, and of the language model where prompts are scored in full."""
    quantization: Literal["none", "nf4"] | None = None
    """nf4: four-bit language model; by default the run's, or none."""
    min_pixels: int | None = None
    """Least pixels an image is scaled to; by default the run's, or the model's."""
    max_pixels: int | None = None
    """Most pixels an image keeps; by default the run's, or 200,704 or the model's own, if less."""
    yes: tuple[str, ...] = ()
    """Forms of the answer yes, each one token, for example: Yes yes. By default the first token of `Yes.`"""
    no: tuple[str, ...] = ()
    """Forms of the answer no. By default the first token of `No.`"""
    probability: Literal["sigmoid", "paper"] = "sigmoid"
    """sigmoid: the score is the log-odds, the probability its sigmoid. paper: the probability is MLLM-SRec's
    equation 4 as printed, the softmax of two probabilities, and the score orders as it does, on a logarithmic
    scale that does not tie where probabilities saturate; it may rank otherwise than the log-odds."""
    visual_store: str | None = None
    """A folder of visual tokens made for this model, or `auto`: DATASET/visual/FINGERPRINT, to which the
    images that the rows use are added where that pays and fits on the disk. Without one, images are encoded
    as they are met."""
    batch_tokens: int | None = None
    """Most tokens in a batch; by default 4,096 on the CPU, by free memory on a GPU."""
    generate_steps: bool = False
    """For four-step CoT: before scoring, put the model's own greedy answers in place of the earlier answers
    of each prompt, step by step. The questions between them stay as built."""
    step_tokens: int = 128
    """Longest generated answer of a step, in tokens."""
    name: str | None = None
    """Name of the system in tables; by default the run's or the model's, with `-PART` unless it is test."""
    out: Path = Path()
    """Folder for scores/NAME.parquet."""
    limit: int | None = None
    """Only the first so many users."""
    overwrite: bool = False
    """Replace the file where it exists, and drop unfinished scores of other settings."""
