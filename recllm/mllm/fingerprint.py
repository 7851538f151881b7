"""What a folder of weights contains, as one hash: two folders with the same fingerprint answer the same."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from recllm.errors import DataError
from recllm.files import sha256

_DECISIVE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
)
_hashes: dict[tuple[str, int, int], str] = {}


def fingerprint(folder: Path) -> str:
    """Returns the SHA-256, in hex, over the names and contents of what decides a model's answers.

    That is its configuration, tokenizer, processor and weights; logs, optimizer states and model cards do not
    count. A file is hashed once in a process as long as its size and time of change stay the same.

    Args:
        folder: A model's or an adapter's folder.

    Raises:
        DataError: There is no such folder, or nothing of a model is in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_decisive(path.name))
    if not files:
        raise DataError(f"{folder}: neither a model nor an adapter is in this folder")
    with ThreadPoolExecutor(4) as pool:
        lines = [
            f"{path.name}\0{digest}\n" for path, digest in zip(files, pool.map(_hash, files), strict=True)
        ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_decisive(name: str) -> bool:
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in _DECISIVE)


def _hash(path: Path) -> str:
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]
