"""Image vectors under prompts over several cycles: visual tokens stored, or images encoded for each prompt again.

    python benchmarks/prompted_images.py

The model is a Qwen2-VL with random weights, float32, whose vision tower has 0.45 times the parameters of its
language model, as that of Qwen2-VL-2B has. Images have 224 pixels a side (64 tokens), prompts are those of the
toy world; each later cycle has a quarter of the prompts rewritten, as released. Three contenders:
`encode again` gives every image and its prompt to the whole model in every cycle, as the release does; `visual
store` runs the tower once and the language model for every item in every cycle; `recllm embed images` runs the
language model for rewritten prompts alone. Building the store counts. The parts are timed in rounds, in which
they alternate; figures are sums of medians.

    python benchmarks/prompted_images.py --smoke     a few images, nothing written
"""  # noqa: E501

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recllm.files import write_json
from recllm.mllm.chat import Request, message
from recllm.mllm.loading import LoadedModel
from recllm.mllm.rendering import encode, to_model
from recllm.mllm.tiny.architecture import Shape, fresh_model
from recllm.mllm.tiny.tokenizer import build_processor
from recllm.mllm.vision.store import VisualStore, build_visual_store
from recllm.prompts.reveal import INITIAL
from recllm.prompts.safe_text import IMAGE_MARK
from recllm.reveal.encoding import Conditioned, PromptedEncoder, pool
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "prompted_images.json"
SMOKE = "--smoke" in sys.argv
ITEMS, ROUNDS, SIDE, BATCH = (8, 1, 224, 4) if SMOKE else (32, 5, 224, 16)
CYCLES, SHARE = (1, 3, 5), 0.25
SHAPE = Shape(
    layers=8,
    hidden=256,
    intermediate=1024,
    rope_sections=(4, 6, 6),
    vision_width=192,
    vision_depth=8,
    max_pixels=SIDE * SIDE,
)


def make_model() -> LoadedModel:
    processor = build_processor(SHAPE.min_pixels, SHAPE.max_pixels)
    torch.manual_seed(0)
    return LoadedModel(fresh_model(SHAPE, processor).eval(), processor, {"model": "random"})


def make_pairs(folder: Path) -> list[Conditioned]:
    rng, pairs = np.random.default_rng(0), []
    for item in range(ITEMS):
        path = folder / f"{item}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)
        values = {"category": "mug", "title": f"mug number {item}", "item": "mug"}
        pairs.append(Conditioned(str(item), INITIAL.fill({**values, "keywords": "handle, color"}), path))
    return pairs


def encode_again(loaded: LoadedModel, pairs: list[Conditioned]) -> torch.Tensor:
    """The whole model for each image: decode, tower, language model."""
    parts = []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        chats = [(message("user", f"{pair.prompt} {IMAGE_MARK}"),) for pair in part]
        requests = [Request(pair.name, chat, (pair.image,)) for pair, chat in zip(part, chats, strict=True)]
        shown = [[loaded.images.load(pair.image)] for pair in part]
        inputs = to_model(loaded, encode(loaded, requests, shown))
        hidden = loaded.model.base_model(**inputs, use_cache=False).last_hidden_state
        parts.append(pool(hidden, inputs["input_ids"] == loaded.image_token_id, "image"))
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def encode_stored(loaded: LoadedModel, store: VisualStore, pairs: list[Conditioned]) -> torch.Tensor:
    """The language model alone."""
    encoder = PromptedEncoder(loaded, store, batch_tokens=BATCH * 160)
    found = torch.empty(len(pairs), encoder.width)
    for rows, vectors in encoder.encode(pairs):
        found[rows] = vectors
    return found


@torch.inference_mode()
def main() -> None:
    loaded = make_model()
    seconds: dict[str, list[float]] = {name: [] for name in ("again", "build", "all", "rewritten")}

    def timed(name: str, work) -> object:
        started = time.perf_counter()
        made = work()
        seconds[name].append(time.perf_counter() - started)
        return made

    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder))
        rewritten = pairs[: int(SHARE * ITEMS)]
        paths = [pair.image for pair in pairs]
        for number in range(ROUNDS + 1):
            out = Path(folder) / f"store-{number}"
            again = timed("again", lambda: encode_again(loaded, pairs))
            store = timed(
                "build",
                lambda out=out: build_visual_store(
                    loaded.model, loaded.processor, paths, out, dtype="float32", progress=False
                ),
            )
            stored = timed("all", lambda store=store: encode_stored(loaded, store, pairs))
            timed("rewritten", lambda store=store: encode_stored(loaded, store, rewritten))
            assert torch.allclose(again, stored, atol=1e-4)
    first = 0 if SMOKE else 1  # a round to warm up
    median = {name: statistics.median(values[first:]) for name, values in seconds.items()}
    figures = []
    for cycles in CYCLES:
        row = {
            "cycles": cycles,
            "encode again": cycles * median["again"],
            "visual store": median["build"] + cycles * median["all"],
            "recllm embed images": median["build"] + median["all"] + (cycles - 1) * median["rewritten"],
        }
        row |= {
            f"ratio of {name}": row["encode again"] / row[name]
            for name in ("visual store", "recllm embed images")
        }
        figures.append(row)
        print("  ".join(f"{name} {value:.2f}" for name, value in row.items()))
    print("seconds:", "  ".join(f"{name} {value:.2f}" for name, value in median.items()))
    if SMOKE:
        return
    content = {
        "benchmark": "prompted_images",
        "machine": describe_machine(),
        "run": describe_run(),
        "setting": {"items": ITEMS, "side": SIDE, "rounds": ROUNDS, "share": SHARE, "batch": BATCH},
        "seconds": median,
        "figures": figures,
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
