"""Training, validation and test: protocols, each seeded, each with its name in every file made from it.

A split never copies reviews: its files hold `row`, the row number in `interactions.parquet`, and the columns
that a person wants to see. `target` tells what is to be predicted; rows of a validation or test part that are
not targets are the history of users whom training does not know (`users` splits).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
from tyro.conf import Positional, arg

from recllm.data import split_facts, split_methods
from recllm.data.dataset import Dataset, describe_file, hash_of_files
from recllm.data.derived import refuse_derived
from recllm.data.dislikes import LogRows, split_by_rating
from recllm.data.origins import Origin, check_same_origin
from recllm.data.split_methods import PARTS, TEST, TRAIN, UNUSED, VALID, Assignment
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, staged_folder, write_json
from recllm.runs.provenance import describe_run

HeldOut = Literal["valid", "test"]
DISLIKED = "disliked-"
COLUMNS = ("user", "item", "timestamp", "rating")
_OWN = (*(f"{kind}{part}.parquet" for kind in ("", DISLIKED) for part in PARTS), MANIFEST, "sequences")


@dataclass
class SplitOptions:
    """Splits a dataset into training, validation and test."""

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder."""
    method: Positional[Literal["loo", "ratio", "random", "users", "temporal", "cold-items", "given"]]
    """loo: each user's last interaction is the test, the one before it the validation target. ratio: a share
    of each user's interactions (MMRec). random: a share of all interactions (MLLM-SRec). users: a share of
    the users, last interaction as target (MMSRARec, MLLM-MSR). temporal: everything before one point in time,
    for all users.
    cold-items: a share of the items, with all that users did with them, so that training knows none of the
    targets.
    given: the parts that the source came with."""
    ratios: tuple[float, float, float] = (8, 1, 1)
    """Shares of training, validation and test; not used by loo and given."""
    order: Literal["random", "time"] = "random"
    """For ratio: a random share of each user's interactions, or the last ones in time."""
    seed: int = 42
    """Seed of random splits."""
    cover: bool = False
    """For random: users and items stand in training and in test, as MLLM-SRec promises, as far as that can
    be. A user or an item with one interaction stands in training alone, and a test share that is too small
    for all leaves some out; the command says how many. The parts keep their sizes."""
    like: float | None = None
    """Ratings from here on are likes, lower ones dislikes (MLLM-SRec: 4). Targets and training positives are
    likes; dislikes are kept beside them and become negatives of instruction rows. Everything that is made
    from the split follows: candidates, builders, popularity, rankers. Interactions without a rating are left
    out."""
    drop_cold: bool = False
    """Leave out validation and test targets whose user or item does not occur in training."""
    name: str | None = None
    """Folder name below DATASET/splits; by default the protocol's."""
    overwrite: bool = False
    """Replace the split where it exists."""
    discard_derived: bool = False
    """With --overwrite: also delete the candidates that were drawn for the old split."""


