"""Random instruction rows with images, and scores of them one by one through `model(**inputs).logits`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
from PIL import Image

from recllm.mllm.chat import Request, message
from recllm.mllm.loading import LoadedModel
from recllm.mllm.rendering import encode, to_model
from recllm.mllm.scoring.prompts import messages_of
from recllm.prompts.safe_text import IMAGE_MARK

WORDS = "red blue striped mug scarf lamp what is in this image answer yes no système describe"


def make_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Writes pictures of different sizes; the last is a copy of the first, under its own name."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count - 1):
        names.append(f"images/{number}.png")
        width, height = rng.integers(20, 120, 2) if number % 3 else (56, 56)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / names[-1])
    names.append("images/copy.png")
    (folder / names[-1]).write_bytes((folder / names[0]).read_bytes())
    return names


def make_rows(
    images: list[str], *, users: int, seed: int = 0, about_target: bool = False, most_history: int = 5
) -> pl.DataFrame:
    """Returns rows of random users: histories with and without images, 1 to 6 candidates, in random order."""
    rng = np.random.default_rng(seed)

    def phrase(most: int) -> str:
        return " ".join(rng.choice(WORDS.split(), rng.integers(1, most)))

    rows = []
    for user in range(users):
        history = [
            (str(rng.choice(images)) if rng.random() < 0.6 else None, phrase(6))
            for _ in range(rng.integers(0, most_history + 1))
        ]
        name = f"u{user}"
        for candidate in range(int(rng.integers(1, 7))):
            shown = [image for image, _ in history if image]
            turns = []
            if about_target:
                turns = [message("user", phrase(8)), message("assistant", phrase(30))]
            text = "history: " + "; ".join(f"{IMAGE_MARK if image else ''}{what}" for image, what in history)
            text += f" target: {phrase(12)}"
            if rng.random() < 0.7:
                shown.append(str(rng.choice(images)))
                text += IMAGE_MARK
            turns.append(message("user", text))
            rows.append(
                {
                    "id": f"{user}/{name}/i{candidate}",
                    "user": name,
                    "item": f"i{candidate}",
                    "label": int(candidate == 0),
                    "target": "i0",
                    "target_row": user,
                    "prompt": turns,
                    "images": shown,
                }
            )
    order = rng.permutation(len(rows))
    return pl.DataFrame([rows[place] for place in order], schema_overrides={"label": pl.Int8})


@torch.no_grad()
def one_by_one(
    loaded: LoadedModel, rows: pl.DataFrame, folder: Path, yes: list[int], no: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns margin and outside mass of each row from the whole logits of its own prompt."""
    margins, outside = [], []
    for row in rows.iter_rows(named=True):
        paths = tuple(folder / path for path in row["images"])
        request = Request(row["id"], messages_of(row), paths)
        pictures = [[loaded.images.load(path) for path in paths]]
        logits = loaded.model(**to_model(loaded, encode(loaded, [request], pictures))).logits[0, -1].float()
        margins.append(logits[yes].logsumexp(0) - logits[no].logsumexp(0))
        outside.append(1 - logits.softmax(0)[[*yes, *no]].sum())
    return torch.stack(margins).cpu().numpy(), torch.stack(outside).cpu().numpy()
