"""Any log of interactions and any table of items, by a mapping of their columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recllm.data.raw.anyfile import has_separator, is_delimited, read_table
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import (
    column_of,
    find_images,
    mapped,
    text_column,
    with_clean_ids,
    with_source_rows,
)
from recllm.data.raw.lists import list_column
from recllm.data.raw.tables import RawDataset, RawTable
from recllm.data.readers.options import ImportOptions
from recllm.errors import DataError


@dataclass
class Table(ImportOptions):
    """Imports a CSV, TSV, JSON lines or parquet file with one interaction a row, compressed or not.

    Columns that no option names are kept as extra columns. Ids are text: 12, 12.0 and "12" are one id.
    """

    user: str = "user"
    """Column of SOURCE with the user id."""
    item: str = "item"
    """Column of SOURCE with the item id."""
    timestamp: str | None = None
    """Column of SOURCE with the time; by default `timestamp` where there is one ("" for none)."""
    rating: str | None = None
    """Column of SOURCE with the rating; by default `rating` where there is such a column ("" for none)."""
    review: str | None = None
    """Column of SOURCE with the review text; by default `review` where there is such a column."""
    items_file: Path | None = None
    """Table of the items (CSV, TSV, JSON lines or parquet)."""
    item_id: str | None = None
    """Column of the items file with the item id; by default of the name that --item gives."""
    title: str | None = None
    """Column of the items file with the title; by default `title` where there is such a column."""
    text: str | None = None
    """Column of the items file with the description; by default `text` where there is such a column."""
    categories: str | None = None
    """Column of the items file with the categories; by default `categories` where there is such a column."""
    category_separator: str = "|"
    """What stands between the categories of an item, where they are text and no list in any spelling."""
    users_file: Path | None = None
    """Table of the users, with the column that --user names; all its other columns are kept."""
    images: Path | None = None
    """Folder of item images: `<item>.jpg`, `<item>_0.jpg`, `<item>_1.jpg` (or .png, .webp, ...)."""
    image_pattern: str | None = None
    """Where each item's image is in that folder, for example `{item}/cover.jpg`."""
    image_column: str | None = None
    """Column of the items file with image paths below that folder: a list, or text with `|` between them."""
    separator: str | None = None
    r"""What stands between the fields of SOURCE; by default a comma for .csv, a tab (`\t`) for .tsv."""
    items_separator: str | None = None
    """What stands between the fields of the items and users files; by default as in SOURCE where their first
    lines have it, else by their suffixes."""
    quote: str = "auto"
    """The quote character of the text files; empty where quotes have no meaning. By default double quotes,
    except in tab-separated files whose lines make sense only without."""
    escape: str | None = None
    """The character that stands before a quote inside a quoted field, for example a backslash."""
    encoding: str = "utf-8"
    """The encoding of the text files, for example `latin-1`."""
    columns: tuple[str, ...] = ()
    """The names of the columns of SOURCE, where its first line is not a header."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the files that the options name."""
        if self.user == self.item:
            raise DataError(f"--user and --item name the same column {self.user!r}")
        self._check_separators()
        table = self._open(self.source, findings, workspace, header=self.columns or None)
        columns = {"user": self.user, "item": self.item}
        for name in ("timestamp", "rating", "review"):
            column = column_of(table, getattr(self, name), name)
            if column is not None and column not in (self.user, self.item):
                columns[name] = column
        raw = RawDataset(
            mapped(table, columns, "interactions"), source={"columns": ", ".join(columns.values())}
        )
        if self.items_file is not None:
            raw.items = self._read_items(self.items_file, findings, workspace)
        if self.users_file is not None:
            users = self._open(self.users_file, findings, workspace)
            raw.users = mapped(users, {"user": self.user}, "users")
        self._find_images(raw, findings)
        return raw

    def _open(
        self, path: Path, findings: Findings, workspace: Path, *, header: tuple[str, ...] | None = None
    ) -> RawTable:
        separator = self.separator and self.separator.replace("\\t", "\t")
        if path != self.source:
            given = self.items_separator and self.items_separator.replace("\\t", "\t")
            separator = given or (separator if has_separator(path, separator) else None)
        return read_table(
            path,
            findings,
            workspace,
            separator=separator,
            quote=self.quote or None,
            escape=self.escape,
            header=header,
            encoding=self.encoding,
        )

    def _check_separators(self) -> None:
        beside = [path for path in (self.items_file, self.users_file) if path is not None]
        for option, given, paths in (
            ("--separator", self.separator, [self.source, *beside]),
            ("--items-separator", self.items_separator, beside),
        ):
            texts = [path for path in paths if not path.is_file() or is_delimited(path)]
            if given is not None and not texts:
                raise DataError(f"{option} is for delimited text, and no such file is given")

    def _read_items(self, path: Path, findings: Findings, workspace: Path) -> RawTable:
        table = self._open(path, findings, workspace)
        return items_table(
            table,
            self.item_id or self.item,
            findings,
            title=self.title,
            text=self.text,
            categories=self.categories,
            category_separator=self.category_separator,
            images=self.image_column,
        )

    def _find_images(self, raw: RawDataset, findings: Findings) -> None:
        if self.image_column is not None and (raw.items is None or self.images is None):
            raise DataError(
                "--image-column names a column of --items-file, with paths below --images: give both"
            )
        if self.image_column is not None and self.image_pattern is not None:
            raise DataError("--image-column and --image-pattern both say where an image is; give one of them")
        if self.images is None:
            if self.image_pattern is not None:
                raise DataError("--image-pattern starts at the folder --images; give that as well")
            return
        if not self.images.is_dir():
            raise DataError(f"--images {self.images} is not a folder; expected the folder of item images")
        if self.image_column is None:
            find_images(raw, self.images, pattern=self.image_pattern)
        raw.image_folder = self.images


def items_table(
    table: RawTable,
    item: str,
    findings: Findings,
    *,
    title: str | None = None,
    text: str | None = None,
    categories: str | None = None,
    category_separator: str = "|",
    images: str | None = None,
) -> RawTable:
    """Returns an items table with recllm's columns.

    None for `title`, `text` or `categories` means the column of that name where there is one.

    Args:
        table: The table as read.
        item: The column with the item id.
        findings: Where malformed lines are counted.
        title: The column with the title.
        text: The column with the description.
        categories: The column with the categories.
        category_separator: What stands between categories that are text.
        images: The column with image paths.

    Raises:
        DataError: A column that was named is missing; the message lists those found.
    """
    chosen = {"item": item}
    for name, given in (("title", title), ("text", text), ("categories", categories)):
        column = column_of(table, given, name)
        if column is not None and (given is not None or column != item):
            chosen[name] = column
    if images is not None:
        chosen["images"] = column_of(table, images, images)
    table = with_clean_ids(mapped(table, chosen, "items"), "item", findings)
    columns = [text_column(table.frame, name, table.path) for name in ("title", "text") if name in chosen]
    for name, separator in (("categories", category_separator), ("images", "|")):
        if name in chosen:
            columns.append(list_column(table.frame, name, table.path, separator, findings))
    table.frame = table.frame.with_columns(*columns)
    return with_source_rows(table)
