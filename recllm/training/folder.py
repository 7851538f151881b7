"""A run's folder: opened, resumed or replaced at the start, and made complete at the end."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from recllm.data.instructions import InstructionPart, check_trained_on, open_part
from recllm.data.origins import Origin, check_same_origin
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, refuse_nested, write_file, write_json
from recllm.processes import rank, sum_over_ranks, world_size
from recllm.runs.folder import (
    FINISHED,
    SFT,
    TRAINING,
    check_resumable,
    find_run,
    lock_run,
    release_run,
)
from recllm.runs.log import read_log
from recllm.runs.provenance import describe_run
from recllm.training.checkpoints import complete_checkpoints, is_complete, step_of
from recllm.training.options import SFTOptions

if TYPE_CHECKING:
    from recllm.training.sft import TrainableModel, TrainingData
    from recllm.training.trainer import RecSFTTrainer

_KEPT = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # of the best checkpoint
_OF_TRAINING = ("trainer_state.json", "complete.json")


@dataclass(frozen=True)
class RunFolder:
    """Where a run is kept.

    Attributes:
        path: The folder.
        parts: The training rows and the validation lists; None where the run is finished.
        checkpoint: The complete checkpoint that it goes on from; None where it begins.
        finished: Nothing is left to do.
        lock: Held while this process trains in the folder; rank 0's alone.
    """

    path: Path
    parts: tuple[InstructionPart, InstructionPart] | None = None
    checkpoint: Path | None = None
    finished: bool = False
    lock: BinaryIO | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *raised: object) -> None:
        """Releases the folder for other processes; the end of this process does so as well."""
        release_run(self.lock)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def step(self) -> int:
        """The step that it goes on from."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


def open_run(options: SFTOptions) -> RunFolder:
    """Makes the run's folder, or finds the checkpoint in it to go on from.

    Raises:
        DataError: The folder is there and neither --resume nor --overwrite was given, it is no run's, or its
            run had other settings or rows; there are no instructions, or those of training, of validation
            and of the weights to start from are of different splits.
    """
    if options.instructions is None:
        raise DataError("--instructions is missing: give a folder made by `recllm build instructions`")
    check_reports(options)
    check_optimizer(options)
    name = f"{Path(options.model).name}-{options.method}-{Path(options.instructions).name}"
    run = RunFolder(options.out or Path("runs") / name)
    if begun(run.path, SFT) and not options.overwrite:
        run = _resumed(options, run)
    elif options.resume not in ("auto", "none"):
        raise DataError(f"--resume {options.resume}: there is no run in {run.path} to go on with")
    if not run.finished:
        run = replace(run, parts=_open_parts(options))
    if run.checkpoint is not None:
        _check_rows(run)
    return start_run(run, lambda: _manifest(options, run, TRAINING))


def start_run(run: RunFolder, manifest: Callable[[], dict[str, Any]]) -> RunFolder:
    """Locks a run's folder, and empties it for a new run; on all ranks, of which rank 0 changes it.

    Args:
        run: Where the run begins or goes on; returned as it is if it is finished.
        manifest: Makes the manifest of a run that begins.

    Returns:
        The run, with the lock on rank 0.

    Raises:
        BusyError: Another process trains in the folder.
        DataError: The folder holds what other commands made.
    """
    sum_over_ranks([0])  # all ranks have looked before rank 0 changes anything
    if rank() == 0 and run.finished:
        print(f"{run.path} is finished; --overwrite trains it again")
    elif rank() == 0:
        run = replace(run, lock=lock_run(run.path))
        if run.checkpoint is None:
            refuse_nested(run.path)
            run.path.mkdir(parents=True, exist_ok=True)
            empty_folder(run.path)
            run.checkpoints.mkdir()
            write_json(run.path / MANIFEST, manifest())
        else:
            print(f"resuming from {run.checkpoint}", flush=True)
    sum_over_ranks([0])
    return run


def keep_run(
    options: SFTOptions,
    run: RunFolder,
    trainer: RecSFTTrainer,
    model: TrainableModel,
    data: TrainingData,
) -> None:
    """Puts the best step's weights, metrics, curves and card into the run's folder; the manifest last."""
    probes = data.validation.probes(trainer.model)
    if rank() == 0:
        keep_weights(run, trainer.state.best_global_step)
        write_file(run.path / "probes.parquet", probes.write_parquet)
        write_json(run.path / "metrics.json", _metrics(run, trainer))
        write_json(
            run.path / MANIFEST,
            {
                **_manifest(options, run, FINISHED),
                "model": model.loaded.identity,
                "parts": [list(astuple(each)) for each in model.counts],
                "ranks": world_size(),
            },
        )
        _draw_and_describe(run.path)
        shutil.rmtree(run.path / "rows", ignore_errors=True)
    sum_over_ranks([0])


def keep_weights(run: RunFolder, step: int) -> None:
    """Copies what a model is loaded from, of a step's checkpoint, into the run's folder."""
    best = run.checkpoints / f"checkpoint-{step}"
    for path in sorted({path for pattern in _KEPT for path in best.glob(pattern)}):
        if path.name not in _OF_TRAINING:
            write_file(run.path / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))


