"""`recllm embed images`: a vector for each item's image under the item's prompt (REVEAL eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import polars as pl
from tyro.conf import Positional, arg

from recllm import processes
from recllm.data.dataset import Dataset
from recllm.data.origins import MADE, made
from recllm.errors import DataError
from recllm.evaluation.score_files import check_absent
from recllm.mllm.loading import LoadOptions
from recllm.mllm.vision.images import resolve_image
from recllm.mllm.vision.of_dataset import open_visual_store
from recllm.mllm.vision.store import VisualStore
from recllm.reveal.encoding import Conditioned, Order, Pooling, PromptedEncoder
from recllm.reveal.prompt_files import ImagePrompts
from recllm.reveal.vectors import VectorStore, pair_key, write_vectors

_LISTED = 1000
_MODEL = tuple(LoadOptions.__dataclass_fields__)


@dataclass
class EmbedImagesOptions:
    """Embeds each item's image under its prompt: a .safetensors file that --image of every ranker reads."""

    dataset: Positional[Annotated[Path, arg(metavar="DATASET")]]
    """The dataset folder."""
    model: str
    """A hub id, a local folder, or `tiny`, the embedded model."""
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """A prompt for each item: a table with `id` and `text`, here or below DATASET, such as
    texts/reveal-prompts.parquet (`recllm build image-prompts`)."""
    prompt: str | None = None
    """Instead of --prompts: one prompt for all items."""
    order: Order = "prompt-first"
    """prompt-first: the image's states can see the prompt. image-first: as released, where they cannot, so
    that every prompt gives the same vectors of --pooling image; only to show that."""
    pooling: Pooling = "image"
    """Whose last hidden states are averaged: the image's tokens, the last token, or all after the image."""
    store_as: Literal["float32", "bfloat16"] = "float32"
    """Number type of the vectors."""
    adapter: str | None = None
    """A LoRA adapter for the model: hub id or local folder."""
    revision: str | None = None
    """Revision on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; auto takes that of the files."""
    device_map: str | None = None
    """Where the weights go, for example `auto` or `cuda:1`; by default one GPU a process, else the CPU."""
    attn_implementation: str | None = None
    """Attention kernels: sdpa, flash_attention_2, eager."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: four-bit language model; the vision tower is left as it is."""
    min_pixels: int | None = None
    """Least pixels an image is scaled to; by default the model's."""
    max_pixels: int | None = None
    """Most pixels an image keeps; by default 200,704 (256 tokens of Qwen2-VL) or the model's own, if less."""
    visual_store: str = "auto"
    """A folder of visual tokens made for this model, or `auto`: DATASET/visual/FINGERPRINT, to which missing
    images are added. Each image goes through the vision tower once, whatever the number of prompts."""
    batch_tokens: int = 8192
    """Most tokens in a batch, padding included."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """The file to write; by default DATASET/vectors/NAME-OF-PROMPTS.safetensors."""
    overwrite: bool = False
    """Replace the file where it exists. Vectors that were encoded before are used again all the same."""


def embed_images(options: EmbedImagesOptions) -> Path:
    """Writes the vectors of a dataset's images under their prompts, and returns the file.

    An item without an image that can be read has no vector. Of several images the first that can be read is
    encoded (ours; the paper knows one image an item).

    Raises:
        DataError: The prompts are missing or of another dataset, an item with an image has none, no image can
            be read, the model cannot be loaded, or the file exists.
    """
    if (options.prompts is None) == (options.prompt is None):
        raise DataError("give --prompts FILE (a prompt for each item) or --prompt TEXT (one for all)")
    dataset = Dataset.open(options.dataset)
    stem = "one-prompt" if options.prompts is None else options.prompts.stem
    out = options.out or dataset.folder / "vectors" / f"{stem}.safetensors"
    if out.suffix != ".safetensors":
        raise DataError(f"--out {out}: expected a name that ends in .safetensors, which rankers read")
    check_absent(out, overwrite=options.overwrite)
    ids = dataset.items["item"].to_list()
    prompts, source = _prompts(options, dataset, ids)
    settings = {name: getattr(options, name) for name in _MODEL}
    settings["quantization"] = None if options.quantization == "none" else options.quantization
    loaded = LoadOptions(**settings).load()
    store, images, unusable = _images(options, dataset, loaded)
    if lacking := [item for item in images if not prompts.get(item, "").strip()]:
        raise DataError(
            f"{options.prompts}: no prompt for {len(lacking):,} of {len(images):,} items with an image, the "
            f"first is {lacking[0]!r}; write one for each"
        )
    encoder = PromptedEncoder(
        loaded, store, order=options.order, pooling=options.pooling, batch_tokens=options.batch_tokens
    )
    vectors = VectorStore(
        dataset.folder / "embeddings" / "prompted", encoder.identity, encoder.width, options.store_as
    )
    image_keys = store.keys_of(images.values())
    keys, pairs = {}, {}
    for (item, image), image_key in zip(images.items(), image_keys, strict=True):
        keys[item] = pair_key(image_key, encoder.safe(prompts[item]))
        pairs.setdefault(keys[item], Conditioned(item, prompts[item], image))
    encoded = vectors.add(encoder, pairs)
    if processes.rank() == 0:
        present = [item for item in ids if item in keys]
        facts = {
            **source,
            "model": loaded.identity,
            **{name: getattr(options, name) for name in ("order", "pooling")},
            "items": len(ids),
            "vectors": len(present),
            "unusable": dict(list(unusable.items())[:_LISTED]),
        }
        content = made(data_hash=dataset.data_hash, **facts)
        write_vectors(
            out,
            present,
            lambda number: vectors.row(keys[present[number]]),
            width=encoder.width,
            dtype=options.store_as,
            metadata={"kind": "item vectors", MADE: orjson.dumps(content).decode()},
        )
        print(
            f"{out}: {len(present):,} of {len(ids):,} items have a vector of {encoder.width}; "
            f"{encoded:,} encoded now, {len(pairs) - encoded:,} from before; next: --image {out} of a ranker"
        )
    processes.sum_over_ranks([0])
    return out


def _prompts(
    options: EmbedImagesOptions, dataset: Dataset, ids: list[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns a prompt for each item id, and what the vectors' file says about them."""
    if options.prompts is None:
        if not options.prompt.strip():
            raise DataError("--prompt is empty; say what to look at in the image")
        return dict.fromkeys(ids, options.prompt), {"prompt": options.prompt}
    read = ImagePrompts.read(options.prompts, dataset)
    facts = {"prompts": str(read.path), "prompts_sha256": read.sha256}
    if split_hash := read.made.get("split_hash"):
        facts["split_hash"] = split_hash
    return read.by_item(), facts


def _images(
    options: EmbedImagesOptions, dataset: Dataset, loaded: Any
) -> tuple[VisualStore, dict[str, Path], dict[str, str]]:
    """Returns the visual store, the file of each item's first image that can be read, and why others cannot
    be read."""
    listed = {
        item: list(images)
        for item, images in zip(dataset.items["item"], dataset.items["images"], strict=True)
        if len(images)
    }
    why: dict[str, str] = {}
    while listed:
        first = pl.Series([images[0] for images in listed.values()], dtype=pl.String)
        store = open_visual_store(options.visual_store, loaded, dataset.folder, first, required=True)
        unusable = store.manifest["unusable"]
        files = {item: resolve_image(dataset.folder, images[0]) for item, images in listed.items()}
        broken = [item for item, file in files.items() if str(file) in unusable]
        if not broken:
            return store, files, why
        for item in broken:
            why[listed[item].pop(0)] = unusable[str(files[item])]
            if not listed[item]:
                del listed[item]
    reason = next(iter(why.values()), "none has an image")
    raise DataError(f"{dataset.folder}: no item has an image that can be read ({reason})")
