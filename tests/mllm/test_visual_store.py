"""A model that reads the store answers as if it saw the pixels; builds survive kills."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from recllm.errors import BusyError, DataError
from recllm.files import read_json
from recllm.mllm.loading import LoadedModel
from recllm.mllm.rendering import encode_expanded, expand
from recllm.mllm.vision import store as visual_store
from recllm.mllm.vision.building import Journal
from recllm.mllm.vision.images import image_size
from recllm.mllm.vision.store import VisualStore, build_visual_store, image_key
from recllm.mllm.vision.token_budget import ImageTokens, image_settings
from recllm.mllm.vision.tower import VisionTower

from .small_models import FAMILIES, NESTED, save_small

PIXELS = {"pixel_values", "pixel_attention_mask", "image_sizes"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns (model, processor) of a family, made once."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    @cache
    def load(family: str):
        folder = save_small(family, tmp_path_factory.mktemp(family))
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        return model, AutoProcessor.from_pretrained(folder)

    return load


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


def save_pictures(folder: Path, count: int = 12) -> list[Path]:
    """Random pictures of random sizes."""
    rng = np.random.default_rng(3)
    paths = []
    for number in range(count):
        width, height = rng.integers(20, 160, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1], compress_level=1)
    return paths


def batches(pictures: list[Path], mark: str):
    """Batches of texts with their pictures: none, one, several, the same one again."""
    rng = np.random.default_rng(5)
    for counts in ((3, 0, 2), (0, 0), (4,), (1, 2, 1, 0)):
        shown = [[pictures[n] for n in rng.integers(0, len(pictures), count)] for count in counts]
        texts = ["see " + f"{mark} and " * len(one) + "the red mug" * (1 + len(one) % 2) for one in shown]
        yield texts, [path for one in shown for path in one]


def from_pixels(processor, texts: list[str], paths: list[Path], family: str):
    """The usual inputs. Some processors want images sample by sample, where a sample may have none."""
    tokens = ImageTokens(processor)
    images = [tokens.load(path) for path in paths] or None
    if images and family in NESTED:
        images = iter(images)
        images = [[next(images) for _ in range(text.count(processor.image_token))] for text in texts]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


def from_store(store: VisualStore, model, processor, texts: list[str], paths: list[Path], **options):
    """Inputs without pixels."""
    loaded = LoadedModel(model, processor, {})
    processor.tokenizer.padding_side = "left"
    sizes = iter([image_size(path) for path in paths])
    expanded = [
        expand(loaded, text, [next(sizes) for _ in range(text.count(processor.image_token))])
        for text in texts
    ]
    return encode_expanded(loaded, expanded) | store.mm_inputs(store.keys_of(paths), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_texts_are_those_of_the_pixels(loaded, pictures, tmp_path, family):
    model, processor = loaded(family)
    store = build_visual_store(
        model, processor, pictures, tmp_path / "store", batch_tokens=40, dtype="float32", progress=False
    )
    seen_images = 0
    for texts, paths in batches(pictures, processor.image_token):
        pixels = from_pixels(processor, texts, paths, family)
        stored = from_store(store, model, processor, texts, paths)
        assert "pixel_values" not in stored
        for name in set(pixels) - PIXELS:
            assert torch.equal(pixels[name], stored[name]), name
        with torch.inference_mode():
            expected = model(**pixels).logits
            mixed = {name: value for name, value in pixels.items() if name not in PIXELS}
            for inputs in (stored, mixed | store.mm_inputs(store.keys_of(paths))):
                torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
            for beams in (1, 2) if len(texts) == 3 else (1,):
                settings = {"do_sample": False, "max_new_tokens": 5, "num_beams": beams, "top_k": None}
                one = model.generate(**pixels, **settings)
                again = from_store(store, model, processor, texts, paths)
                assert torch.equal(one, model.generate(**again, **settings))
        seen_images += len(paths)
    assert seen_images == 13


def test_a_chat_that_begins_with_its_mark_gets_no_second_one(loaded, pictures, tmp_path):
    model, processor = loaded("gemma3")
    store = build_visual_store(
        model, processor, pictures[:1], tmp_path / "store", dtype="float32", progress=False
    )
    text = f"{processor.tokenizer.bos_token}a {processor.image_token} b"
    inputs = from_store(store, model, processor, [text], pictures[:1])
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1


def test_each_distinct_file_is_encoded_once(loaded, pictures, tmp_path, monkeypatch):
    model, processor = loaded("qwen2_vl")
    copies = [Path(shutil.copy(path, tmp_path / f"copy{path.name}")) for path in pictures]
    grids = []
    encode = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixel_values, image_grid_thw=None, **more: (
            grids.append(image_grid_thw),
            encode(pixel_values, image_grid_thw, **more),
        )[1],
    )
    store = build_visual_store(
        model, processor, [*pictures, *copies, *pictures], tmp_path / "store", batch_tokens=20, progress=False
    )
    assert sum(len(grid) for grid in grids) == store.manifest["images"] == len(pictures)
    assert store.manifest["files"] == 3 * len(pictures)
    tokens = [int(grid.prod(-1).sum()) // 4 for grid in grids]
    assert sum(tokens) == store.manifest["tokens"]
    assert all(size <= 20 or len(grid) == 1 for size, grid in zip(tokens, grids, strict=True))
    assert store.keys_of(pictures) == store.keys_of(copies)


@pytest.mark.parametrize("dtype, exact", [("bfloat16", 8), ("float16", 11)])
def test_half_stores_round_to_their_type_and_take_half_the_space(loaded, pictures, tmp_path, dtype, exact):
    model, processor = loaded("qwen3_vl")
    options = {"batch_tokens": 30, "progress": False}
    whole = build_visual_store(model, processor, pictures, tmp_path / "f32", dtype="float32", **options)
    half = build_visual_store(model, processor, pictures, tmp_path / "half", dtype=dtype, **options)
    for key in whole.keys_of(pictures):
        rounded = half.features(key)
        assert rounded.dtype == getattr(torch, dtype)
        assert torch.equal(rounded, whole.features(key).to(rounded.dtype))
        error = (rounded.float() - whole.features(key)).abs()
        assert (error <= whole.features(key).abs() * 2.0**-exact + 1e-7).all()
    sizes = [(tmp_path / name / "tokens.bin").stat().st_size for name in ("f32", "half")]
    assert sizes[0] == 2 * sizes[1]
    moved = half.mm_inputs(half.keys_of(pictures[:2]), "cpu", torch.float32)
    assert moved["mm_encoder_outputs"]["image"].pooler_output[0].dtype == torch.float32


def test_values_that_a_type_cannot_hold_are_an_error(loaded, pictures, tmp_path, monkeypatch):
    model, processor = loaded("qwen2_vl")
    encode = VisionTower.encode

    def encode_huge(self, batch):
        encoded = encode(self, batch)
        return encoded | {"rows": [rows * 1e6 for rows in encoded["rows"]]}

    monkeypatch.setattr(VisionTower, "encode", encode_huge)
    with pytest.raises(DataError, match="float16 cannot hold"):
        build_visual_store(model, processor, pictures, tmp_path / "s", dtype="float16", progress=False)


def test_another_tower_or_other_settings_are_refused_and_an_adapter_is_not(loaded, pictures, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = save_small("qwen2_vl", tmp_path / "model")
    other = save_small("qwen2_vl", tmp_path / "other", seed=1)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    store = tmp_path / "store"
    build_visual_store(model, processor, pictures, store, progress=False)
    with pytest.raises(DataError, match="another vision tower"):
        VisualStore.open(store, AutoModelForImageTextToText.from_pretrained(other), processor)
    with pytest.raises(DataError, match="another vision tower"):
        VisualStore.open(
            store, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16), processor
        )
    image_settings(processor, None, 28 * 28 * 5)
    with pytest.raises(DataError, match="pixel budget"):
        VisualStore.open(store, model, processor)
    processor = AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "saved_again")
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj"))
    again = VisualStore.open(store, adapted, AutoProcessor.from_pretrained(tmp_path / "saved_again"))
    texts = ["a <|image_pad|> b", "<|image_pad|>"]
    inputs = from_store(again, adapted, processor, texts, pictures[:2], dtype=torch.float32)
    with torch.inference_mode():
        assert adapted(**inputs).logits.isfinite().all()
    with torch.no_grad():
        model.model.visual.merger.ln_q.weight[0] += 1
    with pytest.raises(DataError, match="another vision tower"):
        VisualStore.open(store, adapted, processor)


def test_changed_new_and_broken_images_are_named(loaded, tmp_path):
    model, processor = loaded("qwen2_vl")
    paths = save_pictures(tmp_path, 4)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    store = build_visual_store(
        model, processor, [*paths, tmp_path / "no.png"], tmp_path / "s", progress=False
    )
    assert store.manifest["images"] == 3
    assert set(store.manifest["unusable"]) == {str(paths[1]), str(tmp_path / "no.png")}
    with pytest.raises(DataError, match=r"1\.png.*cut off"):
        store.keys_of([paths[1]])
    keys = store.keys_of(paths[2:])
    Image.new("RGB", (40, 40), "red").save(paths[2])
    with pytest.raises(DataError, match=r"2\.png.*changed since"):
        store.keys_of(paths[2:])
    assert store.mm_inputs(keys)["image_grid_thw"].shape == (2, 3)
    with pytest.raises(DataError, match=image_key(paths[2])):
        store.mm_inputs([image_key(paths[2])])
    with pytest.raises(DataError, match="none of 1 images"):
        build_visual_store(model, processor, [paths[1]], tmp_path / "none", progress=False)


def test_a_store_that_is_not_whole_is_refused(loaded, pictures, tmp_path):
    model, processor = loaded("qwen2_vl")
    store = tmp_path / "store"
    build_visual_store(model, processor, pictures, store, progress=False)

    def damaged(name: str, damage) -> Path:
        copy = tmp_path / f"without_{name}"
        shutil.copytree(store, copy)
        damage(copy / name)
        return copy

    cut = damaged("tokens.bin", lambda path: os.truncate(path, path.stat().st_size - 2))
    with pytest.raises(DataError, match=r"tokens\.bin: \d+ bytes where"):
        VisualStore.open(cut, model, processor)
    for name in ("manifest.json", "index.parquet"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            VisualStore.open(damaged(name, Path.unlink), model, processor)
    shutil.rmtree(tmp_path / "without_index.parquet")
    shorter = damaged("index.parquet", lambda path: pl.read_parquet(path)[1:].write_parquet(path))
    with pytest.raises(DataError, match="does not fit"):
        VisualStore.open(shorter, model, processor)
    with pytest.raises(DataError, match="exists already"):
        build_visual_store(model, processor, pictures, store, progress=False)


def test_two_builders_of_one_store_do_not_meet(loaded, pictures, tmp_path):
    model, processor = loaded("qwen2_vl")
    head = {**visual_store.store_identity(model, processor), "dtype": "bfloat16"}
    with Journal(tmp_path / "store", head), pytest.raises(BusyError):
        build_visual_store(model, processor, pictures, tmp_path / "store", progress=False)


def test_what_another_model_left_unfinished_is_not_taken_over(loaded, pictures, tmp_path, monkeypatch):
    model, processor = loaded("qwen2_vl")
    keep = Journal.append

    def append_once(self, encoded):
        keep(self, encoded)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", append_once)
    with pytest.raises(KeyboardInterrupt):
        build_visual_store(model, processor, pictures, tmp_path / "s", batch_tokens=9, progress=False)
    monkeypatch.setattr(Journal, "append", keep)
    with pytest.raises(DataError, match="unfinished build with another model"):
        build_visual_store(model, processor, pictures, tmp_path / "s", dtype="float32", progress=False)
    build_visual_store(model, processor, pictures, tmp_path / "s", batch_tokens=9, progress=False)


def test_a_build_killed_while_it_finished_never_touches_the_finished_store(
    loaded, pictures, tmp_path, monkeypatch
):
    """The rows are linked into the store, so an unfinished folder left beside it must not write to them."""
    model, processor = loaded("qwen2_vl")
    monkeypatch.setattr("recllm.mllm.vision.building.shutil.rmtree", lambda *_, **__: None)
    build_visual_store(model, processor, pictures, tmp_path / "s", progress=False)
    content = (tmp_path / "s" / "tokens.bin").read_bytes()
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    (tmp_path / ".s.building" / "journal.jsonl").write_bytes(b"")
    build_visual_store(model, processor, pictures[:2], tmp_path / "s", progress=False)
    assert (tmp_path / "elsewhere" / "tokens.bin").read_bytes() == content
    VisualStore.open(tmp_path / "elsewhere", model, processor)


KILLER = """
import os, random, signal, sys, threading, time, traceback
from pathlib import Path
import torch
from tqdm import tqdm
torch.set_num_threads(1)  # no thread pool, so that children can be forked
tqdm.set_lock(threading.RLock())  # its own lock is shared with forked children: one killed in it stops all
from transformers import AutoModelForImageTextToText, AutoProcessor
from recllm.mllm.vision.store import build_visual_store
from recllm.mllm.vision.building import Journal

