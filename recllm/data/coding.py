"""Ids as codes: row numbers in the sorted tables, which everything that counts or ranks works on."""

from __future__ import annotations

import numpy as np
import polars as pl

from recllm.errors import DataError

UNKNOWN = -1


def encode(interactions: pl.LazyFrame, users: pl.Series, items: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Encodes the users and items of a log.

    Args:
        interactions: With the text columns `user` and `item`.
        users: The user ids, each once.
        items: The item ids, each once.

    Returns:
        User codes and item codes, int32, shape [interactions]; `UNKNOWN` for a null id.

    Raises:
        polars.exceptions.InvalidOperationError: An id is not among `users` or `items`.
    """
    # A cast to an Enum is a strict dictionary look-up, streamed.
    coded = interactions.select(pl.col("user").cast(pl.Enum(users)), pl.col("item").cast(pl.Enum(items)))
    coded = coded.select(pl.all().to_physical().cast(pl.Int32).fill_null(UNKNOWN)).collect(engine="streaming")
    return coded["user"].to_numpy(), coded["item"].to_numpy()


def recode(codes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Returns the codes that hold after only the `kept` rows of the table were kept.

    Args:
        codes: Codes of kept rows; shape [interactions].
        kept: True for each row of the table that stays; shape [table].
    """
    return (np.cumsum(kept, dtype=np.int32) - 1)[codes]


def codes_of(ids: pl.Series, known: pl.Series, what: str, *, of: str = "candidates") -> np.ndarray:
    """Returns the place of each id among the `known` ones; int64.

    Args:
        ids: The ids.
        known: Those of the dataset.
        what: What they name, for the error: `user` or `item`.
        of: What they belong to, for the error.

    Raises:
        DataError: One is not there; the message names its row.
    """
    codes = pl.DataFrame({"id": ids.cast(pl.String)}).join(
        pl.DataFrame({"id": known}).with_row_index("code"), on="id", how="left", maintain_order="left"
    )["code"]
    if codes.null_count():
        row = codes.is_null().arg_max()
        raise DataError(f"{of}: row {row}: no {what} {ids[row]!r} in the dataset; make the {of} again")
    return codes.to_numpy().astype(np.int64)
