"""Instruction tuples on disk: TRL's `prompt` / `completion` rows with image paths, and who may know what.

`DATASET/instructions/<name>/{train,valid,test}.parquet`:

| column       | meaning                                                                                     |
|--------------|---------------------------------------------------------------------------------------------|
| `id`         | names the row: user, positive's row number and item                                         |
| `user`       | the user's id                                                                               |
| `item`       | the candidate's id                                                                          |
| `label`      | 1 or 0                                                                                      |
| `target`     | the positive's id (the item itself where `label` is 1)                                      |
| `target_row` | its row number in `interactions.parquet`                                                    |
| `prompt`     | list of messages, `{role, content: [{type, text}, ...]}`; an image part's text is null      |
| `completion` | one message, the assistant's: "Yes." or "No."                                               |
| `images`     | relative paths, one for each image part, in order                                           |
| `shown`      | row numbers of the interactions that the prompt tells of, be it through a summary           |
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from recllm.builders.catalog import Catalog, ImageCheck
from recllm.builders.chats import Chat, Composer
from recllm.builders.instruction_rows import InstructionBuilder, write_rows
from recllm.builders.negatives import NegativeSampler
from recllm.builders.options import InstructionOptions
from recllm.builders.preferences import Preferences, read_item_texts
from recllm.builders.prompt_length import PromptLength
from recllm.builders.session import text_path
from recllm.data.dataset import Dataset, describe_file
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.files import sha256, staged_folder, write_json
from recllm.prompts import TEMPLATES
from recllm.prompts.templates import load_templates
from recllm.runs import describe_run

_SHOWN = 2  # rows that a dry run prints


def build_instructions(options: InstructionOptions) -> None:
    """Writes DATASET/instructions/<name>, or prints the first rows; see `InstructionOptions`.

    Raises:
        DataError: Texts are missing or may know too much, options contradict each other, a prompt is over its
            budget, or the folder exists.
    """
    _check(options)
    dataset = Dataset.open(options.dataset)
    split = Split.open(dataset.folder / "splits" / options.split, dataset=dataset)
    length = None
    if options.processor is not None:
        length = PromptLength(options.processor, dataset.folder, options.min_pixels, options.max_pixels)
    images = ImageCheck(Catalog(dataset))
    composer, sources = _composer(dataset, options, images)
    sampler = NegativeSampler(split, options.negative_sampling, options.seed)
    builders = []
    for part in options.parts:
        preferences = None
        if options.preference != "none":
            path = text_path(dataset.folder, f"{options.preference}-{part}", options.tag)
            preferences = Preferences.open(path, split, part)
            sources[path.name] = sha256(path)
        builders.append(InstructionBuilder(split, part, options, composer, sampler, preferences, length))
    if options.dry_run:
        for builder in builders:
            _preview(builder)
        return
    folder = dataset.folder / "instructions" / _folder_name(options)
    with staged_folder(folder, overwrite=options.overwrite) as staging:
        for builder in builders:
            write_rows(staging / f"{builder.part}.parquet", builder.rows())
        manifest = {
            "protocol": split.protocol,
            "split_hash": split.split_hash,
            "data_hash": dataset.data_hash,
            "settings": settings_of(options),
            "texts": sources,
            "unusable_images": images.unusable,
            "counts": {builder.part: dict(sorted(builder.counts.items())) for builder in builders},
            "files": {path.name: describe_file(path) for path in sorted(staging.glob("*.parquet"))},
            "run": describe_run(),
        }
        write_json(staging / "manifest.json", manifest)
    for builder in builders:
        counts = builder.counts
        print(
            f"{folder / builder.part}.parquet: {counts['rows']:,} rows of {counts['users']:,} users, "
            f"{counts['positives']:,} yes and {counts['negatives']:,} no"
        )
        for what in (
            "users_without_summary",
            "negatives_missing",
            "history_items_left_out",
            "rows_without_image",
        ):
            if counts[what]:
                print(f"  {what.replace('_', ' ')}: {counts[what]:,}")
    for item, reason in list(images.unusable.items())[:_SHOWN]:
        print(f"  no image of {item}: {reason}")


def _check(options: InstructionOptions) -> None:
    if options.negatives < 0 or options.history < 0 or options.targets_per_user < 0:
        raise DataError("--negatives, --history and --targets-per-user: expected 0 or more")
    if not (options.target_image or options.target_text):
        raise DataError("--no-target-image and --no-target-text together leave nothing of the target")
    if options.max_prompt_tokens is not None and options.processor is None:
        raise DataError("--max-prompt-tokens needs --processor, the model whose tokens are meant")
    if options.candidates is not None and set(options.parts) == {"train"}:
        raise DataError("--candidates are for the valid and test parts; training negatives are sampled")


def _folder_name(options: InstructionOptions) -> str:
    held_out = "" if "train" in options.parts else "-" + "-".join(options.parts)
    name = options.name or f"{options.split}-{options.form}{held_out}"
    if Path(name).name != name or name.startswith("."):
        raise DataError(f"--name {name!r}: expected a plain folder name")
    return name


def _composer(
    dataset: Dataset, options: InstructionOptions, images: ImageCheck
) -> tuple[Composer, dict[str, str]]:
    """Returns what writes the chats, and the hashes of the texts that it reads."""
    sources: dict[str, str] = {}

    def texts(name: str, needed: bool) -> list[str]:
        path = text_path(dataset.folder, name, options.tag)
        if not needed:
            return []
        read = read_item_texts(path, dataset)
        sources[path.name] = sha256(path)
        return read

    cot = options.form == "cot"
    summaries = texts("imsg", cot or (options.history > 0 and options.history_as == "summary"))
    composer = Composer(
        images.catalog,
        load_templates(TEMPLATES, options.templates),
        options,
        texts("viu", cot),
        summaries,
        images,
    )
    return composer, sources


def _preview(builder: InstructionBuilder) -> None:
    rows = list(islice(builder.rows(), 200))
    for row in rows[:_SHOWN]:
        print(f"--- {builder.part}: {row['id']} (label {row['label']}, images {row['images']})")
        chat = Chat(tuple(row["prompt"]), tuple(row["images"]), ())
        if builder.length is not None:
            print(builder.length.text(row["id"], chat))
        else:
            print(orjson.dumps(row["prompt"], option=orjson.OPT_INDENT_2).decode())
        print(f"--- completion: {row['completion'][0]['content'][0]['text']}")
    if builder.length is not None and rows:
        lengths = [
            builder.length.of(row["id"], Chat(tuple(row["prompt"]), tuple(row["images"]), ())) for row in rows
        ]
        print(
            f"{builder.part}: prompts of {min(lengths):,} to {max(lengths):,} tokens, "
            f"{sum(lengths) / len(lengths):,.0f} on average (first {len(rows):,} rows)"
        )


def settings_of(options: InstructionOptions) -> dict[str, Any]:
    """Returns the options that decide the rows, for the manifest."""
    left_out = ("dataset", "name", "overwrite", "dry_run", "templates")
    return {key: value for key, value in asdict(options).items() if key not in left_out}
