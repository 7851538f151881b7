"""What every builder that asks a model can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from recllm.errors import DataError


def check_plain(name: str, value: str | None) -> None:
    """Raises a `DataError` where a value that becomes part of a file name is more than a plain word."""
    if value and (Path(value).name != value or value.startswith(".") or "\0" in value):
        raise DataError(f"{name} {value!r}: expected a plain word, which is part of a file's name")


def check_least(least: int, **values: int | None) -> None:
    """Raises a `DataError` where a number is below `least`; None is not looked at."""
    for name, value in values.items():
        if value is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} {value}: expected {least} or more")


def check_parts(parts: tuple[str, ...]) -> None:
    """Raises a `DataError` where no part is named, or one twice."""
    if not parts or len(set(parts)) < len(parts):
        raise DataError(
            f"--parts {' '.join(parts)}: expected one or more of train, valid and test, each once"
        )


@dataclass
class ModelOptions:
    """Which model writes, through which backend, and where its answers are kept."""

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder; texts are written to DATASET/texts."""
    model: str
    """A hub id, a local folder, the model's name on the server, or `tiny`, the embedded model."""
    backend: Literal["transformers", "vllm", "server"] = "transformers"
    """transformers: in this process. vllm: vLLM's offline engine. server: any OpenAI-compatible server."""
    adapter: str | None = None
    """A PEFT adapter for the model: hub id or local folder (transformers and vllm)."""
    revision: str | None = None
    """Revision on the hub; for a server, a name of your own for what it runs, kept with each answer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; auto takes that of the files."""
    device_map: str | None = None
    """Where the weights go, for example `auto` or `cuda:1`; by default one GPU a process, else the CPU."""
    attn_implementation: str | None = None
    """Attention kernels: sdpa, flash_attention_2, eager."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: four-bit language model; vision tower and output layer are left as they are."""
    min_pixels: int | None = None
    """Least pixels an image is scaled to; by default the model's. Qwen2-VL: 784 pixels are one token."""
    max_pixels: int | None = None
    """Most pixels an image keeps; by default 200,704 (256 tokens of Qwen2-VL) or the model's own, if less."""
    tensor_parallel_size: int = 1
    """GPUs that one model is spread over (vllm)."""
    base_url: str = "http://localhost:8000/v1"
    """Address of the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the server's key; the key itself is kept nowhere."""
    concurrency: int = 16
    """Requests that the server works on at a time."""
    price_in: float | None = None
    """Price of a million prompt tokens, for the estimate of --dry-run."""
    price_out: float | None = None
    """Price of a million answer tokens."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; by default each step's own."""
    temperature: float = 0.0
    """0 decodes greedily; above, sampling seeded request by request."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    seed: int = 0
    """Seed of sampling."""
    batch_size: int = 32
    """Most requests in one batch (transformers)."""
    batch_tokens: int = 16_384
    """Most tokens in one batch, padding and answers included (transformers)."""
    templates: Path | None = None
    """Folder with prompt templates of your own; `recllm prompts cp FOLDER` makes it."""
    store: Path | None = None
    """Folder where answers are kept as they arrive; by default DATASET/generations."""
    tag: str = ""
    """Added to the names of the files written, to keep several models' texts apart."""
    limit: int | None = None
    """Only the first so many items or users."""
    dry_run: bool = False
    """Print the first prompts exactly, token counts, and an estimate of time and cost; write nothing."""
    overwrite: bool = False
    """Replace the texts where they exist. Answers already in the store are used again all the same."""


@dataclass
class ItemOptions(ModelOptions):
    """Writes texts about items: what their pictures show, summaries, keywords."""

    system: Literal["mllm_srec", "vlm4rec", "mllmrec", "mmsrarec"] = "mllm_srec"
    """mllm_srec: texts/viu (image understanding), then texts/imsg (summary of image and text). vlm4rec:
    texts/grounding. mllmrec: texts/description. mmsrarec: texts/keywords."""
    with_title: bool = False
    """For vlm4rec: put the title into the prompt, as its released code does; texts/grounding-with-title."""
    dataset_name: str = "catalog"
    """For mllmrec: what the prompt calls the catalog, for example `Amazon Baby`."""