model_folder, pictures, out, log, kills = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
processor = AutoProcessor.from_pretrained(model_folder)
paths = sorted(Path(pictures).iterdir())
append = Journal.append


def append_and_log(self, encoded):
    append(self, encoded)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, "".join(f"{key}\\n" for key in encoded["keys"]).encode())


Journal.append = append_and_log


def build(where):
    build_visual_store(model, processor, paths, Path(where), batch_tokens=12, dtype="float32", progress=False)


def forked(where):
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)  # renews the pool that a fork broke: two threads that do so at once fail
            build(where)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


assert os.waitpid(forked(out + "_undisturbed"), 0)[1] == 0
os.unlink(log)
journal = Path(out).parent / f".{Path(out).name}.building" / "journal.jsonl"


def runs(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finished_batches():
    try:
        return journal.read_bytes().count(b"\\n") - 1
    except FileNotFoundError:
        return -1


random.seed(int(kills))
killed = 0
while killed < int(kills) and not Path(out).exists():
    child = forked(out)
    goal = finished_batches() + random.randint(0, 2)
    while runs(child) and finished_batches() < goal:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    if not Path(out).exists():
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    killed += status == signal.SIGKILL
if not Path(out).exists():
    assert os.waitpid(forked(out), 0)[1] == 0
print(killed)
"""


@pytest.mark.slow
def test_killed_builds_go_on_and_end_in_the_same_bytes(tmp_path):
    save_small("qwen2_vl", tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    pictures = save_pictures(tmp_path / "pictures", 120)
    (tmp_path / "pictures" / "broken.png").write_bytes(pictures[0].read_bytes()[:200])
    out, log = tmp_path / "store", tmp_path / "log"
    arguments = [tmp_path / "model", tmp_path / "pictures", out, log, "20"]
    run = subprocess.run(
        [sys.executable, "-c", KILLER, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 10  # a fast machine is done before the twentieth
    undisturbed = tmp_path / "store_undisturbed"
    for name in ("tokens.bin", "index.parquet"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    manifests = [read_json(folder / "manifest.json", "a store") for folder in (out, undisturbed)]
    for manifest in manifests:
        del manifest["run"]
    assert manifests[0] == manifests[1]
    logged = log.read_text().split()
    assert len(logged) == len(set(logged))
    assert {path.name for path in tmp_path.iterdir()} == {
        "model",
        "pictures",
        "store",
        "log",
        undisturbed.name,
    }
