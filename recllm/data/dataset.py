"""The dataset on disk: three parquet tables, a folder of images, and a manifest of their origin."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.data import schema
from recllm.data.checked import Note
from recllm.data.coding import UNKNOWN, encode
from recllm.data.derived import dataset_folder
from recllm.data.image_files import check_image_paths
from recllm.data.origins import Origin
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, sha256, write_json
from recllm.runs.provenance import describe_run

FORMAT = 1
NO_TIME = np.iinfo(np.int64).min


class Dataset:
    """A validated dataset folder, read-only. See `recllm.data.schema` for the columns.

    Users and items also have *codes*: their row numbers in `users` and `items`. Everything that counts,
    filters or ranks works on codes; ids are for people and files.

    Attributes:
        folder: The dataset folder.
        manifest: The content of its `manifest.json`.
        items: One row an item.
        users: One row a user.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], items: pl.DataFrame, users: pl.DataFrame
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.items = items
        self.users = users

    @classmethod
    def open(cls, folder: Path | str, *, validate: bool = True) -> Dataset:
        """Opens a dataset folder.

        Args:
            folder: The folder.
            validate: Check hashes, types, unique ids, that every interaction's user and item exist, times,
                and that every image is a plain file inside the folder. What was found valid once is not
                checked again while sizes and time stamps of tables and image folders stay the same (see
                `recllm.data.checked`). Without it only the manifest and the file sizes are checked, which is
                for folders that this process has just opened or written.

        Raises:
            DataError: The folder is not a complete dataset; the message names the file, and the row or id.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST, "a recllm dataset")
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"{folder / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT}; import it again"
            )
        note = Note.read(folder, manifest)
        begun = time.time_ns()
        validate = validate and not note.holds()
        for name in schema.TABLES:
            _check_file(
                folder / f"{name}.parquet", manifest.get("files", {}).get(f"{name}.parquet"), validate
            )
        dataset = cls(
            folder,
            manifest,
            pl.read_parquet(folder / "items.parquet", glob=False),
            pl.read_parquet(folder / "users.parquet", glob=False),
        )
        if validate:
            dataset.validate()
            note.write(dataset.items["images"], begun)
        return dataset

    @property
    def data_hash(self) -> str:
        """One hash of the three tables: what was made from a dataset keeps it, and refuses another one."""
        return hash_of_files(self.manifest["files"])

    @property
    def origin(self) -> Origin:
        """The hash that whatever is made from the dataset must state."""
        return Origin(str(self.folder), {"dataset": self.data_hash}, "is")

    @property
    def has_timestamps(self) -> bool:
        """Whether the log has times; single rows may still be without one (`NO_TIME`)."""
        return bool(self.manifest["counts"]["timestamps"])

    def scan_interactions(self) -> pl.LazyFrame:
        """Returns the interactions lazily, in input order: select columns before collecting a large log."""
        return pl.scan_parquet(self.folder / "interactions.parquet", glob=False)

    @cached_property
    def interactions(self) -> pl.DataFrame:
        """The whole interactions table, in input order; for large logs use `scan_interactions`."""
        return self.scan_interactions().collect()

    @cached_property
    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            codes = encode(self.scan_interactions(), self.users["user"], self.items["item"])
        except pl.exceptions.InvalidOperationError:
            for column, table in (("user", self.users), ("item", self.items)):
                self._name_unknown(column, table)
            raise
        for column, coded in zip(("user", "item"), codes, strict=True):
            if (coded == UNKNOWN).any():
                row = int((coded == UNKNOWN).argmax())
                raise DataError(f"{self.folder / 'interactions.parquet'}: row {row} has no {column} id")
        return codes

    @property
    def user_codes(self) -> np.ndarray:
        """The user's row number in `users` for each interaction: int32, shape [interactions]."""
        return self._codes[0]

    @property
    def item_codes(self) -> np.ndarray:
        """The item's row number in `items` for each interaction: int32, shape [interactions]."""
        return self._codes[1]

    @cached_property
    def timestamps(self) -> np.ndarray | None:
        """UTC seconds for each interaction: int64, shape [interactions]; None where the log has no times.

        A row without a time has `NO_TIME`, which sorts before every time.
        """
        if not self.has_timestamps:
            return None
        times = self.scan_interactions().select(pl.col("timestamp").fill_null(NO_TIME))
        return times.collect(engine="streaming")["timestamp"].to_numpy()

    def validate(self) -> None:
        """Checks everything that `open` promises.

        Raises:
            DataError: As `open` says.
        """
        for name in schema.TABLES:
            path = self.folder / f"{name}.parquet"
            schema.check_types(pl.scan_parquet(path, glob=False).collect_schema(), name, str(path))
        for name, table in (("item", self.items), ("user", self.users)):
            self._check_ids(name, table[name])
        for column in ("title", "text", "categories", "images"):
            if self.items[column].null_count():
                item = self.items.filter(pl.col(column).is_null())["item"][0]
                raise DataError(
                    f"{self.folder / 'items.parquet'}: item {item!r} has a null {column}; expected empty"
                )
        if len(self.user_codes) == 0:
            raise DataError(f"{self.folder / 'interactions.parquet'} has no rows")
        self._check_interactions()
        paths = self.items.select("item", "images").explode("images").drop_nulls()
        check_image_paths(self.folder, paths.iter_rows())

    def _check_ids(self, name: str, ids: pl.Series) -> None:
        where = self.folder / f"{name}s.parquet"
        if ids.null_count() or (ids == "").any():
            raise DataError(f"{where}: row {(ids.is_null() | (ids == '')).arg_max()} has no {name} id")
        if ids.n_unique() != len(ids):
            raise DataError(
                f"{where}: {name} {ids.filter(ids.is_duplicated())[0]!r} stands in it more than once"
            )

    def _check_interactions(self) -> None:
        where = self.folder / "interactions.parquet"
        finite = pl.col("rating").is_finite().all()
        if not self.scan_interactions().select(finite).collect(engine="streaming").item():
            raise DataError(f"{where}: a rating is NaN or infinite; expected a number or null")

    def _name_unknown(self, column: str, table: pl.DataFrame) -> None:
        """Raises a `DataError` with the first id of `column` that `table` lacks, if there is one."""
        unknown = (
            self.scan_interactions()
            .select(column)
            .with_row_index("row")
            .join(table.select(column).lazy(), on=column, how="anti", nulls_equal=False)
            .select(pl.len().alias("count"), pl.col("row").min(), pl.col(column).sort_by("row").first())
            .collect()
        )
        if unknown["count"][0]:
            raise DataError(
                f"{self.folder / 'interactions.parquet'}: row {unknown['row'][0]} names {column} "
                f"{unknown[column][0]!r}, which {column}s.parquet does not have "
                f"({unknown['count'][0]:,} such rows); import the dataset again"
            )


