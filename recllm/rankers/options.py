"""What `recipes/train_ranker.py` takes, from a YAML file and from flags: the options of all rankers, and the
config of the one that is trained."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from tyro.conf import arg

from recllm.config import peek
from recllm.errors import DataError
from recllm.rankers import RANKERS, ranker_class
from recllm.rankers.fit import FitOptions
from recllm.runs.folder import setting_differences, settings_of

# What may differ between a run and its resumption: it changes neither a weight nor the chosen epoch. Split
# and features are compared by their hashes.
_FREE_ON_RESUME = (
    "out",
    "resume",
    "overwrite",
    "patience",
    "split",
    "text",
    "image",
    "user_text",
    "feature_order",
)


@dataclass
class TrainRankerOptions(FitOptions):
    """Trains a discriminative recommender on a split's training part."""

    # -- What ----------------------------------------------------------------------------------------------
    ranker: str | None = None
    """The recommender: sasrec, bert4rec, gru4rec, stosa, unisrec, missrec, m3srec, stosa_m3, hm4sr, mmsr,
    mmsbr, profile_fusion, bpr, vbpr, lightgcn, mmgcn, lattice, freedom, smore or mllmrec. Its own options are
    flags, too."""

    # -- Data ----------------------------------------------------------------------------------------------
    split: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """DATASET/splits/NAME, made by `recllm data split`."""
    text: str = "catalog"
    """Texts of multimodal recommenders: `catalog` (title and text), `metadata` (title, brand, categories and
    text), a name in DATASET/texts, several of these joined by + (metadata+description), or a file of vectors
    (.npy, .safetensors); `none` for none."""
    image: str | None = None
    """Images of multimodal recommenders: the multimodal model whose visual tokens are averaged (`tiny`, a
    folder, a hub id), or a file of vectors (.npy, .safetensors); `none` for none."""
    user_text: str | None = None
    """Texts about users, for mllmrec: a name in DATASET/texts that `recllm build users` has written from the
    training part of the same split, such as preference."""
    allow_leak: bool = False
    """Take texts about users that were written from held-out interactions (--leak-all-interactions), to
    measure what the leak is worth. The run's manifest and all score files say so."""
    feature_order: str | None = None
    """Which item each row of a .npy file belongs to: `numeric` (ids in ascending order as numbers), `source`
    (the items table that was imported), `dataset` (items.parquet), or a file with an item id on each line or
    the columns item,row. Not needed beside NAME.items.txt, nor for .safetensors."""
    encoder: str = "all-MiniLM-L6-v2"
    """The sentence encoder of the texts."""
    max_pixels: int | None = None
    """Larger images are reduced to this many pixels; by default the model's own setting."""

    # -- Ablation ------------------------------------------------------------------------------------------
    without: Literal["text", "image"] | None = None
    """Trains and scores as if no item had this modality: it is zero after its projection, and no graph or
    cluster is made of it. What --text or --image names is not read, and need not be given."""

    # -- AVL (REVEAL): for rankers that read texts and images ----------------------------------------------
    avl: Literal["gradients", "updates", "two-sided"] | None = None
    """Reweights what images teach. gradients: scales their gradients (the paper). updates: scales their Adam
    steps, in which a constant factor of the gradient cancels. two-sided: gradients of images and of texts."""
    avl_alpha: float | None = None
    """How strongly AVL reweights, 0.1 by default; 0 measures and changes nothing."""
    avl_mean: Literal["cumulative", "ema"] | None = None
    """What AVL compares a step's losses with: their mean over all steps (default), or an exponential mean."""
    avl_decay: float | None = None
    """Of the exponential mean, 0.99 by default."""

    # -- Output --------------------------------------------------------------------------------------------
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """The run's folder; by default runs/RANKER."""
    resume: Literal["none", "auto"] = "none"
    """`auto`: go on with the run in the folder, where there is one."""
    overwrite: bool = False
    """Replace the run in the folder."""

    def config(self) -> Any:
        """Returns the ranker's own options.

        Raises:
            DataError: One cannot work.
        """
        kind = ranker_class(self.ranker).Config
        config = kind(**{each.name: getattr(self, each.name) for each in fields(kind)})
        check_config(config)
        return config

    def features_read(self) -> tuple[str, ...]:
        """Returns the features that the ranker reads: "text", "image", both or none."""
        return getattr(self.config(), "modalities", ranker_class(self.ranker).modalities)

    def as_json(self) -> dict[str, Any]:
        """Returns all options as a manifest keeps them."""
        return settings_of(self)

    def differences(self, settings: dict[str, Any]) -> list[str]:
        """Returns what would make a resumed run another one, as `name: then, now`."""
        # With validation after every epoch the old last epoch was validated as it would be in a longer run.
        epochs = ("epochs",) if self.valid_every == 1 else ()
        return setting_differences(settings_of(self), settings, (*_FREE_ON_RESUME, *epochs))


def check_config(config: Any) -> None:
    """Raises a `DataError` for sizes, shares and weights of a ranker that cannot work."""
    for name, value in asdict(config).items():
        flag = name.replace("_", "-")
        if type(value) is int and value < 1:
            raise DataError(f"--{flag} {value}: expected 1 or more")
        if type(value) is not float:
            continue
        if not (math.isfinite(value) and value >= 0):
            raise DataError(f"--{flag} {value}: expected 0 or more")
        if ("temperature" in name or name == "interest_share") and not value:
            raise DataError(f"--{flag} {value}: expected more than 0")
        if "dropout" in name and value >= 1:
            raise DataError(f"--{flag} {value}: expected less than 1")
        shares = ("pruned", "placeholders", "image_weight", "threshold")
        if (name.endswith("_share") or name in shares) and value > 1:
            raise DataError(f"--{flag} {value}: expected a share, 1 at most")
    if hasattr(config, "check"):
        config.check()
    heads = getattr(config, "heads", 1)
    if config.width % heads:
        raise DataError(f"--width {config.width}: expected a multiple of --heads {heads}")


def options_class(name: str) -> type[TrainRankerOptions]:
    """Returns the options of one ranker: those of training, and its config's.

    Raises:
        DataError: There is no ranker of that name.
    """
    config = ranker_class(name).Config
    shared = {each.name for each in fields(TrainRankerOptions)} & {each.name for each in fields(config)}
    if shared:
        raise TypeError(f"{config.__name__} and the options of training both have {shared}")
    hints, helps = get_type_hints(config), _helps(config)
    own = [
        (
            each.name,
            Annotated[hints[each.name], arg(help=helps[each.name])],
            dataclasses.field(default=each.default),
        )
        for each in fields(config)
    ]
    return dataclasses.make_dataclass(
        "RankerOptions",
        own,
        bases=(TrainRankerOptions,),
        namespace={"__doc__": f"Trains {ranker_class(name).__name__} on a split's training part."},
    )


def class_of_arguments(argv: Sequence[str]) -> type[TrainRankerOptions]:
    """Returns the options of the ranker that the YAML file or the flags name; of all where none is named.

    Raises:
        DataError: None is named, unless help is asked for; or there is none of that name.
    """
    name = peek("ranker", argv)
    if name is None:
        if {"-h", "--help"} & set(argv):
            return TrainRankerOptions
        raise DataError(
            f"--ranker is missing: give one of {', '.join(RANKERS)}, or --config "
            "recipes/configs/rankers/<ranker>.yaml"
        )
    return options_class(str(name))


def _helps(config: type) -> dict[str, str]:
    """Returns the string below each field of a config, and of those it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed([each for each in config.__mro__ if dataclasses.is_dataclass(each)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        for field, told in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(told, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(told.value).split())
    return found
