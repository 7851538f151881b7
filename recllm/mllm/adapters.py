"""Putting a LoRA adapter on a model, and making sure that it took: one that does nothing is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recllm.errors import DataError
from recllm.files import MANIFEST, read_json
from recllm.mllm.checkpoints import Checkpoint, check_safetensors
from recllm.mllm.fingerprint import fingerprint

_WEIGHTS = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[^/\\.~][^/\\]*/[^/\\]+")
_SIZE = re.compile(r"(^|[-_ ])\d+(\.\d+)?[bm]($|[-_ ])", re.IGNORECASE)
"""In the name of a folder, the size of a published model, as in Qwen2-VL-2B-Instruct."""


def check_adapter_folder(adapter: Path, base: Checkpoint) -> None:
    """Checks, reading no weights, that a folder holds a LoRA adapter and that it was trained on `base`.

    Four things are compared, each where it is known: the fingerprint of the base that recllm wrote into the
    manifest of the run; the base that the adapter's config names (by contents where it is a folder that is
    still there, else by name where both are names of published models); the class of the base; and the sizes
    of every layer that the adapter changes.

    Raises:
        DataError: Files are missing or cut off, the kind of adapter is not LoRA, or the base is another.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise DataError(f"{adapter}: no adapter_config.json, so this is not an adapter's folder")
    config = read_json(adapter / "adapter_config.json", "an adapter's folder")
    if config.get("peft_type") != "LORA":
        raise DataError(f"{adapter}: a {config.get('peft_type')} adapter; only LoRA adapters are loaded")
    if not (adapter / _WEIGHTS).is_file():
        pickle = (adapter / "adapter_model.bin").is_file()
        raise DataError(
            f"{adapter}: no {_WEIGHTS}"
            + (
                "; weights as pickle can run code and are not loaded, save them as safetensors"
                if pickle
                else ""
            )
        )
    check_safetensors(adapter / _WEIGHTS)
    trained_on = config.get("base_model_name_or_path") or ""
    _check_fingerprint(adapter, base, trained_on)
    _check_name(adapter, base, trained_on)
    _check_class(adapter, base, trained_on, (config.get("auto_mapping") or {}).get("base_model_class"))
    _check_sizes(adapter, base, trained_on)


def _check_fingerprint(adapter: Path, base: Checkpoint, trained_on: str) -> None:
    """Compares the base with what the manifest of recllm's run says of it."""
    run = adapter.resolve().parents[1] if adapter.resolve().parent.name == "checkpoints" else adapter
    if base.commit is not None or not (run / MANIFEST).is_file():
        return
    model = read_json(run / MANIFEST, "a run's folder").get("model")
    recorded = model.get("fingerprint") if isinstance(model, dict) else None
    if recorded is not None and recorded != (now := fingerprint(base.folder)):
        raise DataError(
            f"{adapter}: trained on {trained_on or model.get('model')} with fingerprint {recorded[:12]}, but "
            f"{base.folder} has {now[:12]}: another model, or changed since; load it with its own base"
        )


def _check_name(adapter: Path, base: Checkpoint, trained_on: str) -> None:
    other = f"{adapter}: trained on {trained_on}, which is not {base.name}; load it with its own base"
    folder = Path(trained_on)
    if trained_on and folder.is_dir():
        same_place = folder.resolve() == base.folder.resolve()
        if not same_place and fingerprint(folder) != fingerprint(base.folder):
            raise DataError(other)
        return
    then = _cached_name(folder) or (trained_on if _HUB_ID.fullmatch(trained_on) else None)
    place = base.folder.resolve()
    now = base.name if base.commit is not None else _cached_name(place)
    named_for_size = now is None and _SIZE.search(place.name) is not None
    now = place.name if named_for_size else now
    if now and then and now.rpartition("/")[2].lower() != then.rpartition("/")[2].lower():
        rename = f" (if {base.folder} holds that model, give the folder its name)" if named_for_size else ""
        raise DataError(other + rename)


def _cached_name(folder: Path) -> str | None:
    """Returns whose place a folder of the hub's cache is: `models--OWNER--NAME/snapshots/COMMIT`."""
    cached = [part for part in folder.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else None


def _check_class(adapter: Path, base: Checkpoint, trained_on: str, recorded: str | None) -> None:
    now = (read_json(base.folder / "config.json", "a model's folder").get("architectures") or [None])[0]
    if recorded and now and recorded != now:
        raise DataError(
            f"{adapter}: trained on a {recorded} ({trained_on or 'unnamed'}), but {base.name} is a {now}; "
            "load it with its own base"
        )


def _check_sizes(adapter: Path, base: Checkpoint, trained_on: str) -> None:
    """Compares each LoRA tensor with the layer that it changes; whether all layers are there, peft says."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        outline = AutoModelForImageTextToText.from_config(config)
    layers = {name: module for name, module in outline.named_modules() if isinstance(module, torch.nn.Linear)}
    with safe_open(adapter / _WEIGHTS, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, it is no dictionary
            module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
            if kind not in ("A.weight", "B.weight") or module not in layers:
                continue
            side, what = (1, "in_features") if kind == "A.weight" else (0, "out_features")
            wanted, found = getattr(layers[module], what), tensors.get_slice(name).get_shape()[side]
            if wanted != found:
                raise DataError(
                    f"{adapter} does not fit {base.name} (size mismatch: {what} of {module} is {wanted}, of "
                    f"the adapter {found}); it was trained on {trained_on or 'an unnamed model'}"
                )


def attach_adapter(model: Any, adapter: Path, *, training: bool) -> Any:
    """Returns the model with the adapter on it, every tensor of which was consumed.

    Args:
        model: A transformers model.
        adapter: A checked adapter folder.
        training: Leave the adapter's weights trainable.

    Raises:
        DataError: The adapter does not fit the model: its modules or shapes differ, some of its tensors were
            not consumed or some of the model's not set, or it is all zeros.
    """
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = not training
    config.base_model_name_or_path = model.name_or_path  # moved since, perhaps; peft warns about it
    misfit = f"{adapter} does not fit {type(model).__name__}: was it trained on another base?"
    try:
        wrapped = get_peft_model(model, config)
        result = wrapped.load_adapter(str(adapter), "default", is_trainable=training, torch_device="cpu")
    except (ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{misfit} ({_short(error)})") from None
    for what, names in (("not consumed", result.unexpected_keys), ("missing", result.missing_keys)):
        if names:
            raise DataError(f"{misfit} {len(names)} tensors were {what}, for example {names[0]}")
    if not any(weight.any() for name, weight in wrapped.named_parameters() if ".lora_B." in name):
        raise DataError(f"{adapter}: every LoRA B is zero, so the adapter does nothing; was it ever trained?")
    return wrapped


def check_adapter_acts(model: Any, probe: dict[str, Any], adapter: Path) -> None:
    """Checks that an adapter changes a logit of a probe prompt.

    Args:
        model: A model with an adapter.
        probe: Model inputs of one prompt.
        adapter: The adapter's folder, for the error.

    Raises:
        DataError: It changes none.
    """
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        with_adapter = model(**probe).logits
        with model.disable_adapter():
            without = model(**probe).logits
    model.train(was_training)
    if torch.equal(with_adapter, without):
        raise DataError(f"{adapter}: was loaded, but changes no logit; was it ever trained?")


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
