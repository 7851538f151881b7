"""The columns of a dataset's three tables.

`items.parquet`, one row an item:

| column       | type         | meaning                                                                  |
|--------------|--------------|--------------------------------------------------------------------------|
| `item`       | text         | the id, unique, not empty                                                |
| `title`      | text         | empty where the source has none                                          |
| `text`       | text         | description, plot, features; empty where the source has none             |
| `categories` | list of text | from the widest to the narrowest, where the source has an order          |
| `images`     | list of text | relative to the dataset folder, `/`-separated; empty list without images |

`interactions.parquet`, one row an interaction, **in input order**, which breaks ties in time:

| column      | type    | meaning                                                         |
|-------------|---------|-----------------------------------------------------------------|
| `user`      | text    | an id of `users.parquet`                                        |
| `item`      | text    | an id of `items.parquet`                                        |
| `timestamp` | int64   | UTC seconds; null where the source has no time that can be read |
| `rating`    | float32 | null where the source has none                                  |
| `review`    | text    | null where the user wrote none                                  |

`users.parquet`, one row a user: `user` (text, unique). Each table keeps what else the source has as extra
columns. `source_row` (int64) is an extra column of items that came with an items table: the item's row in it.
"""

from __future__ import annotations

import polars as pl

from recllm.errors import DataError

ITEMS: dict[str, pl.DataType] = {
    "item": pl.String(),
    "title": pl.String(),
    "text": pl.String(),
    "categories": pl.List(pl.String()),
    "images": pl.List(pl.String()),
}
INTERACTIONS: dict[str, pl.DataType] = {
    "user": pl.String(),
    "item": pl.String(),
    "timestamp": pl.Int64(),
    "rating": pl.Float32(),
    "review": pl.String(),
}
USERS: dict[str, pl.DataType] = {"user": pl.String()}
SOURCE_ROW = "source_row"
TABLES = {"items": ITEMS, "interactions": INTERACTIONS, "users": USERS}

_ABSENT = {"title": pl.lit(""), "text": pl.lit(""), "categories": pl.lit([]), "images": pl.lit([])}


def complete(frame: pl.LazyFrame, table: str) -> pl.LazyFrame:
    """Adds the columns of `table` that `frame` lacks, casts the others, and puts extra columns last."""
    columns = TABLES[table]
    present = frame.collect_schema().names()
    expressions = []
    for name, dtype in columns.items():
        value = pl.col(name) if name in present else pl.lit(None)
        if name in _ABSENT and table == "items":
            value = value.cast(dtype).fill_null(_ABSENT[name].cast(dtype))
        expressions.append(value.cast(dtype).alias(name))
    extras = [name for name in present if name not in columns]
    return frame.select(*expressions, *extras)


def check_types(schema: pl.Schema, table: str, where: str) -> None:
    """Checks that a table has its columns, each of its type.

    Raises:
        DataError: A column is missing or of another type.
    """
    for name, dtype in TABLES[table].items():
        if name not in schema:
            raise DataError(f"{where}: column {name!r} is missing; found: {', '.join(schema)}")
        if schema[name] != dtype:
            raise DataError(f"{where}: column {name!r} is of type {schema[name]}, expected {dtype}")
