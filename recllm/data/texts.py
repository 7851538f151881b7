"""The contract of `texts/<name>.parquet`: what a model wrote, one row a request; and the texts of items."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.origins import Origin, check_same_origin
from recllm.errors import DataError
from recllm.files import sha256

CATALOG = "catalog"
"""The name that stands for title and text of items.parquet."""
COLUMNS_OF_CATALOG = ("title", "text")
"""The columns that `catalog` stands for."""
METADATA = "metadata"
"""The name that stands for title, brand, categories and text of items.parquet."""
COLUMNS_OF_METADATA = ("title", "brand", "categories", "text")
"""The columns that `metadata` stands for; each is a name by itself."""
METADATA_KEY = "recllm.texts"
COLUMNS = ("text", "prompt_hash", "prompt_tokens", "tokens", "finish")


def text_path(folder: Path, name: str, tag: str = "") -> Path:
    """Returns where texts of a name lie in a dataset folder."""
    return folder / "texts" / f"{name}{'-' if tag else ''}{tag}.parquet"


def near_texts(path: Path) -> str:
    """Returns the names of the texts that there are instead of `path`, for an error."""
    names = sorted(each.stem for each in path.parent.glob("*.parquet"))
    return f" (texts that there are: {', '.join(names)})" if names else ""


def read_texts(path: Path, *, id_name: str = "id") -> tuple[pl.DataFrame, dict[str, Any]]:
    """Reads texts and their metadata.

    Args:
        path: A file that `write_texts` made.
        id_name: What the id column is called.

    Raises:
        DataError: The file is missing, is not one of texts, or has an id twice.
    """
    path = Path(path)
    try:
        metadata = pl.read_parquet_metadata(path).get(METADATA_KEY)
        frame = pl.read_parquet(path, glob=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the builder that writes it first.") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} is not readable as parquet ({error}); make it again.") from None
    absent = [name for name in (id_name, *COLUMNS) if name not in frame.columns]
    if metadata is None or absent:
        what = f"it lacks the column {absent[0]!r}" if absent else "it lacks the metadata of one"
        raise DataError(f"{path} is not a file of texts: {what}; make it with a recllm builder.")
    check_unique(frame[id_name].to_list(), path)
    return frame, orjson.loads(metadata)


def check_unique(ids: Sequence[str], path: Path) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    twice = next(each for each in ids if each in seen or seen.add(each))
    raise DataError(f"{path}: the id {twice!r} stands twice; each text needs an id of its own.")


@dataclass(frozen=True)
class ItemTexts:
    """What a model wrote of the items.

    Attributes:
        name: The file's name without its suffix.
        sha256: Hash of the file.
        texts: One for each item code, empty where the file has none.
        prompt_hashes: The prompt of each; empty where there is none.
        special_tokens: Those of the model that wrote them.
    """

    name: str
    sha256: str
    texts: Sequence[str]
    prompt_hashes: Sequence[str]
    special_tokens: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, name: str, dataset: Dataset, made_by: str) -> ItemTexts:
        """Reads DATASET/texts/<name>.parquet.

        Args:
            folder: The dataset folder.
            name: The file's name without its suffix.
            dataset: The dataset.
            made_by: The command that makes such a file, for the error.

        Raises:
            DataError: The file is missing, or was made from another state of the dataset.
        """
        path = folder / "texts" / f"{name}.parquet"
        if not path.exists():
            raise DataError(f"{path} does not exist{near_texts(path)}; write it first: {made_by}")
        table, metadata = read_texts(path)
        made_from = Origin.of_manifest(path, metadata)
        check_same_origin(made_from, dataset.origin, remedy="make it again", required=("dataset",))
        told = dataset.items.select("item").join(
            table.select("text", "prompt_hash", item="id"), on="item", how="left", maintain_order="left"
        )
        texts, hashes = (told[column].fill_null("").to_list() for column in ("text", "prompt_hash"))
        return cls(name, sha256(path), texts, hashes, tuple(metadata.get("special_tokens", ())))

    def tell_missing(self) -> None:
        """Prints how many items have no text in the file; title and description stand in for it."""
        if missing := sum(not text for text in self.texts):
            print(
                f"{self.name}: {missing:,} of {len(self.texts):,} items have no text in it; their title, "
                "categories and description are used"
            )


def item_texts(dataset: Dataset, name: str = CATALOG) -> list[str]:
    """Returns one text for each item code, empty where an item has none.

    Args:
        dataset: The dataset.
        name: `catalog` (title and text of items.parquet), `metadata` (title, brand, categories and text),
            `title`, `brand`, `categories` or `text` (that column alone), or the name of a file
            DATASET/texts/<name>.parquet with the items' ids. Several joined by `+`, such as
            `title+grounding`: one after the other, each a sentence of its own; an item has what there is.
            `metadata+description` is MLLMRec's multimodal description (eq. 2).

    Raises:
        DataError: The file is missing, was made from another state of the dataset, or has a text of no item.
    """
    if name == CATALOG:
        name = "+".join(COLUMNS_OF_CATALOG)
    if name == METADATA:
        name = "+".join(COLUMNS_OF_METADATA)
    if "+" in name:
        parts = name.split("+")
        if len(set(parts)) < len(parts) or not all(parts):
            raise DataError(f"texts {name!r}: expected different names joined by +, such as title+grounding")
        return functools.reduce(_sentences, [item_texts(dataset, part) for part in parts])
    if name in COLUMNS_OF_METADATA:
        return _column(dataset.items, name)
    path = dataset.folder / "texts" / f"{name}.parquet"
    if not path.exists():
        held = ", ".join(sorted(each.stem for each in path.parent.glob("*.parquet"))) or "none"
        raise DataError(
            f"{path} does not exist; texts are {CATALOG}, {METADATA}, {', '.join(COLUMNS_OF_METADATA)} or a "
            f"name in {path.parent} ({held}), which `recllm build items` writes"
        )
    table, metadata = read_texts(path)
    made_from = Origin.of_manifest(path, metadata)
    check_same_origin(made_from, dataset.origin, remedy="make it again", required=("dataset",))
    told = dataset.items.select("item").join(
        table.select("text", item="id"), on="item", how="left", maintain_order="left"
    )
    if told["text"].null_count() == len(told):
        raise DataError(
            f"{path}: none of its ids is an item (the first is {table['id'].first()!r}); expected texts "
            "about items, as `recllm build items` writes them"
        )
    return told["text"].fill_null("").to_list()


def _sentences(first: list[str], second: list[str]) -> list[str]:
    """Joins two texts of each item, with a full stop between them where the first has none."""
    texts = pl.DataFrame({"first": first, "second": second})
    one, other = (pl.col(column).str.strip_chars() for column in ("first", "second"))
    stop = pl.when(one.str.contains(r"[.!?…]$")).then(pl.lit(" ")).otherwise(pl.lit(". "))
    joined = pl.when((one != "") & (other != "")).then(one + stop + other).otherwise(one + other)
    return texts.select(joined.alias("text"))["text"].to_list()


def _column(items: pl.DataFrame, name: str) -> list[str]:
    """A column as texts; empty where it has nothing, and where there is no column `brand` of text."""
    if name == "brand" and items.schema.get("brand") != pl.String:
        return [""] * len(items)
    values = items[name].list.join(", ", ignore_nulls=True) if name == "categories" else items[name]
    return values.str.strip_chars().fill_null("").to_list()
