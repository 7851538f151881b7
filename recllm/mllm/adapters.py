"""Putting a LoRA adapter on a model, and making sure that it took: one that does nothing is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recllm.errors import DataError
from recllm.files import read_json
from recllm.mllm.checkpoints import Checkpoint, check_safetensors
from recllm.mllm.fingerprint import fingerprint

_WEIGHTS = "adapter_model.safetensors"


def check_adapter_folder(adapter: Path, base: Checkpoint) -> None:
    """Checks, reading no weights, that a folder holds a LoRA adapter and that it was trained on `base`.

    The base that the adapter names is compared by the model's name where both are hub ids, by contents where
    it is a folder that is still there, and not at all otherwise; shapes are compared when the adapter is
    loaded.

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
    other = f"{adapter}: trained on {trained_on}, which is not {base.name}; load it with its own base"
    folder = Path(trained_on)
    if trained_on and folder.is_dir():
        same_place = folder.resolve() == base.folder.resolve()
        if not same_place and fingerprint(folder) != fingerprint(base.folder):
            raise DataError(other)
    elif (
        base.commit is not None
        and re.fullmatch(r"[^/\\]+/[^/\\]+", trained_on)
        and trained_on.rpartition("/")[2].lower() != base.name.rpartition("/")[2].lower()
    ):
        raise DataError(other)


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
