"""What every import can be told, whichever reader it uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from recllm.data.raw.findings import Findings
from recllm.data.raw.tables import RawDataset
from recllm.data.raw.times import TimestampUnit


@dataclass
class ImportOptions:
    """Options common to all readers."""

    source: Positional[Annotated[Path, arg(metavar="SOURCE")]]
    """The file or folder to import."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The dataset folder to make."""
    strict: bool = False
    """Make the first malformed line or row an error instead of counting it and leaving it out."""
    duplicates: Literal["first", "last", "keep", "error"] = "first"
    """Of several interactions of a user with an item, keep the first in time, the last, or all; or refuse."""
    unknown_items: Literal["keep", "drop"] = "keep"
    """Interactions with items that the items table lacks: keep them, without title and text, or not."""
    timestamp_unit: TimestampUnit = "auto"
    """The unit of numeric timestamps; "auto" tells it from their size."""
    time_format: str | None = None
    """The format of dates, in the signs of strftime (`%d.%m.%Y %H:%M`); by default ISO 8601 and common
    formats are found, and named where they are no ISO 8601."""
    link_images: bool = False
    """Make hard links to the images, not copies; later changes to the source then show in the dataset."""
    overwrite: bool = False
    """Replace the dataset folder where it exists."""
    discard_derived: bool = False
    """With --overwrite: also delete what other commands made from the old dataset (splits, texts,
    instructions, ...). Generated answers, visual tokens and embeddings are kept in any case."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the source.

        Args:
            findings: Where malformed lines are counted.
            workspace: A folder for intermediate files, removed after the import.

        Raises:
            DataError: The source is not what this reader expects.
        """
        raise TypeError(f"{type(self).__name__} has no reader; use one of recllm.data.readers.READERS")
