"""What `recllm reveal` takes, and the checks before anything is made."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from recllm.config import parse_config, refuse_given
from recllm.errors import DataError
from recllm.processes import world_size
from recllm.rankers import ranker_class
from recllm.rankers.options import TrainRankerOptions, options_class
from recllm.recipe_files import recipe_path
from recllm.reveal.avl import AVL
from recllm.reveal.encoding import Order, Pooling

OF_THE_LOOP = (
    *("ranker", "split", "image", "out", "resume", "overwrite", "valid_only", "seed", "avl", "avl_alpha"),
)
"""Options of training that the loop gives itself."""
_OF_FVE = (
    *("cycles", "rewrite", "calls", "share", "never_retrieved", "top_k", "critic", "backend", "base_url"),
    *("api_key_env", "max_new_tokens", "templates"),
)


@dataclass
class RevealOptions:
    """Runs REVEAL: embed images under prompts, train a ranker with AVL, take feedback from validation lists,
    rewrite prompts, and again. Each cycle is a folder of ordinary files, made by commands that are printed.
    """

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder."""
    ranker: str
    """The backbone: missrec, m3srec, stosa_m3, hm4sr, or another ranker that reads images."""
    model: str
    """The multimodal model that embeds images, and rewrites prompts unless --critic names another: a hub id,
    a local folder, or `tiny`, the embedded model."""
    split: str = "loo"
    """Name of a split below DATASET/splits."""
    cycles: int = 3
    """Trainings at most (X_max); prompts are rewritten between them. The paper's best are 2 and 3."""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """The folder to work in; by default runs/reveal-RANKER. The same command resumes what was begun there."""

    # -- Ablations -----------------------------------------------------------------------------------------
    fve: bool = True
    """--no-fve: the initial prompts stay, one training (w/o FVE)."""
    avl: Literal["gradients", "updates", "two-sided", "none"] = "gradients"
    """How AVL reweights what images teach, see recipes/train_ranker.py; none: not at all (w/o AVL)."""
    avl_alpha: float | None = None
    """How strongly; 0.1 by default."""
    rewrite: Literal["feedback", "random"] = "feedback"
    """random: rewrite as many prompts, drawn at random and told the feedback of other items: the control."""

    # -- Image vectors -------------------------------------------------------------------------------------
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """The initial prompts; by default those of `recllm build image-prompts`."""
    pooling: Pooling = "image"
    """As in `recllm embed images`."""
    order: Order = "prompt-first"
    """As in `recllm embed images`."""
    quantization: Literal["none", "nf4"] = "none"
    """Of the model, as in `recllm embed images`; of the critic too, if it runs in this process."""
    max_pixels: int | None = None
    """Most pixels of an image, as in `recllm embed images`."""

    # -- Feedback and critic -------------------------------------------------------------------------------
    top_k: int = 40
    """Length of the validation lists; 40 as released."""
    never_retrieved: bool = False
    """Items that no list has are rewritten too (ours)."""
    share: float = 0.25
    """Share of the items with feedback that are rewritten; 0.25 as released."""
    calls: Literal["one", "two"] = "one"
    """As in `recllm build image-rewrites`: one (released), or critic and update (the paper)."""
    critic: str | None = None
    """The model that rewrites prompts, where it is another one, or its name on the server."""
    backend: Literal["transformers", "vllm", "server"] = "transformers"
    """Where the critic runs, as in `recllm build image-rewrites`."""
    base_url: str = "http://localhost:8000/v1"
    """Address of the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the server's key."""
    max_new_tokens: int = 192
    """The critic's longest answer in tokens."""
    templates: Path | None = None
    """Folder with prompt templates of your own (`recllm prompts cp FOLDER`; those of REVEAL are reveal.*)."""

    # -- Training ------------------------------------------------------------------------------------------
    recipe: Annotated[Path | None, arg(metavar="FILE")] = None
    """Options of training as YAML; by default recipes/configs/rankers/RANKER.yaml."""
    training: tuple[str, ...] = ()
    """Further options of training, as name=value: --training epochs=50 patience=5 without=text"""
    seed: int = 42
    """Seed of training and of dividing the validation users: one half chooses epochs and cycles, the lists of
    the other are the feedback."""
    launch: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file for `accelerate launch` (see `recllm recipes ls`), under which each cycle embeds, trains and
    rewrites; by default one process."""


def check_options(options: RevealOptions) -> TrainRankerOptions:
    """Checks the options, and returns those of training.

    Raises:
        DataError: One cannot work, has no effect, or is unknown to the ranker.
    """
    if world_size() > 1:
        raise DataError("recllm reveal starts its processes itself: give --launch FILE, and run it plainly")
    for name, least in (("cycles", 1), ("seed", 0), ("max_new_tokens", 1)):
        if getattr(options, name) < least:
            raise DataError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {least} or more")
    if not options.fve:
        refuse_given(options, _OF_FVE, "with --no-fve: prompts are not rewritten. Leave it out")
    if options.backend != "server":
        refuse_given(options, ("base_url", "api_key_env"), f"with --backend {options.backend}. Leave it out")
    if options.avl == "none":
        refuse_given(options, ("avl_alpha",), "with --avl none. Leave it out")
    for name in ("recipe", "launch", "templates", "prompts"):
        path = getattr(options, name)
        if (
            path is not None
            and not path.exists()
            and not (name == "prompts" and (options.dataset / path).exists())
        ):
            raise DataError(f"--{name} {path}: no such file or folder")
    ranker_class(options.ranker)  # names the nearest
    given = parse_config(options_class(options.ranker), training_flags(options))
    if "image" not in given.features_read():
        raise DataError(f"--ranker {options.ranker}: it reads no images, so REVEAL has nothing to improve")
    if given.without == "image":
        raise DataError("--training without=image: REVEAL has nothing to improve then; leave it out")
    AVL.of(given)
    return given


def training_flags(options: RevealOptions) -> list[str]:
    """Returns the flags of recipes/train_ranker.py: YAML file, `--training`, seed, AVL.

    Raises:
        DataError: A name of `--training` is unknown, or the loop's own.
    """
    recipe = options.recipe or recipe_path(f"configs/rankers/{options.ranker}.yaml")
    flags = ["--config", str(recipe), "--ranker", options.ranker]
    known = {each.name: each for each in fields(options_class(options.ranker))}
    for each in options.training:
        name, equals, value = each.partition("=")
        name = name.replace("-", "_")
        if not equals or not value:
            raise DataError(f"--training {each}: expected name=value, for example epochs=50")
        if name in OF_THE_LOOP:
            raise DataError(f"--training {each}: the loop sets {name} itself; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise DataError(
                f"--training {each}: {options.ranker} has no option {name}; the nearest is {near}"
            )
        flag = name.replace("_", "-")
        if isinstance(known[name].default, bool):
            if value not in ("true", "false"):
                raise DataError(f"--training {each}: expected true or false")
            flags.append(f"--{'' if value == 'true' else 'no-'}{flag}")
        else:
            flags += [f"--{flag}", value]
    flags += ["--seed", str(options.seed)]
    if options.avl != "none":
        flags += ["--avl", options.avl]
    if options.avl_alpha is not None:
        flags += ["--avl-alpha", str(options.avl_alpha)]
    return flags
