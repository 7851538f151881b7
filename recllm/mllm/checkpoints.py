"""Finding a model's folder by name, and saying what is wrong with it before anything is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recllm.errors import DataError
from recllm.files import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_INDEX = "model.safetensors.index.json"
EXAMPLES = "for example Qwen/Qwen2-VL-2B-Instruct"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model or adapter on disk.

    Attributes:
        name: As it was asked for where it is a hub id or `tiny`, else the folder's base name.
        folder: Where its files are.
        commit: The commit of the hub's snapshot; None for a local folder.
    """

    name: str
    folder: Path
    commit: str | None = None


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Returns where a model or adapter is; one of the hub is fetched into its cache where need be.

    Args:
        name: A local folder, a hub id, or `tiny` for the embedded model (a folder of that name is
            `./tiny`). A folder takes precedence over the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        DataError: There is no such folder, the hub does not have it, or it is not cached and the hub cannot
            be reached.
    """
    folder = Path(name).expanduser()
    if name == "tiny":
        if revision is not None:
            raise DataError(f"tiny: the embedded model has no revision {revision!r}; leave it out")
        from recllm.mllm import tiny

        return Checkpoint("tiny", tiny.checkpoint_folder())
    if folder.is_file():
        raise DataError(f"{name}: a file; give the folder that it is in")
    if folder.is_dir():
        if revision is not None:
            raise DataError(f"{name}: a local folder has no revision {revision!r}; leave it out")
        return Checkpoint(folder.resolve().name, folder)
    if not _HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such folder")
    return _from_hub(name, revision)


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Checks that a folder holds a whole model with a processor, reading no weights; returns its config.json.

    Raises:
        DataError: A file is missing, cut off or of a kind that is not loaded.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise DataError(f"{folder}: an adapter, not a model; give it as adapter, and its base as model")
        raise DataError(f"{folder}: no config.json, so this is not a model's folder")
    config = read_json(folder / "config.json", "a model's folder")
    check_architecture(config, folder)
    _check_weights(folder)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise DataError(
            f"{folder}: no preprocessor_config.json or processor_config.json; copy the processor's files "
            "from the model that this one was trained from"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise DataError(f"{folder}: no tokenizer_config.json; copy the tokenizer's files from the base model")
    return config


def check_safetensors(path: Path) -> None:
    """Checks that a safetensors file is as long as its header says.

    Raises:
        DataError: It is cut off, a Git LFS pointer, or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise DataError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise DataError(f"{path}: cut off or not a safetensors file ({size} bytes); download it again")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            raise DataError(f"{path}: not a safetensors file; download it again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise DataError(f"{path}: {size} bytes, but its header says {expected}; download it again")


def _check_weights(folder: Path) -> None:
    present = {path.name for path in folder.glob("*.safetensors")}
    if (folder / _INDEX).is_file():
        shards = set(read_json(folder / _INDEX, "a model's folder").get("weight_map", {}).values())
        if missing := sorted(shards - present):
            raise DataError(
                f"{folder}: half downloaded, {len(missing)} of {len(shards)} weight files are missing "
                f"({missing[0]}); download it again"
            )
    elif "model.safetensors" in present:
        shards = {"model.safetensors"}
    elif present:
        raise DataError(f"{folder}: no model.safetensors and no {_INDEX}; download it again")
    else:
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        if pickles:
            raise DataError(
                f"{folder}: weights as pickle only ({pickles[0]}), which can run code and is not loaded; "
                "save them as safetensors with save_pretrained where you trust them"
            )
        if half := [path.name for path in folder.rglob("*.incomplete")]:
            raise DataError(f"{folder}: half downloaded ({half[0]}); download it again")
        raise DataError(
            f"{folder}: no model.safetensors; download it again (only safetensors are loaded, never pickles)"
        )
    for shard in sorted(shards):
        check_safetensors(folder / shard)


def check_architecture(config: dict[str, Any], folder: Path) -> None:
    """Checks that a config.json names a model that takes images and text and that transformers knows.

    Raises:
        DataError: It does not.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = config.get("model_type")
    architecture = (config.get("architectures") or [kind])[0]
    if kind not in CONFIG_MAPPING_NAMES:
        code = " It needs code from its repository, which is never run." if config.get("auto_map") else ""
        raise DataError(
            f"{folder}: the architecture {architecture} (model_type {kind!r}) is unknown to this version of "
            f"transformers.{code} Use one that it knows, {EXAMPLES}"
        )
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or "vision_config" not in config:
        raise DataError(
            f"{folder}: {architecture} is a text-only model or no chat model; use one that takes images and "
            f"text, {EXAMPLES}"
        )


def _from_hub(name: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name} (revision {revision})" if revision else name
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=["*/*"])
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise DataError(
            f"{at}: no such folder, not in the hub's cache, and the hub cannot be reached; check the name, "
            "go online once, or give the path of a local folder"
        ) from None
    except GatedRepoError:
        raise DataError(f"{at}: the hub asks for a login; accept its terms and run `hf auth login`") from None
    except RevisionNotFoundError:
        raise DataError(f"{at}: the hub has the model, but not this revision") from None
    except RepositoryNotFoundError:
        raise DataError(f"{at}: neither a local folder nor on the hub (or it is private)") from None
    except HfHubHTTPError as error:
        raise DataError(f"{at}: the hub failed: {str(error).splitlines()[0]}; try again") from None
    return Checkpoint(name, folder, folder.name)
