"""The embedded model on disk: the checkpoint that comes with the package, and how it was made."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from recllm.errors import DataError
from recllm.files import MANIFEST, sha256, staged_folder, write_json

KIND = "embedded model"
_FOLDER = Path(__file__).parent / "checkpoint"
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "pillow")


def checkpoint_folder() -> Path:
    """Returns the folder of the embedded model: a plain `save_pretrained` folder inside the package.

    Its weights are float16 numbers on disk and float32 in memory, as its config.json says.

    Raises:
        DataError: The folder is incomplete, as in an installation that left out data files.
    """
    if not (_FOLDER / "model.safetensors").is_file():
        raise DataError(
            f"{_FOLDER} has no model.safetensors: this installation of recllm is incomplete. Install it "
            "again, or make the model with `recllm model train-tiny OUT` and give OUT as the model"
        )
    return _FOLDER


def train_checkpoint(out: Path, *, seed: int = 0, overwrite: bool = False, progress: bool = True) -> Path:
    """Trains the embedded model from nothing and writes it as a `save_pretrained` folder.

    The lessons are those of the package's own checkpoint, whose manifest.json says how it was made. Equal
    seeds give equal weights up to the rounding of a CPU's float32 products.

    Args:
        out: The folder to make.
        seed: 0 or more; decides the first weights, the lessons and the pictures.
        overwrite: Replace `out` if it is an embedded model.
        progress: Report each part and show a progress bar if there is a terminal.

    Raises:
        DataError: The seed is negative, or `out` exists or cannot be written.
    """
    from recllm.mllm.tiny.architecture import SHAPES, save
    from recllm.mllm.tiny.lessons import SHARES
    from recllm.mllm.tiny.training import Course, train
    from recllm.prompts import TEMPLATES

    if seed < 0:
        raise DataError(f"seed={seed}: expected 0 or more")
    course = Course()
    started = time.monotonic()
    with staged_folder(out, kind=KIND, overwrite=overwrite) as folder:
        if progress:
            print(f"Training the embedded model into {out}", file=sys.stderr, flush=True)
        model, processor, losses = train(seed, SHAPES["tiny"], course, progress=progress)
        save(model.half(), processor, folder)
        _load_in_float32(folder)
        tail = losses[-20:]
        write_json(
            folder / MANIFEST,
            {
                "kind": KIND,
                "command": f"recllm model train-tiny OUT --seed {seed}",
                "seed": seed,
                "course": asdict(course),
                "lessons": {kind.__name__: share for kind, share in SHARES.items()},
                "templates": {
                    name: hashlib.sha256(template.text.encode()).hexdigest()[:16]
                    for name, template in sorted(TEMPLATES.items())
                },
                "loss": round(sum(tail) / len(tail), 4),
                "weights_sha256": sha256(folder / "model.safetensors"),
                "seconds": round(time.monotonic() - started),
                "versions": {name: version(name) for name in _VERSIONS},
            },
        )
    return Path(out)


def _load_in_float32(folder: Path) -> None:
    """Lets `dtype="auto"` compute in float32 from the float16 file, which takes half of the space."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = "float32"
    config.save_pretrained(folder)
