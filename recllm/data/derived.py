"""Replacing a dataset's folder without losing what other commands have put into it.

A dataset's folder also holds what was made from it: splits with their candidates, texts, instructions,
scores. `--overwrite` refuses to delete these, and names them; `--discard-derived` deletes them.

Three folders are never deleted. They are addressed by content, so they hold for whatever dataset comes next:

* `generations/`: answers by model, decoding, prompt and image bytes.
* `visual/`: visual tokens by model and image bytes.
* `embeddings/`: vectors with a hash of their texts; they are computed again if the texts differ.

They move into the new folder. Texts do not, because they carry the old dataset's hash and no command would
read them; the builder writes them again from `generations/`, without asking the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import polars as pl

from recllm.data.checked import CHECKED
from recllm.data.image_hashes import CACHE as IMAGE_HASHES
from recllm.data.schema import TABLES
from recllm.errors import DataError
from recllm.files import DATASET, MANIFEST, staged_folder

CONTENT_ADDRESSED = ("embeddings", "generations", "visual")
_OF_A_DATASET = (*(f"{name}.parquet" for name in TABLES), MANIFEST, "images", "truth")
_NAMED = 12
_IGNORED = (CHECKED, IMAGE_HASHES, ".DS_Store", "Thumbs.db")


def dataset_folder(out: Path, *, overwrite: bool, discard_derived: bool) -> AbstractContextManager[Path]:
    """Stages a dataset's folder; see `recllm.files.staged_folder`.

    Args:
        out: The folder to make.
        overwrite: Replace `out` if it exists. Content-addressed stores in it are kept.
        discard_derived: Replace it even if that deletes what other commands made from the old dataset.

    Raises:
        DataError: `out` exists and may not be replaced.
    """
    own = (*_OF_A_DATASET, *CONTENT_ADDRESSED)
    return staged_folder(
        out,
        kind=DATASET,
        overwrite=overwrite,
        refuse=None if discard_derived else partial(refuse_derived, own=own),
        keep=CONTENT_ADDRESSED,
    )


def refuse_derived(folder: Path, *, own: Collection[str], discardable: bool = True) -> None:
    """Raises a `DataError` if a folder holds entries that the command about to replace it did not make.

    Args:
        folder: The folder.
        own: Names of the entries that the command makes itself.
        discardable: Whether the command has `--discard-derived`.
    """
    names = [name for entry in _others(folder, own) for name in _names(folder, entry)]
    if not names:
        return
    named = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
    way_out = "; --discard-derived deletes them too" if discardable else "; move them away first"
    kept = kept_stores(folder)
    raise DataError(
        f"{folder} holds {named}, which --overwrite would delete{way_out}, or give another folder"
        + (f" ({', '.join(kept)} would be kept)" if kept else "")
    )


def kept_stores(folder: Path) -> list[str]:
    """Returns the content-addressed stores in a dataset's folder, each with its size."""
    return [f"{name} ({_size(folder / name)})" for name in CONTENT_ADDRESSED if _has_files(folder / name)]


def _others(folder: Path, own: Collection[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name not in own and entry.name not in _IGNORED and _has_files(entry):
            yield entry


def _has_files(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return any(not each.is_dir() or each.is_symlink() for each in path.rglob("*"))
    return path.exists() or path.is_symlink()


def _names(folder: Path, entry: Path) -> Iterator[str]:
    """Yields what an entry is called in an error: `splits/loo`, `texts/imsg (1,203 answers)`."""
    if not entry.is_dir() or entry.is_symlink():
        yield entry.name
        return
    for child in sorted(each for each in entry.iterdir() if _has_files(each)):
        name = child.relative_to(folder)
        if entry.name == "texts" and child.suffix == ".parquet":
            yield f"{name.with_suffix('')} ({_rows(child)})"
        elif entry.name == "splits" and (drawn := sorted((child / "candidates").glob("*/"))):
            yield f"{name} (candidates {', '.join(each.name for each in drawn)})"
        else:
            yield str(name)


def _rows(path: Path) -> str:
    try:
        return f"{pl.scan_parquet(path, glob=False).select(pl.len()).collect().item():,} answers"
    except (OSError, pl.exceptions.PolarsError):
        return "unreadable"


def _size(folder: Path) -> str:
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return f"{megabytes / 1000:,.1f} GB" if megabytes >= 1000 else f"{megabytes:,.1f} MB"