def write_dataset(
    out: Path | str,
    *,
    items: pl.DataFrame | pl.LazyFrame,
    interactions: pl.DataFrame | pl.LazyFrame,
    users: pl.DataFrame | pl.LazyFrame,
    source: dict[str, Any],
    stage: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    discard_derived: bool = False,
) -> Dataset:
    """Writes a dataset folder: complete and valid, or not at all.

    Args:
        out: The folder to make.
        items: The items; missing columns of the schema are added empty, extra ones are kept.
        interactions: The interactions in input order; a lazy frame is streamed to disk.
        users: The users.
        source: What the dataset was made from, for the manifest.
        stage: Called with the folder under construction, to put images (and other files) into it.
        overwrite: Replace `out` where it exists.
        discard_derived: Replace it even if it holds what other commands made; see `recllm.data.derived`.

    Raises:
        DataError: The tables are not valid together, `out` exists, or the disk is full.
    """
    with dataset_folder(Path(out), overwrite=overwrite, discard_derived=discard_derived) as folder:
        for name, frame in (("items", items), ("interactions", interactions), ("users", users)):
            schema.complete(frame.lazy(), name).sink_parquet(folder / f"{name}.parquet", engine="streaming")
        if stage is not None:
            stage(folder)
        dataset = finish_dataset(folder, source=source, dropped={})
    dataset.folder = Path(out)
    return dataset


def finish_dataset(
    folder: Path,
    *,
    source: dict[str, Any],
    dropped: dict[str, Any],
    codes: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """Validates the tables in a folder under construction and writes its manifest, which makes it a dataset.

    Args:
        folder: The folder with the tables and images.
        source: What the dataset was made from.
        dropped: What was left out on the way, as `Findings.as_dict` has it.
        codes: User and item codes of the interactions, where the caller knows them from writing the tables.
    """
    items = pl.read_parquet(folder / "items.parquet", glob=False)
    users = pl.read_parquet(folder / "users.parquet", glob=False)
    facts = (
        pl.scan_parquet(folder / "interactions.parquet", glob=False)
        .select(
            interactions=pl.len(),
            timestamps=pl.col("timestamp").count(),
            ratings=pl.col("rating").count(),
            reviews=pl.col("review").count(),
            first=pl.col("timestamp").min(),
            last=pl.col("timestamp").max(),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    counts = {
        "users": len(users),
        "items": len(items),
        "interactions": facts["interactions"],
        "timestamps": facts["timestamps"],
        "ratings": facts["ratings"],
        "reviews": facts["reviews"],
        "items_with_title": int((items["title"] != "").sum()),
        "items_with_text": int((items["text"] != "").sum()),
        "items_with_image": int((items["images"].list.len() > 0).sum()),
        "images": int(items["images"].list.len().sum()),
    }
    manifest = {
        "format": FORMAT,
        "source": source,
        "counts": counts,
        "time_range": [facts["first"], facts["last"]] if facts["timestamps"] else None,
        "dropped": dropped,
        "files": {f"{name}.parquet": describe_file(folder / f"{name}.parquet") for name in schema.TABLES},
        "run": describe_run(),
    }
    dataset = Dataset(folder, manifest, items, users)
    if codes is not None:
        dataset._codes = codes
    dataset.validate()
    write_json(folder / MANIFEST, manifest)
    return dataset


def describe_file(path: Path) -> dict[str, Any]:
    """Returns a file's size and SHA-256, as manifests keep them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def hash_of_files(files: dict[str, dict[str, Any]]) -> str:
    """Returns one hash over the hashes of several files, in the order of their names."""
    return hashlib.sha256("".join(files[name]["sha256"] for name in sorted(files)).encode()).hexdigest()


def _check_file(path: Path, expected: dict[str, Any] | None, check_hash: bool) -> None:
    if expected is None:
        raise DataError(f"{path.parent / MANIFEST} does not list {path.name}; import the dataset again")
    if not path.exists():
        raise DataError(f"{path} is missing; import the dataset again")
    if path.stat().st_size != expected["bytes"] or (check_hash and sha256(path) != expected["sha256"]):
        raise DataError(
            f"{path} is not the file that {MANIFEST} describes: it was changed or cut short; import it again"
        )