@dataclass
class UserOptions(ModelOptions):
    """Writes texts about users: their preferences, from what they touched in a split."""

    split: str = "loo"
    """Name of a split below DATASET/splits."""
    system: Literal["mllm_srec", "mllmrec"] = "mllm_srec"
    """mllm_srec: texts/tubc-PART (with --tag, tubc-TAG-PART), a summary for each window of the history, each
    fed into the next. mllmrec: texts/preference, from the training items."""
    parts: tuple[Literal["train", "valid", "test"], ...] = ("train", "valid")
    """For mllm_srec: for whose targets. train: each training history without its last item; valid and test:
    what may be known when their targets are predicted. The test part is only opened when it is named."""
    window: int = 3
    """Interactions in a window. 3 is ours, after MLLM-MSR's blocks; the paper does not say."""
    step: int = 3
    """Interactions from one window's start to the next; at most `window`, so that none is passed over."""
    tell_ratings: bool = False
    """For mllm_srec: windows say the user's ratings; on splits with --like they also hold dislikes, which are
    left out otherwise."""
    max_history: int = 0
    """Only windows that begin within a user's latest so many interactions (mllm_srec), or only those
    interactions (mllmrec); 0 for all."""
    sample_history: bool = False
    """For mllmrec, with --max-history: so many interactions of each user drawn at random, instead of the
    latest. The draw depends on the user's id alone."""
    history_order: Literal["time", "shuffled"] = "time"
    """For mllmrec: the order of a user's items in the prompt. shuffled: as a set, in an order that depends on
    the user's id alone."""
    item_texts: str | None = None
    """Name of the item texts to read; by default imsg (mllm_srec) or description (mllmrec)."""
    max_prompt_tokens: int = 4096
    """For mllmrec: longest prompt; the oldest items are left out of a longer one, whole. Not with --backend
    server, which counts tokens only afterwards."""
    leak_all_interactions: bool = False
    """For mllmrec: read every interaction, test items included, as the released code does. Only to show what
    the leak is worth: the file is called preference-leaky, and nothing else reads it by itself."""


