"""Id-sequence text files, as many sequential recommenders ship their data, with an items table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recllm.data.raw.anyfile import read_table
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import find_images
from recllm.data.raw.sequence_lines import read_sequences
from recllm.data.raw.tables import RawDataset, existing_file, find_file
from recllm.data.readers.options import ImportOptions
from recllm.data.readers.table import items_table


@dataclass
class ItemSequences(ImportOptions):
    """Imports a text file with one user a line: `user item item item ...`, in time order and without times.

    SOURCE is the file, or a folder with `sequences.txt` (or a single other .txt file) and `items.csv`. The
    order of the interactions in the dataset is that of the file, and stands for time. A user's second and
    later interactions with one item are left out unless --duplicates keep is given.
    """

    separator: str | None = None
    """What stands between ids beside spaces and tabs, for example a comma."""
    items_file: Path | None = None
    """Table of the items; by default `items.csv` beside the sequences where there is one."""
    item_id: str = "item"
    """Column of the items table with the item id; all columns that are not recllm's are kept."""
    title: str | None = None
    """Column of the items table with the title; by default `title` where there is such a column."""
    text: str | None = None
    """Column of the items table with the description; by default `text` where there is such a column."""
    categories: str | None = None
    """Column of the items table with the categories; by default `categories` where there is such a column."""
    category_separator: str = "|"
    """What stands between the categories of an item, where they are text and not a list."""
    images: Path | None = None
    """Folder of item images, named by item id: `<item>.jpg`, `<item>_0.jpg`, ..."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the sequences and the items table."""
        path = self.source
        if path.is_dir():
            names = sorted(held.name for held in path.iterdir() if held.name.startswith("sequences.txt"))
            texts = sorted(
                held.name for held in path.glob("*.txt") if not held.name.lower().startswith("readme")
            )
            found = names or texts
            what = "text file of item sequences; give the file where the folder holds several"
            path = path / found[0] if len(found) == 1 else find_file(path, "sequences.txt", what=what)
        existing_file(path, "the sequence file")
        raw = RawDataset(
            read_sequences(path, findings, workspace, separator=self.separator), source={"order": "time"}
        )
        items_file = self.items_file
        if items_file is None and (path.parent / "items.csv").is_file():
            items_file = path.parent / "items.csv"
        if items_file is not None:
            raw.items = items_table(
                read_table(items_file, findings, workspace),
                self.item_id,
                findings,
                title=self.title,
                text=self.text,
                categories=self.categories,
                category_separator=self.category_separator,
            )
        if self.images is not None:
            find_images(raw, self.images)
        return raw
