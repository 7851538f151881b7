"""Loading models by name: what comes back, and what is said about folders that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from recllm.errors import DataError
from recllm.mllm.fingerprint import fingerprint
from recllm.mllm.loading import LoadOptions, load
from recllm.mllm.quantization import modules_outside_decoder
from recllm.mllm.rendering import probe_inputs
from tests.mllm.small_models import FAMILIES, save_adapter, save_small


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_small("qwen2_vl", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter")


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_what_it_was_saved_with(family, tmp_path):
    folder = save_small(family, tmp_path / family)
    loaded = load(folder)
    for name, weight in AutoModelForImageTextToText.from_pretrained(folder).state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weight, rtol=0, atol=0)
    assert not loaded.model.training
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.identity["model"] == family
    assert loaded.identity["fingerprint"] == fingerprint(folder)
    assert loaded.identity["dtype"] == "float32"
    assert set(loaded.stop_token_ids) == {loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id}
    assert loaded.processor.image_token in loaded.special_tokens
    probe = probe_inputs(loaded)
    assert (probe["input_ids"] == loaded.image_token_id).sum() >= 4


def test_options_reach_the_model(base):
    loaded = LoadOptions(str(base), dtype="bfloat16", attn_implementation="eager", max_pixels=4 * 784).load()
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.images.count(1000, 1000) == 4
    assert loaded.identity["dtype"] == "bfloat16"
    assert loaded.identity["max_pixels"] == 4 * 784


def test_training_leaves_only_the_adapter_trainable(base, adapter):
    model = load(base, adapter=adapter, training=True).model
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert model.training
    assert trainable
    assert all("lora_" in name for name in trainable)


# --- folders that cannot be loaded ---


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name, keep):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def only_begun(folder):
    (folder / "model.safetensors").rename(folder / "model.safetensors.1f3a.incomplete")


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop("config.json"), "no config.json"),
        (write("config.json", b"{"), "not readable as JSON"),
        (drop("model.safetensors"), "no model.safetensors; download it again"),
        (cut("model.safetensors", 0.5), "its header says"),
        (cut("model.safetensors", 0.001), "cut off"),
        (write("model.safetensors", b""), "cut off"),
        (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (only_begun, "half downloaded"),
        (lose_a_shard, r"half downloaded, 1 of \d+ weight files are missing"),
        (pickle_only, "pickle only"),
        (drop("processor_config.json"), "no preprocessor_config.json"),
        (drop("tokenizer_config.json"), "no tokenizer_config.json"),
        (drop("chat_template.jinja"), "no chat template"),
        (config(model_type="qwen9_vl"), "unknown to this version"),
        (config(model_type="qwen9_vl", auto_map={"AutoConfig": "x.Y"}), "never run"),
        (config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), "Qwen2ForCausalLM is a text-only"),
        (config(vision_config=None), "text-only model"),
    ],
)
def test_an_unusable_folder_is_named_with_what_is_wrong(copy, damage, says):
    damage(copy)
    with pytest.raises(DataError, match=says) as error:
        load(copy)
    assert str(copy) in str(error.value)


def test_a_model_with_tensors_missing_from_its_weights_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors.pop(next(name for name in tensors if "mlp.up_proj" in name))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="would be random"):
        load(copy)


def test_a_left_over_of_an_earlier_download_is_no_harm(copy):
    expected = load(copy).identity
    (copy / "model.safetensors.1f3a.incomplete").write_bytes(b"x")
    assert load(copy).identity == expected


def test_weights_of_another_shape_are_refused(copy, tmp_path):
    other = save_small("qwen2_vl", tmp_path / "wide", hidden=64)
    shutil.copy(other / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(DataError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nobody/Nothing-VL", "not in the hub's cache"),
    ],
)
def test_a_name_that_leads_nowhere(name, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=says):
        load(name)


def test_an_unknown_attention_is_named(base):
    with pytest.raises(DataError, match="flash_banana"):
        load(base, attn_implementation="flash_banana")


def test_a_snapshot_of_the_hub_is_known_by_its_commit(base, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--Small-VL"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load("someone/Small-VL")
    assert loaded.identity["model"] == "someone/Small-VL"
    assert loaded.identity["revision"] == commit
    assert loaded.model.name_or_path == "someone/Small-VL"


# --- fingerprints ---


def test_a_fingerprint_follows_contents_and_nothing_else(copy, tmp_path):
    before = fingerprint(copy)
    moved = Path(shutil.copytree(copy, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("a model card")
    (moved / "trainer_state.json").write_text("{}")
    assert fingerprint(moved) == before
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(moved) != before


# --- NF4 ---


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_quantizes_every_layer_of_the_language_model_and_nothing_else(family, tmp_path):
    from bitsandbytes.nn import Linear4bit

    folder = save_small(family, tmp_path / family, hidden=64)
    model = load(folder, quantization="nf4").model
    quantized = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    decoder = {id(module) for module in plain.get_decoder().modules()}
    linear = {name: module for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized == {name for name, module in linear.items() if id(module) in decoder}
    assert "lm_head" in modules_outside_decoder(plain)


def test_nf4_leaves_visual_features_alone_and_answers_nearly_the_same(tmp_path):
    base = save_small("qwen2_vl", tmp_path / "base", hidden=64)
    plain, small = load(base), load(base, quantization="nf4", dtype="float32")
    probe = probe_inputs(plain)
    with torch.no_grad():
        pixels = (probe["pixel_values"], probe["image_grid_thw"])
        exact = plain.model.model.get_image_features(*pixels).pooler_output[0]
        torch.testing.assert_close(small.model.model.get_image_features(*pixels).pooler_output[0], exact)
        logits, near = plain.model(**probe).logits.flatten(), small.model(**probe).logits.flatten()
    assert torch.corrcoef(torch.stack([logits, near]))[0, 1] > 0.9
    assert not torch.equal(logits, near)
    assert small.identity != plain.identity
