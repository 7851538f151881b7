"""A ranker on disk: model.safetensors and JSON beside it, and the state from which training goes on.

A run's folder has

    model.safetensors   the weights of the best validation so far
    manifest.json       ranker, config, split, features by fingerprint, settings, versions
    metrics.json        the best epoch and its validation metrics, when training has ended
    log.jsonl           a line for each epoch
    last/               weights and Adam's moments after the latest epoch; replaced as a whole

Frozen features and graphs are not stored: they come from the dataset, and are compared by fingerprint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, staged_folder, write_file, write_json
from recllm.rankers.ranker import Ranker

MODEL, LAST, STATE = "model.safetensors", "last", "state.safetensors"
_STATE_KIND = "ranker state"


@dataclass
class RunState:
    """How far training has come.

    Attributes:
        epoch: Epochs that are done.
        best_epoch: The one with the best validation, from 1; 0 before any.
        valid: Its metrics.
        validations_since: Validations since then, none of them better.
        log: A line for each epoch.
        plugin: The state of the plug-in; empty without one.
    """

    epoch: int = 0
    best_epoch: int = 0
    valid: dict[str, float] = field(default_factory=dict)
    validations_since: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    plugin: dict[str, Any] = field(default_factory=dict)

    def improves(self, metric: str, valid: dict[str, float]) -> bool:
        """Returns whether a validation is better than the best so far."""
        return not self.valid or valid[metric] > self.valid[metric]


def save_ranker(folder: Path, ranker: Ranker) -> None:
    """Writes a ranker's weights and buffers to model.safetensors, atomically."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in ranker.state_dict().items()}
    write_file(folder / MODEL, lambda temporary: save_file(tensors, temporary))


def load_weights(folder: Path, ranker: Ranker) -> None:
    """Reads a ranker's weights.

    Raises:
        DataError: The file is missing or damaged, or belongs to another ranker or config.
    """
    _load(ranker, _read(folder / MODEL), folder / MODEL)


def save_state(folder: Path, ranker: Ranker, optimizer: torch.optim.Optimizer, state: RunState) -> None:
    """Writes everything that training needs to go on; an interrupted write leaves the state before it."""
    from safetensors.torch import save_file

    tensors = {f"ranker.{name}": value for name, value in ranker.state_dict().items()}
    for name, parameter in ranker.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = torch.as_tensor(value)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with staged_folder(folder / LAST, kind=_STATE_KIND, overwrite=True) as staging:
        save_file(tensors, staging / STATE)
        write_json(staging / MANIFEST, {"kind": _STATE_KIND, **asdict(state)})


def load_state(folder: Path, ranker: Ranker, optimizer: torch.optim.Optimizer) -> RunState:
    """Reads a state into a ranker and its optimizer; a new one where nothing has been saved yet."""
    if not (folder / LAST / MANIFEST).is_file():
        return RunState()
    told = read_json(folder / LAST / MANIFEST, "the state of a run")
    path = folder / LAST / STATE
    tensors = _read(path)
    weights = {name[7:]: value for name, value in tensors.items() if name.startswith("ranker.")}
    _load(ranker, weights, path)
    for name, parameter in ranker.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (stored := tensors.get(f"adam.{key}.{name}")) is not None:
                optimizer.state[parameter][key] = stored.to(parameter.device)
    told.setdefault("plugin", {})  # runs of earlier versions had none
    return RunState(**{name: told[name] for name in RunState.__dataclass_fields__})


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a ranker's weights")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not readable as safetensors ({error}); train the ranker again") from None


def _load(ranker: Ranker, tensors: dict[str, torch.Tensor], path: Path) -> None:
    wanted = {name: value.shape for name, value in ranker.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = _told(found.get(name)), _told(wanted.get(name))
            raise DataError(
                f"{path}: {name} is {here}, and {there} in {type(ranker).__name__} as it is configured; "
                "the file belongs to another ranker, config or catalog"
            )
    ranker.load_state_dict(tensors)


def _told(shape: torch.Size | None) -> str:
    return "not there" if shape is None else f"of shape {list(shape)}"