@dataclass
class InstructionOptions:
    """Writes instruction tuples: prompt and completion chats with image paths, for training and scoring."""

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder."""
    split: str = "loo"
    """Name of a split below DATASET/splits."""
    form: Literal["plain", "cot", "mmsrarec"] = "plain"
    """plain: the question alone. cot: prompts and answers of VIU, IMSG and TUBC precede it (four steps).
    mmsrarec: keywords of the user's latest items and of similar users' next items, and four tasks."""
    cot_about: Literal["history", "target"] = "history"
    """For cot, whose VIU and IMSG: the latest history item's (candidates then share the whole prefix), or the
    target's. The paper leaves it open."""
    parts: tuple[Literal["train", "valid", "test"], ...] = ("train", "valid")
    """Which parts to write; the test part is only opened when it is named."""
    preference: str = "tubc"
    """For plain and cot: name of the preference texts (tubc, read from texts/tubc-PART), or `none`."""
    visual: str = "viu"
    """Name of the texts that VIU wrote, for cot."""
    summaries: str = "imsg"
    """Name of the texts that IMSG wrote, for cot and for --history-as summary."""
    history: int | None = None
    """How many of the latest items are listed; by default none (plain, cot: MLLM-SRec lists none) or 5
    (mmsrarec)."""
    history_as: Literal["summary", "title", "image", "image+title"] = "summary"
    """For plain and cot, how they are shown: by their IMSG summary, title, image, or image and title."""
    tell_ratings: bool = False
    """Histories say the user's ratings; on splits with --like they also hold dislikes, which are left out
    otherwise. Preference texts must have been written the same way."""
    profile: bool = True
    """For plain and cot: say the user's profile, if users.parquet has the column `profile`; --no-profile
    leaves it out."""
    user_id: bool = False
    """For plain and cot: say the user's id, as the paper's table 1 does. An id carries no meaning that a
    model could use."""
    keywords: str = "keywords"
    """For mmsrarec: name of the item keywords (`recllm build items --system mmsrarec`), or `none`: titles
    take their place (the ablation without stage 1)."""
    neighbors: str = "sasrec"
    """For mmsrarec: name of the file in DATASET/neighbors (`recllm retrieve neighbors`), or `none` (the
    ablation without stage 2)."""
    tasks: tuple[str, ...] = ("yes_no", "next_keywords", "choose", "summarize")
    """For mmsrarec: the tasks, each with the share of the targets that it is asked of, for example
    `yes_no choose=0.5`; 1 where none is given. Validation and scores read yes_no alone, and in the held-out
    parts it is asked of every target. `--tasks yes_no` is the paper's single task."""
    choices: int = 5
    """For mmsrarec: candidates of the task choose, the target among them."""
    target_id: bool = True
    """For mmsrarec: say the target's id, as the paper does; --no-target-id leaves it out."""
    target_image: bool = True
    """Show the target's image; --no-target-image leaves it out."""
    target_text: bool = True
    """Tell the target's title, categories and text; --no-target-text leaves them out."""
    text_limit: int = 2000
    """Characters of the target's text that are told; 0: title and categories alone, for shorter prompts."""
    negatives: int = 1
    """Negatives a positive. On a split with --like the user's dislikes come first, in order of time, and what
    is missing is filled up with items that she has not touched."""
    negative_sampling: Literal["uniform", "in_time"] = "uniform"
    """uniform: from all training items. in_time: from those that the training log knew by the positive's
    time. Never an item that the user touched in training, be it later; what is held out is not looked at."""
    candidates: str | None = None
    """For valid and test: name of the split's candidates; each is a row, instead of sampled negatives."""
    top_k: Path | None = None
    """A first stage's lists for the part (topk/<system>.parquet, of `recllm score ... --top-k`): one row for
    each listed item, and none for a target that its list lacks. --parts must name that part alone."""
    targets_per_user: int = 1
    """Training positives a user, the latest; 0 for all. With preference texts, only those after a window."""
    processor: str | None = None
    """Model whose processor counts tokens, for --max-prompt-tokens and --dry-run: hub id, folder, `tiny`."""
    min_pixels: int | None = None
    """Least pixels of an image, for counting."""
    max_pixels: int | None = None
    """Most pixels of an image, for counting."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens, images included; of a longer one, the oldest listed items are left out."""
    templates: Path | None = None
    """Folder with prompt templates of your own."""
    name: str | None = None
    """Folder below DATASET/instructions; by default SPLIT-FORM."""
    seed: int = 42
    """Seed of the negatives; a positive's depend on it, on user, positive, and what is known of the user."""
    limit: int | None = None
    """Only the first so many users that have targets."""
    dry_run: bool = False
    """Print the first rows and token counts; write nothing."""
    overwrite: bool = False
    """Replace the folder where it exists."""


@dataclass
class ImagePromptOptions:
    """Writes REVEAL's initial prompts: an item's metadata and its training reviews' most frequent words."""

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder; writes DATASET/texts/reveal-prompts.parquet."""
    split: str = "loo"
    """Name of a split below DATASET/splits; only its training reviews are read."""
    keywords: int = 5
    """Words an item; 5 in the paper."""
    templates: Path | None = None
    """Folder with prompt templates of your own."""
    tag: str = ""
    """Added to the name of the file."""
    out: Path | None = None
    """Another file to write."""
    dry_run: bool = False
    """Print the first prompts; write nothing."""
    overwrite: bool = False
    """Replace the file where it exists."""
