"""A training run of a ranker: opened or resumed, described, and opened again to score with."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from recllm.data.origins import Origin, check_same_origin
from recllm.data.splits import HeldOut, Split
from recllm.errors import BusyError, DataError
from recllm.files import MANIFEST, refuse_nested, staged_folder, write_json
from recllm.processes import rank, sum_over_ranks
from recllm.rankers import ranker_class
from recllm.rankers.feature_order import needs_order
from recllm.rankers.features import (
    Features,
    check_learned_from,
    image_features,
    no_features,
    text_features,
)
from recllm.rankers.fit import Fitted, seed_weights
from recllm.rankers.launching import check_launch
from recllm.rankers.options import TrainRankerOptions, options_class
from recllm.rankers.ranker import PairRanker, Ranker, check_needs
from recllm.rankers.ranking import check_users_are_served
from recllm.rankers.saving import LAST, load_weights
from recllm.rankers.training_data import TrainingData
from recllm.rankers.user_texts import user_text_features
from recllm.runs.folder import (
    FINISHED,
    RANKER,
    TRAINING,
    check_resumable,
    find_run,
    lock_run,
    read_manifest,
)
from recllm.runs.provenance import describe_run

METRICS = "metrics.json"
LEAKY = "  these texts were written from held-out interactions: what they score is no prediction"


@dataclass(frozen=True)
class RankerRun:
    """Where a run is kept, and what it is made from."""

    path: Path
    split: Split
    data: TrainingData
    resumed: bool = False
    finished: bool = False


def open_run(options: TrainRankerOptions) -> RankerRun:
    """Reads split and features, and finds the run to go on with, where there is one. Changes nothing.

    Raises:
        DataError: The folder is there and neither --resume nor --overwrite was given, it is no run's, or its
            run had other settings or data; the split or a feature is missing.
    """
    check_launch()
    if options.split is None:
        raise DataError("--split is missing: give DATASET/splits/NAME, made by `recllm data split`")
    path = options.out or Path("runs") / options.ranker
    begun = _begun(path, options)
    split = Split.open(options.split)
    options.check(ranker_class(options.ranker), len(split.dataset.items))
    options.config()
    _check_ablation(options)
    _check_order_is_used(options)
    _check_user_texts_are_read(options)
    check_users_are_served(ranker_class(options.ranker), split, "valid")
    check_needs(ranker_class(options.ranker), TrainingData.of(split))
    if rank() == 0:  # the first to come makes what is kept: embeddings, visual store, sequences
        data = read_data(options, split)
        for name, each in data.features.items():
            missing = int((~each.present).sum())
            print(f"{name}: {each.source}; {missing:,} of {data.n_items:,} items have none", flush=True)
        if data.user_features is not None:
            missing = int((~data.user_features.present).sum())
            print(f"users: {data.user_features.source}; {missing:,} of {data.n_users:,} users have none")
            if data.user_features.leak:
                print(LEAKY, flush=True)
    sum_over_ranks([0])
    if rank() != 0:
        data = read_data(options, split)
    if begun is None:
        return RankerRun(path, split, data)
    manifest = _manifest(options, split, data, TRAINING)
    for name in ("data_hash", "split_hash", "features", "user_features"):
        if begun.get(name) != manifest[name]:
            raise DataError(f"{path} was begun with other {name.replace('_', ' ')}; give another --out")
    longer = any(getattr(options, name) > begun["settings"][name] for name in ("epochs", "patience"))
    return RankerRun(path, split, data, True, begun["status"] == FINISHED and not longer)


def make_ranker(options: TrainRankerOptions, data: TrainingData) -> Ranker:
    """Makes the ranker with the initial weights of its seed.

    Raises:
        DataError: An option of its own cannot work, or it needs what the data lacks.
    """
    seed_weights(options.seed)
    return ranker_class(options.ranker)(data, options.config())


def begin_run(options: TrainRankerOptions, run: RankerRun) -> BinaryIO | None:
    """Keeps other processes out of the run's folder, and makes it where it is new.

    Returns:
        A lock, held until it is closed or this process ends; rank 0's alone.

    Raises:
        BusyError: Another process trains in the folder, or has since it was looked at.
        DataError: As `open_run`.
    """
    lock = None
    if rank() == 0:
        lock = lock_run(run.path)
        if (_begun(run.path, options) is not None) != run.resumed:
            raise BusyError(f"{run.path}: another process has trained in it meanwhile; look at it again")
        manifest = _manifest(options, run.split, run.data, TRAINING)
        if run.resumed:
            write_json(run.path / MANIFEST, manifest)
        else:
            refuse = partial(refuse_nested, own=(LAST,))
            with staged_folder(run.path, kind=RANKER, overwrite=True, refuse=refuse) as staging:
                write_json(staging / MANIFEST, manifest)
    sum_over_ranks([0])
    return lock


def keep_run(options: TrainRankerOptions, run: RankerRun, fitted: Fitted, ranker: Ranker) -> None:
    """Writes the metrics, and marks the run as finished."""
    if rank() == 0:
        epochs = [line for line in fitted.log if "seconds" in line]
        metrics = {
            "best_epoch": fitted.best_epoch,
            "best_step": fitted.best_epoch,  # as recllm report reads it: a line of the log is an epoch
            "valid": fitted.valid,
            "protocol": f"{run.split.protocol}/full/mask-seen/valid",
            "epochs": fitted.epochs,
            "seconds_an_epoch": statistics.median(line["seconds"] for line in epochs),
            "parameters": sum(parameter.numel() for parameter in ranker.parameters()),
        }
        write_json(run.path / METRICS, metrics)
        write_json(run.path / MANIFEST, _manifest(options, run.split, run.data, FINISHED))
        best = fitted.valid[options.valid_metric]
        print(
            f"{run.path}: best epoch {fitted.best_epoch} of {fitted.epochs}, validation "
            f"{options.valid_metric} {best:.4f}; next: recllm score ranker {run.path}"
        )
    sum_over_ranks([0])


def load_run(
    path: Path,
    split: Path | None = None,
    *,
    text: str | None = None,
    image: str | None = None,
    feature_order: str | None = None,
    known_before: HeldOut | None = None,
) -> tuple[Ranker, RankerRun, str]:
    """Opens a run to score with.

    Args:
        path: The run's folder.
        split: Another place of the split that it was trained on; None where it is where it was.
        text: Another place of its text features.
        image: Another place of its image features.
        feature_order: The order of features in a .npy file, where it is another than in training.
        known_before: Graphs of interactions hold all that is known before the targets of this part; None:
            training interactions, as in training.

    Returns:
        The ranker with its best weights, on the accelerator where there is one; the run; the ranker's name.

    Raises:
        DataError: The folder is no run of a ranker, has no weights yet, or dataset, split or features are not
            those that it was trained with.
    """
    import torch

    manifest = read_manifest(path, RANKER)
    if manifest.get("status") != FINISHED:
        raise DataError(f"{path}: its training has not ended; --resume auto resumes it")
    try:
        options = from_json(manifest["settings"])
        trained_on = Origin.of_manifest(path, manifest, "was trained on")
        fingerprints = {name: each["fingerprint"] for name, each in manifest["features"].items()}
        if manifest.get("user_features") is not None:
            fingerprints["user"] = manifest["user_features"]["fingerprint"]
        config = options.config()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path / MANIFEST} is damaged ({error!r}); train the ranker again") from None
    options.text, options.image = text or options.text, image or options.image
    options.feature_order = feature_order or options.feature_order
    opened = Split.open(split or options.split)
    remedy = "score it on the split that it was trained on, or train it on this one"
    check_same_origin(trained_on, opened.origin, remedy=remedy, required=("dataset", "split"))
    data = read_data(options, opened)
    for name, fingerprint in fingerprints.items():
        now = data.user_features if name == "user" else data.features.get(name)
        if now is None or now.fingerprint != fingerprint:
            raise DataError(f"{path} was trained with other {name} features than there are now; train again")
    kind, known = ranker_class(options.ranker), data
    if known_before and issubclass(kind, PairRanker):
        known = data.knowing(data.known_before(opened, known_before))
    ranker = kind(known, config)
    load_weights(path, ranker)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ranker.to(device or "cpu"), RankerRun(path, opened, data, finished=True), options.ranker


def read_modalities(options: TrainRankerOptions, split: Split) -> dict[str, Features]:
    """Reads the features that the ranker takes and the options name.

    Raises:
        DataError: One is missing or damaged.
    """
    wanted = options.features_read()
    features = {}
    if options.without in wanted:
        source = f"none (--without {options.without})"
        features[options.without] = no_features(len(split.dataset.items), source)
        wanted = tuple(name for name in wanted if name != options.without)
    if "image" in wanted and options.image is None:
        raise DataError(
            f"{options.ranker} reads images: give --image MODEL (tiny, a folder, a hub id) or --image FILE "
            "of vectors; --image none trains it without, where it can do without"
        )
    if "text" in wanted and options.text != "none":
        features["text"] = text_features(
            split.dataset,
            options.text,
            order=options.feature_order,
            encoder=options.encoder,
            progress=rank() == 0,
        )
    if "image" in wanted and options.image != "none":
        check_learned_from(options.image, split)
        features["image"] = image_features(
            split.dataset, options.image, order=options.feature_order, max_pixels=options.max_pixels
        )
    return features


def _check_ablation(options: TrainRankerOptions) -> None:
    """Raises a `DataError` where --without takes nothing away, or leaves nothing to tell items by."""
    without, read = options.without, options.features_read()
    if without is None:
        return
    if without not in read:
        raise DataError(f"--without {without}: {options.ranker} reads no {without}; leave the option out")
    if getattr(options, without) == "none":
        raise DataError(f"--without {without} --{without} none: give one of the two")
    if read == (without,) and not getattr(options.config(), "transductive", True):
        raise DataError(
            f"--without {without}: without --transductive, {options.ranker} knows items by their {without} "
            "alone"
        )


def read_data(options: TrainRankerOptions, split: Split) -> TrainingData:
    """Reads the training part of a split, and the features that the ranker takes and the options name.

    Raises:
        DataError: One is missing or damaged, or texts about users were written from held-out interactions.
    """
    users = None
    if options.user_text is not None:
        users = user_text_features(
            split,
            options.user_text,
            allow_leak=options.allow_leak,
            encoder=options.encoder,
            progress=rank() == 0,
        )
    return TrainingData.of(split, read_modalities(options, split), users)


def _check_user_texts_are_read(options: TrainRankerOptions) -> None:
    reads = ranker_class(options.ranker).reads_user_texts and getattr(options, "reasoning", True)
    if options.user_text is not None and not reads:
        without = " with --no-reasoning" if ranker_class(options.ranker).reads_user_texts else ""
        raise DataError(
            f"--user-text {options.user_text}: {options.ranker}{without} reads no texts about users; "
            "leave the option out"
        )
    if options.user_text is None and reads:
        raise DataError(
            f"{options.ranker} reads texts about users: give --user-text preference, which `recllm build "
            "users DATASET --system mllmrec` writes; or --no-reasoning for learned vectors"
        )
    if options.allow_leak and options.user_text is None:
        raise DataError("--allow-leak is about --user-text, which is not given; leave it out")


def _check_order_is_used(options: TrainRankerOptions) -> None:
    read = [name for name in options.features_read() if name != options.without]
    sources = {name: getattr(options, name) for name in read}
    if options.feature_order is not None and not any(map(needs_order, sources.values())):
        read = ", ".join(f"--{name} {source}" for name, source in sources.items()) or "no features"
        raise DataError(
            f"--feature-order {options.feature_order}: only a .npy file without ids takes an order, and "
            f"{options.ranker} reads {read}; leave the option out"
        )


def from_json(settings: dict[str, Any]) -> TrainRankerOptions:
    """Returns the options that a manifest holds.

    Raises:
        DataError: It has an option that this version does not know.
    """
    kind = options_class(settings["ranker"])
    known = kind.__dataclass_fields__
    if unknown := settings.keys() - known.keys():
        raise DataError(f"the run has options that this version does not know: {', '.join(sorted(unknown))}")
    paths = {"split", "out"}
    return kind(
        **{
            name: Path(value)
            if name in paths and value is not None
            else tuple(value)
            if isinstance(value, list)
            else value
            for name, value in settings.items()
        }
    )


def _begun(path: Path, options: TrainRankerOptions) -> dict[str, Any] | None:
    """Returns the manifest of the run to go on with; None where a new one begins."""
    manifest = find_run(path, RANKER)
    if manifest is None or options.overwrite:
        return None
    if manifest["status"] == TRAINING and not (path / LAST).exists():
        return None  # nothing to lose, nothing to resume from
    check_resumable(path, resume=options.resume, differences=options.differences(manifest["settings"]))
    return manifest


def _manifest(options: TrainRankerOptions, split: Split, data: TrainingData, status: str) -> dict[str, Any]:
    return {
        "kind": RANKER,
        "status": status,
        "ranker": options.ranker,
        "settings": options.as_json(),
        "dataset": str(split.dataset.folder),
        "data_hash": split.dataset.data_hash,
        "split_hash": split.split_hash,
        "protocol": split.protocol,
        "features": {
            name: {
                "source": each.source,
                "width": each.vectors.shape[1],
                "items_without": int((~each.present).sum()),
                "fingerprint": each.fingerprint,
            }
            for name, each in data.features.items()
        },
        "user_features": data.user_features
        and {
            **data.user_features.facts,
            "width": data.user_features.vectors.shape[1],
            "users_without": int((~data.user_features.present).sum()),
            "fingerprint": data.user_features.fingerprint,
        },
        "run": describe_run(),
    }