class Split:
    """A split folder, read-only.

    Attributes:
        dataset: The dataset that was split.
        folder: The split's folder.
        manifest: Its `manifest.json`.
    """

    def __init__(self, dataset: Dataset, folder: Path, manifest: dict) -> None:
        self.dataset, self.folder, self.manifest = dataset, folder, manifest

    @classmethod
    def open(cls, folder: Path | str, *, dataset: Dataset | None = None) -> Split:
        """Opens a split folder (`DATASET/splits/<name>`).

        Args:
            folder: The folder.
            dataset: Its dataset, where it is open already.

        Raises:
            DataError: The folder is not a split, or the dataset is not the one that was split.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file() or (folder / "splits").is_dir():
            raise DataError(_not_a_split(folder))
        manifest = read_json(folder / MANIFEST, "a split (made by `recllm data split`)")
        place = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow symbolic links
        if "protocol" not in manifest or place.parent.name != "splits":
            raise DataError(_not_a_split(folder))
        dataset = dataset or Dataset.open(place.parent.parent)
        own = Origin.of_manifest(folder, {"data_hash": manifest.get("data_hash")})
        check_same_origin(own, dataset.origin, remedy="make the split again", required=("dataset",))
        for name in {f"{part}.parquet" for part in PARTS} | set(manifest["files"]):
            path = folder / name
            if not path.exists() or describe_file(path) != manifest["files"].get(name):
                raise DataError(
                    f"{path} is missing or not the file that {MANIFEST} describes; make the split again"
                )
        return cls(dataset, folder, manifest)

    @property
    def protocol(self) -> str:
        """The split's part of the protocol string, for example `loo`."""
        return self.manifest["protocol"]

    @property
    def split_hash(self) -> str:
        """One hash of the three parts."""
        return hash_of_files(self.manifest["files"])

    @property
    def origin(self) -> Origin:
        """The hashes of the split and its dataset, which whatever is made from it must state."""
        hashes = {"data_hash": self.dataset.data_hash, "split_hash": self.split_hash}
        return Origin.of_manifest(self.folder, hashes, "is")

    @property
    def in_time(self) -> bool:
        """Whether no training interaction follows a held-out target of its user, as far as the split says."""
        return self.manifest["facts"].get(split_facts.TRAINING_AFTER_A_TARGET) == 0

    @property
    def like(self) -> float | None:
        """The least rating of a like, where the split was made with `--like`."""
        return self.manifest["settings"].get("like")

    def scan(self, part: str, *, disliked: bool = False) -> pl.LazyFrame:
        """Returns a part, in input order: `row, user, item, timestamp, rating, target`.

        Args:
            part: `train`, `valid` or `test`.
            disliked: Its dislikes, which stand in a file of their own.
        """
        if part not in PARTS:
            raise ValueError(f"part {part!r}: expected one of {', '.join(PARTS)}")
        return pl.scan_parquet(self.folder / f"{DISLIKED if disliked else ''}{part}.parquet", glob=False)

    def rows(self, part: str, *, targets: bool | None = None, disliked: bool = False) -> np.ndarray:
        """Returns the row numbers (in the dataset's interactions) of a part.

        Args:
            part: `train`, `valid` or `test`.
            targets: Only what is to be predicted (True), only what is not (False), or both (None).
            disliked: Those of its dislikes instead; none where the split was made without `--like`.
        """
        if disliked and self.like is None:
            return np.empty(0, dtype=np.int64)
        frame = self.scan(part, disliked=disliked)
        if targets is not None:
            frame = frame.filter(pl.col("target") == targets)
        return frame.select("row").collect(engine="streaming")["row"].to_numpy()

    def history_rows(self, part: str, *, disliked: bool = False) -> np.ndarray:
        """Returns the rows that histories of a part are made of, in input order.

        For `train`: training. For `valid`: training, and the history of validation users. For `test`:
        training, validation, and the history of test users. The test file is only opened for `test`. They may
        be later than a target: which of them are known is decided by `recllm.data.user_histories`.

        Args:
            part: `train`, `valid` or `test`.
            disliked: The dislikes instead.
        """
        known = [self.rows("train", disliked=disliked)]
        if part != "train":
            known.append(self.rows(part, targets=False, disliked=disliked))
        if part == "test":
            known.append(self.rows("valid", disliked=disliked))
        return np.sort(np.concatenate(known))


def make_split(dataset: Dataset, options: SplitOptions) -> Split:
    """Splits a dataset and writes `DATASET/splits/<name>/{train,valid,test}.parquet` with a manifest.

    Raises:
        DataError: The method needs times or given parts that the dataset lacks, a part is empty, or the split
            exists and may not be replaced.
    """
    if options.like is None:
        assignment = _assign(dataset, options)
    else:
        order = f"-{options.order}" if options.method == "ratio" else ""
        rule = f"{options.method}{order}"
        assignment = split_by_rating(dataset, options.like, rule, lambda rows: _assign(rows, options))
    part = assignment.part
    if options.drop_cold:
        _drop_cold(dataset, assignment)
    split_facts.describe(dataset, assignment)
    for code in (VALID, TEST):
        if not assignment.targets_of(code).any():
            told = [f"{fact.replace('_', ' ')}: {value:,}" for fact, value in assignment.facts.items()]
            raise DataError(
                f"{dataset.folder}: the {PARTS[code]} part of {assignment.protocol} has no targets "
                f"({len(dataset.users):,} users, {len(part):,} interactions; {', '.join(told)})"
            )
    if not (part == TRAIN).any():
        raise DataError(f"{dataset.folder}: the training part of {assignment.protocol} is empty")
    name = options.name or assignment.protocol.replace(":", "-").replace("/", "-")
    if Path(name).name != name or name.startswith("."):
        raise DataError(f"--name {name!r}: expected a plain folder name")
    folder = dataset.folder / "splits" / name
    target = pl.Series(assignment.target)
    if assignment.dropped is not None:
        target = target.set(pl.Series(assignment.dropped), None)
    refuse = None if options.discard_derived else partial(refuse_derived, own=_OWN)
    with staged_folder(folder, overwrite=options.overwrite, refuse=refuse) as staging:
        _write_parts(dataset, staging, "", part, target)
        if assignment.disliked_part is not None:
            asked = pl.Series(assignment.disliked_target)
            _write_parts(dataset, staging, DISLIKED, assignment.disliked_part, asked)
        settings = {
            key: value
            for key, value in vars(options).items()
            if key not in ("dataset", "name", "overwrite", "discard_derived")
        }
        manifest = {
            "protocol": assignment.protocol,
            "data_hash": dataset.data_hash,
            "settings": settings,
            "counts": _counts(assignment),
            "facts": assignment.facts,
            "warnings": assignment.warnings,
            "files": {path.name: describe_file(path) for path in sorted(staging.glob("*.parquet"))},
            "run": describe_run(),
        }
        write_json(staging / MANIFEST, manifest)
    return Split(dataset, folder, manifest)


