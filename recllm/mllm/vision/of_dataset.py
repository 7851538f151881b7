"""The visual store of a dataset: named, or `auto`, which encodes the images that are used where that pays.

`auto` keeps a store in `DATASET/visual/<tower>-<processor>-<dtype>`, in parts that are never changed: each
rank writes a part of its own, and images that come later go into further parts.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from recllm import processes
from recllm.data.image_hashes import ImageHashes
from recllm.errors import DataError
from recllm.files import MANIFEST
from recllm.mllm.vision.building import BITS, DTYPES
from recllm.mllm.vision.images import map_in_threads, resolve_image
from recllm.mllm.vision.store import NoUsableImage, VisualStore, build_visual_store, image_key
from recllm.mllm.vision.token_budget import ImageTokens
from recllm.mllm.vision.tower import store_identity, unwrapped

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel

_PART = "part-"
_FREE = 0.9
"""Share of the free disk that new parts may take."""
_PAYS = 2
"""Uses of an image from which on it is worth encoding once, writing and reading."""


def open_visual_store(
    choice: str,
    loaded: LoadedModel,
    dataset: Path,
    images: pl.Series | None = None,
    *,
    passes: float = _PAYS,
    required: bool = False,
    together: bool = True,
) -> VisualStore | None:
    """Opens the visual store at `choice`, or for `auto` that of the dataset, with what it lacks added.

    Call it on every rank at once, with the same arguments: the ranks share the encoding. What a killed run
    had encoded is kept.

    Args:
        choice: A folder, or `auto`.
        loaded: The model.
        dataset: The dataset folder.
        images: Relative paths of the images that rows use, one for each use; None for those of all items.
        passes: How often each of these uses will be made: epochs, for example.
        required: Encode whatever it costs, unless the disk is too small.
        together: Whether all ranks call it at once. Otherwise call it on rank 0 first, which encodes alone.

    Returns:
        None where `auto` does not pay, because an image is used less than twice on average, or does not fit
        on the disk; rank 0 says so.

    Raises:
        DataError: The store is missing, belongs to another model, or is required and does not fit.
    """
    model, processor = loaded.model, loaded.processor
    if choice != "auto":
        if not Path(choice).is_dir():
            raise DataError(f"--visual-store {choice}: no such folder; `auto` makes one below the dataset")
        return VisualStore.open(Path(choice), model, processor)
    identity = store_identity(model, processor)
    dtype = str(loaded.base_model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise DataError(f"--visual-store auto: weights in {dtype} cannot be stored; build one yourself")
    folder = dataset / "visual" / f"{identity['tower'][:12]}-{identity['processor'][:12]}-{dtype}"
    if images is None:
        images = pl.read_parquet(dataset / "items.parquet", glob=False)["images"].explode().drop_nulls()
    paths = [resolve_image(dataset, image) for image in images.unique().sort()]
    rank, world = (processes.rank(), processes.world_size()) if together else (0, 1)
    keys = _Keys(dataset)
    store, missing = _with_what_lacks(folder, loaded, paths, keys)
    begin = 1 + max([int(part.name.removeprefix(_PART)) for part in _parts(folder)[1]], default=-1)
    _any(False, together)  # all ranks have seen the same parts
    if missing:
        estimate = _bytes(loaded, missing, dtype)
        free = shutil.disk_usage(_existing(folder)).free
        pays = required or len(images) * passes >= _PAYS * len(paths)
        reason = _against(pays, estimate, free, len(missing), len(paths))
        against = _any(reason is not None, together)  # the disk may be another for each
        if against and required:
            raise DataError(f"{folder}: {reason or 'it does not fit on the disk of another rank'}")
        if against:
            if rank == 0:
                why = reason or "it does not fit on the disk of another rank"
                print(f"no visual store: {why}; images are encoded when they are needed", flush=True)
            return None
        if share := missing[rank::world]:
            part = folder / f"{_PART}{begin + rank:05}"
            if rank == 0:
                print(f"{folder}: {len(missing):,} images to encode, about {_size(estimate)}", flush=True)
            _encode(loaded, share, part, dtype)
    keys.hashes.save()
    _any(False, together)  # all parts are there
    if missing:
        store, missing = _with_what_lacks(folder, loaded, paths, keys)
    if store is None:
        raise DataError(f"{folder}: none of {len(paths)} images can be used")
    store.manifest["unusable"].update(_unusable(loaded, missing))
    return store


class _Keys:
    """Keys of a dataset's images, each file read once as long as it stays the same."""

    def __init__(self, dataset: Path) -> None:
        self.hashes = ImageHashes(dataset)

    def __call__(self, path: Path) -> str:
        try:
            return self.hashes(path)
        except OSError:
            return image_key(path)  # which says what is wrong with it


def _with_what_lacks(
    folder: Path, loaded: LoadedModel, paths: list[Path], keys: _Keys
) -> tuple[VisualStore | None, list[Path]]:
    """Returns the store that there is, and the images that it lacks and that may be usable."""
    found = [*_parts(folder)[0], *_parts(folder)[1]]
    store = VisualStore.open_parts(folder, found, loaded.model, loaded.processor, keys) if found else None
    made = max([(part / MANIFEST).stat().st_mtime_ns for part in found], default=0)

    def lacks(path: Path) -> bool:
        try:
            if store is not None and keys(path) in store:
                return False
            return (
                store is None or str(path) not in store.manifest["unusable"] or path.stat().st_mtime_ns > made
            )
        except (OSError, DataError):
            return store is None or str(path) not in store.manifest["unusable"]

    return store, [path for path, wanted in map_in_threads(lacks, paths, 2) if wanted]


def _parts(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns a store that was made whole, if there is one, and the parts."""
    parts = [part for part in sorted(folder.glob(f"{_PART}*")) if part.name.removeprefix(_PART).isdecimal()]
    return [folder] if (folder / MANIFEST).is_file() else [], parts


def _encode(loaded: LoadedModel, share: list[Path], part: Path, dtype: str) -> None:
    """Writes a part; nothing where none of its images can be used."""
    with contextlib.suppress(NoUsableImage):
        build_visual_store(
            loaded.model, loaded.processor, share, part, dtype=dtype, progress=processes.rank() == 0
        )


def _unusable(loaded: LoadedModel, paths: list[Path]) -> dict[str, str]:
    """Returns why images cannot be used."""
    tokens, found = ImageTokens(loaded.processor), {}
    for path in paths:
        try:
            tokens.load(path)
        except DataError as error:
            found[str(path)] = str(error)
    return found


def _bytes(loaded: LoadedModel, paths: list[Path], dtype: str) -> int:
    """Returns what these images will take on the disk; images that cannot be read take nothing."""
    tokens = ImageTokens(loaded.processor)
    config = unwrapped(loaded.model).config
    deep = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    width = config.get_text_config().hidden_size * (1 + len(deep))

    def count(path: Path) -> int:
        try:
            return tokens.count_file(path)
        except DataError:
            return 0

    return sum(found for _, found in map_in_threads(count, paths, 2)) * width * BITS[dtype].itemsize


def _any(own: bool, together: bool) -> bool:
    """Waits for the other ranks where they come here, too; tells whether one of them says so."""
    return bool(processes.sum_over_ranks([own])[0]) if together else own


def _against(pays: bool, estimate: int, free: int, new: int, used: int) -> str | None:
    if not pays:
        return f"the {used:,} images are used less than {_PAYS} times each"
    if estimate > _FREE * free:
        return f"{new:,} images would take about {_size(estimate)}, and {_size(free)} of the disk are free"
    return None


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
