"""Adapters: what fits is put on and acts, and what was trained on another base is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from recllm.errors import DataError
from recllm.mllm.adapters import check_adapter_folder
from recllm.mllm.checkpoints import find_checkpoint
from recllm.mllm.fingerprint import fingerprint
from recllm.mllm.loading import load
from recllm.mllm.rendering import probe_inputs
from tests.mllm.small_models import save_adapter, save_small
from tests.mllm.test_loading import cut, drop, edit_json


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_small("qwen2_vl", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter")


def rename_tensors(path: Path, old: str, new: str) -> None:
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_adapter_changes_the_model_as_peft_would(base, adapter):
    from peft import PeftModel

    plain, adapted = load(base), load(base, adapter=adapter)
    expected = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    probe = probe_inputs(plain)
    with torch.no_grad():
        logits = adapted.model(**probe).logits
        torch.testing.assert_close(logits, expected(**probe).logits)
        assert not torch.allclose(logits, plain.model(**probe).logits, atol=1e-3)
    assert adapted.identity == {**plain.identity, "adapter": fingerprint(adapter)}


def test_an_adapter_works_on_a_quantized_base(tmp_path):
    base = save_small("qwen2_vl", tmp_path / "base", hidden=64)
    adapter = save_adapter(base, tmp_path / "adapter")
    loaded = load(base, adapter=adapter, quantization="nf4", dtype="float32")
    plain = load(base, quantization="nf4", dtype="float32")
    probe = probe_inputs(loaded)
    with torch.no_grad():
        assert not torch.allclose(loaded.model(**probe).logits, plain.model(**probe).logits, atol=1e-3)


def test_an_adapter_on_the_vision_tower_alone_is_seen_to_act(base, tmp_path):
    folder = save_adapter(base, tmp_path / "tower", layers=r".*visual.*qkv")
    assert load(base, adapter=folder).identity["adapter"]


def test_an_adapter_of_zeros_is_refused(base, tmp_path):
    with pytest.raises(DataError, match="every LoRA B is zero"):
        load(base, adapter=save_adapter(base, tmp_path / "zero", scale=0))


def test_an_adapter_whose_tensors_have_other_names_is_refused(base, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "renamed"))
    rename_tensors(folder / "adapter_model.safetensors", "layers.1.", "blocks.1.")
    with pytest.raises(DataError, match="not consumed"):
        load(base, adapter=folder)


def test_an_adapter_that_lacks_tensors_is_refused(base, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "part"))
    tensors = load_file(folder / "adapter_model.safetensors")
    part = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(part, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="missing"):
        load(base, adapter=folder)


def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path):
    twin = save_small("qwen2_vl", tmp_path / "twin", seed=7)
    with pytest.raises(DataError, match=r"trained on .*base"):
        load(twin, adapter=adapter)

    wide = save_small("qwen2_vl", tmp_path / "wide", hidden=64)
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    edit_json(moved / "adapter_config.json", base_model_name_or_path="/gone")
    load(base, adapter=moved)
    with pytest.raises(DataError, match=r"does not fit.*size mismatch"):
        load(wide, adapter=moved)

    edit_json(moved / "adapter_config.json", target_modules=["c_attn"])
    with pytest.raises(DataError, match=r"does not fit.*c_attn"):
        load(base, adapter=moved)


@pytest.mark.parametrize(
    ("folder", "trained_on", "fits"),
    [
        ("Small-VL-2B", "someone/Small-VL-2B-Instruct", False),
        ("Small-VL-2B-Instruct", "someone/small-vl-2b-instruct", True),
        ("Small-VL-2B", "models/hub/models--someone--Other-VL/snapshots/0123", False),
        ("models--someone--Small-VL/snapshots/0123", "someone/Other-VL", False),
        ("models--someone--Small-VL/snapshots/0123", "someone/Small-VL", True),
        ("here", "someone/Other-VL", True),  # which model a folder holds cannot be told from such a name
        ("Small-VL-2B", "/gone/Small-VL-7B", True),
    ],
)
def test_the_name_of_the_base_is_compared_also_where_it_is_a_folder(
    base, adapter, tmp_path, folder, trained_on, fits
):
    place = Path(shutil.copytree(base, tmp_path / folder))
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    edit_json(moved / "adapter_config.json", base_model_name_or_path=trained_on)
    if fits:
        check_adapter_folder(moved, find_checkpoint(str(place)))
        return
    with pytest.raises(DataError) as error:
        load(place, adapter=moved)
    assert trained_on in str(error.value) and "load it with its own base" in str(error.value)
    assert "Small-VL" in str(error.value) or "0123" in str(error.value)


def test_an_adapter_of_another_class_is_refused(base, adapter, tmp_path):
    """Qwen2-VL and Qwen2.5-VL have language layers of the same names and, at 7B, of the same sizes."""
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    edit_json(
        moved / "adapter_config.json",
        base_model_name_or_path="/gone",
        auto_mapping={"base_model_class": "Qwen2_5_VLForConditionalGeneration", "parent_library": "x"},
    )
    with pytest.raises(DataError, match=r"trained on a Qwen2_5_VL\w+ \(/gone\), but base is a Qwen2VLFor"):
        load(base, adapter=moved)


def test_the_fingerprint_that_a_run_wrote_is_compared(copy, adapter, tmp_path):
    run = Path(shutil.copytree(adapter, tmp_path / "run"))
    edit_json(run / "adapter_config.json", base_model_name_or_path=str(copy))
    model = {"model": "copy", "fingerprint": fingerprint(copy)}
    (run / "manifest.json").write_text(json.dumps({"kind": "sft run", "model": model}))
    step = Path(shutil.copytree(run, run / "checkpoints" / "checkpoint-2"))
    (step / "manifest.json").unlink()
    for folder in (run, step):
        check_adapter_folder(folder, find_checkpoint(str(copy)))
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1  # trained further, in the same place
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for folder in (run, step):
        with pytest.raises(DataError, match=rf"trained on {copy} with fingerprint .*but {copy} has"):
            load(copy, adapter=folder)


@pytest.mark.parametrize("layer", ["q_proj", "v_proj", "down_proj"])
def test_the_sizes_of_each_layer_are_compared_before_weights_are_read(base, adapter, tmp_path, layer):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    tensors = load_file(moved / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and f"{layer}.lora_B" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, moved / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json(moved / "adapter_config.json", base_model_name_or_path="someone/Wide-VL")
    with pytest.raises(DataError, match=rf"fit base .*size mismatch.*{layer}.*trained on someone/Wide-VL"):
        check_adapter_folder(moved, find_checkpoint(str(base)))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop("adapter_config.json"), "no adapter_config.json"),
        (drop("adapter_model.safetensors"), "no adapter_model.safetensors"),
        (cut("adapter_model.safetensors", 0.9), "its header says"),
        (lambda folder: edit_json(folder / "adapter_config.json", peft_type="IA3"), "only LoRA"),
    ],
)
def test_an_unusable_adapter_is_named_with_what_is_wrong(base, adapter, tmp_path, damage, says):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(DataError, match=says) as error:
        load(base, adapter=folder)
    assert str(folder) in str(error.value)


def test_an_adapter_given_as_a_model_is_recognized(adapter):
    with pytest.raises(DataError, match="an adapter, not a model"):
        load(adapter)