def push_run(options: Any, run: RunFolder) -> None:
    """Uploads a finished run where `--push-to-hub` asks for it, be it finished now or before.

    Raises:
        DataError: The upload failed; the folder is complete, and the upload can be repeated.
    """
    if rank() == 0 and options.push_to_hub is not None:
        from recllm.training.hub import push_folder

        push_folder(run.path, options.push_to_hub)
    sum_over_ranks([0])


def _draw_and_describe(path: Path) -> None:
    from recllm.training.card import write_card
    from recllm.training.curves import draw_curves

    draw_curves(path)
    write_card(path)


def check_optimizer(options: Any) -> None:
    """Raises a `DataError` where transformers has no optimizer of the name in `options.optimizer`."""
    from transformers.training_args import OptimizerNames

    known = [name.value for name in OptimizerNames]
    if options.optimizer not in known:
        nearest = difflib.get_close_matches(options.optimizer, known, 3, 0)
        raise DataError(f"--optimizer {options.optimizer!r}: unknown; did you mean {' or '.join(nearest)}?")


def begun(path: Path, kind: str) -> bool:
    """Returns whether there is a run in the folder with something to lose.

    Raises:
        DataError: Something else is there.
    """
    manifest = find_run(path, kind)
    if manifest is None:
        return False
    finished = manifest["status"] == FINISHED
    return finished or bool(complete_checkpoints(path / "checkpoints"))


def checkpoint_to_resume(run: RunFolder, resume: str) -> Path | None:
    """Returns the checkpoint that `--resume` names, or the latest whole one; None where there is none yet.

    Raises:
        DataError: It names something else.
    """
    if resume == "auto":
        return (complete_checkpoints(run.checkpoints) or [None])[-1]
    checkpoint = Path(resume)
    step_of(checkpoint)
    if not is_complete(checkpoint):
        raise DataError(f"--resume {checkpoint}: not a complete checkpoint; --resume auto takes the latest")
    return checkpoint


def empty_folder(path: Path) -> None:
    """Removes all that a folder holds, its manifest last, so that a kill leaves it known for what it was."""
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == MANIFEST):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def check_reports(options: Any) -> None:
    """Raises a `DataError` where the package of a name in `options.report_to` is not installed."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    for name in options.report_to:
        if name not in get_available_reporting_integrations():
            raise DataError(f"--report-to {name}: its package is not installed; pip install {name}")


def _resumed(options: SFTOptions, run: RunFolder) -> RunFolder:
    """Returns where the run in the folder goes on."""
    manifest = read_json(run.path / MANIFEST, "a run")
    check_resumable(run.path, resume=options.resume, differences=options.differences(manifest["settings"]))
    if manifest["status"] == FINISHED:
        return replace(run, finished=True)
    return replace(run, checkpoint=checkpoint_to_resume(run, options.resume))


def _open_parts(options: SFTOptions) -> tuple[InstructionPart, InstructionPart]:
    """Opens the rows, and checks that validation and the weights to start from are of the same split."""
    assert options.instructions is not None
    train = open_part(options.instructions, "train")
    valid = open_part(options.valid_instructions or options.instructions, "valid")
    one, other = (Origin.of_manifest(each.path, each.manifest, "was built from") for each in (valid, train))
    check_same_origin(
        one,
        other,
        remedy="what was trained on may be among the validation targets; build both from one split",
        required=("dataset", "split"),
    )
    for weights in (options.model, options.adapter):
        check_trained_on(weights, train, allow_other_split=options.allow_other_split)
    return train, valid


def _check_rows(run: RunFolder) -> None:
    """Refuses to go on with other rows than those that the run was begun with."""
    begun = read_json(run.path / MANIFEST, "a run").get("instructions")
    now = _instructions(run)
    for part in ("train", "valid"):
        if begun is not None and begun[part]["sha256"] != now[part]["sha256"]:
            raise DataError(
                f"{run.path} was begun with other {part} rows than {now[part]['path']} has now; build those "
                "again, or train a new run in another --out"
            )


def _instructions(run: RunFolder) -> dict[str, Any]:
    assert run.parts is not None
    train, valid = run.parts
    return {
        "train": {"path": str(train.path), **train.description},
        "valid": {"path": str(valid.path), **valid.description},
        "dataset": str(train.dataset),
        **train.facts(),
        "protocol": valid.protocol,
    }


def _manifest(options: SFTOptions, run: RunFolder, status: str) -> dict[str, Any]:
    return {
        "kind": SFT,
        "status": status,
        "settings": options.as_json(),
        "instructions": _instructions(run),
        "run": describe_run(),
    }


def _metrics(run: RunFolder, trainer: RecSFTTrainer) -> dict[str, Any]:
    lines = read_log(run.path / "log.jsonl")
    best = trainer.state.best_global_step
    valid = next(line for line in lines if line["step"] == best and "valid_auc" in line)
    losses = [line for line in lines if "loss" in line]
    return {
        "best_step": best,
        "valid": {name[6:]: value for name, value in valid.items() if name.startswith("valid_")},
        "train": {
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "loss": losses[-1]["loss"] if losses else None,
            "first_loss": losses[0]["loss"] if losses else None,
        },
    }
