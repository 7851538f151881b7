"""Scoring users x candidates: visual tokens from the store or encoded again for each pair, paired in one run.

    python benchmarks/visual_store.py

The model is a Qwen2-VL with random weights (vision tower of depth 8 and width 320, language model of 4 layers
and width 256), float32, which scores each (user, candidate) pair from a history with three images and the
candidate's image, 56 to 224 pixels a side, as a yes/no margin at the last position. Four contenders score the
same pairs in the same batches: `store` tokenizes and reads visual tokens from disk; `encode, images held` has
decoded images in memory and gives them to processor and tower for each pair; `encode` decodes them, too;
`encode once a batch` keeps no store but encodes each distinct image of a batch once. Rounds are interleaved,
figures are medians. Also: the time to build the store, and its bytes for each image.

    python benchmarks/visual_store.py --smoke     a few pairs, nothing written
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from recllm.files import write_json
from recllm.mllm.loading import LoadedModel
from recllm.mllm.rendering import encode_expanded, expand, to_model
from recllm.mllm.vision.store import build_visual_store
from recllm.mllm.vision.token_budget import ImageTokens
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "visual_store.json"
SMOKE = "--smoke" in sys.argv
USERS, CANDIDATES, ITEMS, BATCH, ROUNDS = (2, 3, 12, 6, 1) if SMOKE else (12, 21, 300, 21, 5)
HISTORY, SIDES = 3, (56, 224)
SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
YES, NO = 10, 11

# ------------------------------------------------------------------------------------ the model and the world


def make_model():
    core = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[1])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=224 * 224)
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
    vision = {"depth": 8, "embed_dim": 320, "num_heads": 5, "hidden_size": 256}
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2VLForConditionalGeneration(config).eval(), processor


def make_pictures(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for item in range(ITEMS):
        width, height = rng.integers(SIDES[0], SIDES[1] + 1, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        paths.append(folder / f"{item}.jpg")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def make_batches() -> list[tuple[list[str], list[int]]]:
    """Prompts and the items whose images they show, each user's candidates side by side."""
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(USERS):
        history = rng.choice(ITEMS, HISTORY, replace=False).tolist()
        for candidate in rng.choice(ITEMS, CANDIDATES, replace=False).tolist():
            listed = "".join(f"{place}. {SLOT} item {item}\n" for place, item in enumerate(history, 1))
            pairs.append(
                (f"History:\n{listed}Will the user like {SLOT} item {candidate}?", [*history, candidate])
            )
    parts = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    return [([text for text, _ in part], [item for _, items in part for item in items]) for part in parts]


# ------------------------------------------------------------------------------------------- the contenders


def margins(model, inputs) -> torch.Tensor:
    logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
    return logits[:, YES] - logits[:, NO]


def contenders(model, processor, paths, store):
    tokens = ImageTokens(processor)
    held = [tokens.load(path) for path in paths]
    keys = store.keys_of(paths)
    merged = processor.image_processor.merge_size**2

    def process(texts, images):
        return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")

    loaded = LoadedModel(model, processor, {})
    processor.tokenizer.padding_side = "left"

    def from_store(texts, items):
        sizes = iter([held[item].size for item in items])
        expanded = [expand(loaded, text, [next(sizes) for _ in range(text.count(SLOT))]) for text in texts]
        stored = store.mm_inputs([keys[item] for item in items], model.device)
        return margins(model, {**to_model(loaded, encode_expanded(loaded, expanded)), **stored})

    def encode_held(texts, items):
        return margins(model, process(texts, [held[item] for item in items]))

    def encode(texts, items):
        return margins(model, process(texts, [tokens.load(paths[item]) for item in items]))

    def encode_once(texts, items):
        distinct = list(dict.fromkeys(items))
        pixels = processor.image_processor(
            [tokens.load(paths[item]) for item in distinct], return_tensors="pt"
        )
        output = model.model.get_image_features(**pixels, return_dict=True)
        of = dict(
            zip(distinct, zip(output.pooler_output, pixels["image_grid_thw"], strict=True), strict=True)
        )
        output.pooler_output = [of[item][0] for item in items]
        grids = torch.stack([of[item][1] for item in items])
        slots = ["<|image_pad|>" * int(grid.prod() // merged) for grid in grids]
        texts, _ = processor.get_text_with_replacements(list(texts), slots)
        inputs = dict(processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).long()
        return margins(model, inputs | {"image_grid_thw": grids, "mm_encoder_outputs": {"image": output}})

    return {
        "store": from_store,
        "encode, images held": encode_held,
        "encode": encode,
        "encode once a batch": encode_once,
    }


# ---------------------------------------------------------------------------------------------- the measure


@torch.inference_mode()
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, processor = make_model()
        paths, batches = make_pictures(Path(folder)), make_batches()
        started = time.perf_counter()
        store = build_visual_store(
            model, processor, paths, Path(folder) / "store", dtype="float32", batch_tokens=1024
        )
        build_seconds = time.perf_counter() - started
        scorers = contenders(model, processor, paths, store)
        expected = None
        for name, score in scorers.items():  # warms up, and all must agree
            found = torch.cat([score(*batch) for batch in batches[:1]])
            expected = found if expected is None else expected
            assert torch.allclose(found, expected, atol=1e-4), name
        seconds = {name: [] for name in scorers}
        for _ in range(ROUNDS):
            for name, score in scorers.items():
                started = time.perf_counter()
                for batch in batches:
                    score(*batch)
                seconds[name].append(time.perf_counter() - started)
    pairs = USERS * CANDIDATES
    figures = {name: {"seconds": statistics.median(rounds)} for name, rounds in seconds.items()}
    for name, figure in figures.items():
        figure["pairs_per_second"] = pairs / figure["seconds"]
        figure["ratio"] = figure["seconds"] / figures["store"]["seconds"]
        print(f"{name:20}", *(f"{key} {value:9.3f}" for key, value in figure.items()), sep="  ")
    tokens = store.manifest["tokens"] / store.manifest["images"]
    width = sum(store.manifest["columns"])
    size = {"tokens": tokens, "float32_bytes": tokens * width * 4, "bfloat16_bytes": tokens * width * 2}
    print("an image:", *(f"{key} {value:.0f}" for key, value in size.items()), f"build {build_seconds:.2f} s")
    if SMOKE:
        return
    content = {
        "benchmark": "visual_store",
        "machine": describe_machine(),
        "run": describe_run(),
        "setting": {
            "users": USERS,
            "candidates": CANDIDATES,
            "items": ITEMS,
            "images_per_prompt": HISTORY + 1,
            "sides": list(SIDES),
            "batch": BATCH,
            "rounds": ROUNDS,
        },
        "figures": figures,
        "image": size,
        "build": {"images": ITEMS, "seconds": build_seconds},
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