def _write_parts(dataset: Dataset, folder: Path, prefix: str, part: np.ndarray, target: pl.Series) -> None:
    columns = dataset.scan_interactions().select(COLUMNS).with_row_index("row")
    for code, name in enumerate(PARTS):
        chosen = pl.LazyFrame({"target": target, "__part": part})
        rows = pl.concat([columns, chosen], how="horizontal").filter(pl.col("__part") == code).drop("__part")
        rows.sink_parquet(folder / f"{prefix}{name}.parquet", engine="streaming", compression_level=1)


def _assign(dataset: Dataset | LogRows, options: SplitOptions) -> Assignment:
    """Assigns each interaction to a part, by the method that the options name."""
    if options.seed < 0:
        raise DataError(f"--seed {options.seed}: expected 0 or more")
    if options.cover and options.method != "random":
        raise DataError(f"--cover is for the random split; {options.method} has rules of its own")
    if options.method == "loo":
        return split_methods.leave_one_out(dataset)
    if options.method == "given":
        return split_methods.given(dataset)
    ratios = np.asarray(options.ratios, dtype=float)
    if not (np.isfinite(ratios).all() and (ratios > 0).all()):
        raise DataError(f"--ratios {options.ratios}: expected three numbers above zero")
    if options.method == "ratio":
        return split_methods.per_user_ratio(dataset, ratios, options.order, options.seed)
    if options.method == "random":
        return split_methods.random_samples(dataset, ratios, options.seed, cover=options.cover)
    if options.method == "users":
        return split_methods.by_user(dataset, ratios, options.seed)
    if options.method == "cold-items":
        if options.drop_cold:
            raise DataError("--drop-cold leaves out cold targets, and those of cold-items all are")
        return split_methods.by_item(dataset, ratios, options.seed)
    return split_methods.temporal(dataset, ratios)


def _drop_cold(dataset: Dataset, assignment: Assignment) -> None:
    """Takes targets out of evaluation whose user or item training does not know."""
    train = assignment.part == TRAIN
    held_out = assignment.targets_of(VALID) | assignment.targets_of(TEST)
    known_user, known_item = np.zeros(len(dataset.users), bool), np.zeros(len(dataset.items), bool)
    known_user[dataset.user_codes[train]] = True
    known_user[dataset.user_codes[~assignment.target]] = True  # a history is as good as training interactions
    known_item[dataset.item_codes[train]] = True
    assignment.dropped = held_out & ~(known_user[dataset.user_codes] & known_item[dataset.item_codes])
    assignment.facts["cold_targets_left_out"] = int(np.count_nonzero(assignment.dropped))
    assignment.protocol += "-warm"


def _counts(assignment: Assignment) -> dict[str, int]:
    counts = {name: int(np.count_nonzero(assignment.part == code)) for code, name in enumerate(PARTS)}
    for code in (VALID, TEST):
        counts[f"{PARTS[code]}_targets"] = int(np.count_nonzero(assignment.targets_of(code)))
    unused = assignment.part == UNUSED
    if assignment.disliked_part is not None:
        unused &= assignment.disliked_part == UNUSED
        for code, name in enumerate(PARTS):
            counts[f"{name}_dislikes"] = int(np.count_nonzero(assignment.disliked_part == code))
    return {**counts, "unused": int(np.count_nonzero(unused))}


def _not_a_split(folder: Path) -> str:
    dataset = folder if (folder / "splits").is_dir() else folder.parent.parent
    names = sorted(path.parent.name for path in dataset.glob(f"splits/*/{MANIFEST}"))
    known = f"; splits of {dataset}: {', '.join(names)}" if names else "; `recllm data split` makes one"
    return f"{folder} is not a split; expected DATASET/splits/<name>{known}"
