"""The contract of instruction rows; a part is opened and checked in one way by training, scoring and reports.

`DATASET/instructions/<name>/{train,valid,test}.parquet`:

| column       | meaning                                                                                     |
|--------------|---------------------------------------------------------------------------------------------|
| `id`         | names the row: positive's row number, user and candidate                                    |
| `user`       | the user's id                                                                               |
| `item`       | the candidate's id                                                                          |
| `label`      | 1 or 0                                                                                      |
| `target`     | the positive's id (the item itself where `label` is 1)                                      |
| `target_row` | its row number in `interactions.parquet`                                                    |
| `prompt`     | list of messages, `{role, content: [{type, text}, ...]}`; an image part's text is null      |
| `completion` | one message, the assistant's: "Yes." or "No.", or what the task asks for                    |
| `images`     | relative paths, one for each image part, in order                                           |
| `shown`      | row numbers of the interactions that the prompt may tell of, be it through a summary        |
| `task`       | `yes_no`, which scores come from; or `next_keywords`, `choose`, `summarize` (MMSRARec)      |
| `retrieved`  | row numbers of other users' interactions that the prompt tells of, through their keywords   |

A row of another task than `yes_no` is about a target alone: its `item` is the target, its `label` 1. Files
without the columns `task` and `retrieved`, which earlier versions wrote, have rows of `yes_no` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data.dataset import describe_file, hash_of_files
from recllm.data.origins import Origin, check_same_origin
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json
from recllm.runs.folder import GRPO, SFT

YES_NO = "yes_no"
"""The value of the column `task` in rows that ask whether an item comes next; scores are of these alone."""
TRAINED = (SFT, "exported model")
"""Kinds of folders whose weights were trained on instruction rows, as their manifests state."""


_MESSAGES = pl.List(
    pl.Struct({"role": pl.String, "content": pl.List(pl.Struct({"type": pl.String, "text": pl.String}))})
)
SCHEMA = {
    "id": pl.String,
    "user": pl.String,
    "item": pl.String,
    "label": pl.Int8,
    "target": pl.String,
    "target_row": pl.Int64,
    "prompt": _MESSAGES,
    "completion": _MESSAGES,
    "images": pl.List(pl.String),
    "shown": pl.List(pl.Int64),
    "task": pl.String,
    "retrieved": pl.List(pl.Int64),
}


@dataclass(frozen=True)
class InstructionPart:
    """One part of instruction rows on disk.

    Attributes:
        path: The parquet file.
        part: `train`, `valid` or `test`.
        dataset: The dataset folder, which image paths are relative to.
        description: Size and hash of the file, as in its manifest.
        manifest: The folder's manifest.
    """

    path: Path
    part: str
    dataset: Path
    description: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def protocol(self) -> str:
        """The protocol that the part's rows belong to.

        Raises:
            DataError: The manifest states none.
        """
        protocol = self.manifest.get("protocols", {}).get(self.part)
        if protocol is None:
            raise DataError(
                f"{self.path.parent / MANIFEST} states no protocol of {self.part}; build it again"
            )
        return protocol

    @property
    def form(self) -> str | None:
        """`plain`, `cot` or `mmsrarec`; None where the manifest does not say."""
        return self.manifest.get("settings", {}).get("form")

    @property
    def candidates(self) -> str | None:
        """The fingerprint of the candidates that the rows are about; None where they were sampled."""
        return self.manifest.get("candidates", {}).get(self.part)

    @property
    def top_k(self) -> str | None:
        """The hash of the file of top-K lists that the rows are about; None where they are about none."""
        return (self.manifest.get("top_k") or {}).get("sha256")

    @property
    def origin(self) -> Origin:
        """What the rows were made from."""
        return Origin.of_manifest(
            self.path, self.manifest, "was built from", candidates=self.candidates, top_k=self.top_k
        )

    def facts(self) -> dict[str, Any]:
        """Returns what a run or a score file keeps of the part, to be compared with other parts later."""
        return {
            "data_hash": self.manifest.get("data_hash"),
            "split_hash": self.manifest.get("split_hash"),
            "form": self.form,
        }


def rows_of_task(table: pl.LazyFrame, task: str = YES_NO) -> pl.LazyFrame:
    """Returns the rows of one task of a part; all rows of a file without the column `task`.

    Files from before there were several tasks lack it: their rows ask for yes or no.
    """
    if "task" in table.collect_schema().names():
        return table.filter(pl.col("task") == task)
    return table if task == YES_NO else table.clear()


def write_rows(path: Path, rows: Iterator[dict[str, Any]], block: int = 2048) -> None:
    """Writes rows as parquet, a block at a time, so that memory stays bounded."""
    import pyarrow.parquet as pq

    schema = pl.DataFrame(schema=SCHEMA).to_arrow().schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        held: list[dict[str, Any]] = []
        for row in rows:
            held.append(row)
            if len(held) == block:
                writer.write_table(pl.DataFrame(held, schema=SCHEMA).to_arrow().cast(schema))
                held.clear()
        writer.write_table(pl.DataFrame(held, schema=SCHEMA).to_arrow().cast(schema))


def open_part(instructions: Path, part: str) -> InstructionPart:
    """Opens a part of `DATASET/instructions/NAME`; of the tables it reads this part's file alone.

    Raises:
        DataError: There is none, it is not the file that the manifest describes, or the dataset that the
            folder is in is not the one that it was built from.
    """
    folder = Path(instructions)
    manifest = read_json(folder / MANIFEST, "a folder of instructions (made by `recllm build instructions`)")
    path = folder / f"{part}.parquet"
    if not path.is_file():
        options = "" if part == "train" else " --candidates NAME"
        raise DataError(
            f"{path} does not exist; make it with `recllm build instructions DATASET --parts {part}{options}`"
        )
    description = describe_file(path)
    if description != manifest.get("files", {}).get(path.name):
        raise DataError(f"{path} is not the file that {MANIFEST} describes; build the instructions again")
    place = folder.resolve()
    dataset = place.parent.parent
    if place.parent.name != "instructions" or not (dataset / MANIFEST).is_file():
        raise DataError(f"{folder} is not in DATASET/instructions, so its images cannot be found")
    opened = InstructionPart(path, part, dataset, description, manifest)
    files = read_json(dataset / MANIFEST, "a recllm dataset").get("files")
    own = Origin(str(dataset), {"dataset": hash_of_files(files) if files else None}, "is")
    check_same_origin(opened.origin, own, remedy="build the instructions again", required=("dataset",))
    return opened


def check_trained_on(weights: Path | str | None, rows: InstructionPart, *, allow_other_split: bool) -> bool:
    """Checks that weights which were trained on instruction rows meet rows of the same split.

    Rows of another split of a dataset may be among those that the weights were trained on, so that scores of
    them measure memory. Prints a warning where weights and rows are of different forms (plain, cot).

    Args:
        weights: The folder of a run, its adapter or its export. Anything else (None, a hub id, a model that
            recllm did not train) states nothing that could be checked.
        rows: The rows that it is to score, or to be trained further on.
        allow_other_split: Accept another split or dataset, with a warning.

    Returns:
        False where they are of different splits and this was allowed.

    Raises:
        DataError: They are of different splits, or the folder does not say which one it was trained on.
    """
    manifest = _trained(weights)
    if manifest is None:
        return True
    trained = manifest.get("instructions") or {}
    forms = trained.get("form"), rows.form
    if all(forms) and forms[0] != forms[1]:
        print(
            f"warning: {weights} was trained on {forms[0]} rows, but {rows.path} has {forms[1]} rows: the "
            "model has not learned to answer such prompts",
            flush=True,
        )
    one = Origin.of_manifest(weights, trained, "was trained on")
    other = Origin.of_manifest(rows.path, rows.manifest, "was built from")
    try:
        check_same_origin(
            one,
            other,
            remedy="what it was trained on may be among these rows. Build rows of its split, or give "
            "--allow-other-split where this is wanted, for example to measure transfer to another dataset",
            required=("dataset", "split"),
        )
    except DataError as error:
        if not allow_other_split:
            raise
        print(f"warning: {str(error).partition(';')[0]}; allowed by --allow-other-split", flush=True)
        return False
    return True


def _trained(weights: Path | str | None) -> Mapping[str, Any] | None:
    """The manifest of a folder whose weights were trained on instruction rows; None for anything else."""
    if weights is None or not (Path(weights) / MANIFEST).is_file():
        return None
    manifest = read_json(Path(weights) / MANIFEST, "a run's folder (made by `recipes/sft.py`)")
    if manifest.get("kind") == GRPO or (manifest.get("kind") in TRAINED and "data" in manifest):
        data = manifest["data"]  # of GRPO, also exported: items alone, or a split's users as well
        return {"instructions": data} if data.get("split_hash") else None
    return manifest if manifest.get("kind") in TRAINED else None
