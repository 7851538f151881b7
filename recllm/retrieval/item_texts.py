"""The text of each item that an encoder reads: the catalog's own, or what a model wrote."""

from __future__ import annotations

import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.origins import Origin, check_same_origin
from recllm.errors import DataError
from recllm.mllm.texts import read_texts

CATALOG = "catalog"
"""The name that stands for title and text of items.parquet."""


def item_texts(dataset: Dataset, name: str = CATALOG) -> list[str]:
    """Returns one text for each item code, empty where an item has none.

    Args:
        dataset: The dataset.
        name: `catalog`, or the name of a file DATASET/texts/<name>.parquet with the items' ids.

    Raises:
        DataError: The file is missing, was made from another state of the dataset, or has a text of no item.
    """
    if name == CATALOG:
        title, text = (pl.col(column).str.strip_chars() for column in ("title", "text"))
        stop = pl.when(title.str.contains(r"[.!?…]$")).then(pl.lit(" ")).otherwise(pl.lit(". "))
        joined = pl.when((title != "") & (text != "")).then(title + stop + text).otherwise(title + text)
        return dataset.items.select(joined.alias("text"))["text"].to_list()
    path = dataset.folder / "texts" / f"{name}.parquet"
    if not path.exists():
        held = ", ".join(sorted(each.stem for each in path.parent.glob("*.parquet"))) or "none"
        raise DataError(
            f"{path} does not exist; texts are {CATALOG} or a name in {path.parent} ({held}), which "
            "`recllm build items` writes"
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
