"""The prompts of a run: those of `recllm build items`, one or two an item, and which items are held out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recllm.builders.catalog import Catalog, ImageCheck
from recllm.builders.items import image_requests, text_requests
from recllm.builders.tasks import CHOOSE
from recllm.data.dataset import Dataset
from recllm.data.instructions import InstructionPart, check_trained_on, open_part, rows_of_task
from recllm.data.texts import CATALOG, ItemTexts, item_texts
from recllm.errors import DataError
from recllm.mllm.chat import Request, Result
from recllm.mllm.rendering import count_tokens, expand, render
from recllm.mllm.scoring.prompts import messages_of
from recllm.mllm.vision.images import image_size
from recllm.processes import rank
from recllm.progress import Progress
from recllm.prompts import TEMPLATES
from recllm.prompts.templates import Template, load_templates
from recllm.training.grpo.options import GRPOOptions
from recllm.training.rewards import Source

if TYPE_CHECKING:
    import datasets

    from recllm.mllm.loading import LoadedModel

_NUMBERED_LINE = re.compile(r"^(\d+)\. ", re.MULTILINE)


@dataclass(frozen=True)
class Rows:
    """The prompts.

    Attributes:
        dataset: Where the items are from.
        catalog: The items, as prompts show them.
        train: Prompts that are trained on.
        valid: Prompts of the held-out items.
        templates: The templates that wrote them.
        unusable: Why an item's image cannot be shown, by item id.
        tokens: The shortest and the longest prompt, images included.
        others: For each item with an image, the image of another one.
    """

    dataset: Dataset
    catalog: Catalog
    train: list[Source]
    valid: list[Source]
    templates: list[Template]
    unusable: dict[str, str]
    tokens: tuple[int, int]
    others: dict[str, str]

    def request(self, source: Source) -> Request:
        """Returns a prompt as backends take it."""
        return Request(
            source.id, source.messages, tuple(self.dataset.folder / each for each in source.images)
        )


def read_rows(options: GRPOOptions, loaded: LoadedModel) -> Rows:
    """Writes the prompts of all items, as `recllm build items` would, and holds some items out.

    Items whose image cannot be decoded have no image prompt.

    Raises:
        DataError: There is no such dataset or texts, no item is left to train on, or a prompt is too long.
    """
    if options.task == "choose":
        return _choices(options, loaded)
    assert options.dataset is not None
    dataset = Dataset.open(options.dataset)
    catalog = Catalog(dataset, loaded.special_tokens)
    templates = load_templates(TEMPLATES, options.templates)
    check = ImageCheck(catalog)
    references = _references(options, dataset)
    sources = [
        replace(source, reference=references(source))
        for source in _sources(options, dataset, catalog, templates, check)
    ]
    held = _held_out(sources, options.valid_items, options.seed)
    train = [source for source in sources if source.item not in held]
    valid = [source for source in sources if source.item in held]
    if not train or not valid:
        raise DataError(
            f"{options.dataset}: {len({source.item for source in sources}):,} items have a prompt, of which "
            f"--valid-items {options.valid_items} are held out: nothing is left to train on"
        )
    rows = Rows(
        dataset,
        catalog,
        train,
        valid,
        _templates(options, templates),
        check.unusable,
        (0, 0),
        _other_images(sources, options.seed),
    )
    return replace(rows, tokens=_check_budget(options, loaded, rows))


def open_parts(options: GRPOOptions) -> tuple[InstructionPart, InstructionPart]:
    """Opens the training and the validation rows of `--task choose`.

    Raises:
        DataError: They are of different splits, or the weights to start from learned from another one.
    """
    assert options.instructions is not None
    train, valid = (open_part(options.instructions, part) for part in ("train", "valid"))
    for weights in (options.model, options.adapter):
        check_trained_on(weights, train, allow_other_split=False)
    return train, valid


def _choices(options: GRPOOptions, loaded: LoadedModel) -> Rows:
    """Reads the choices among candidates: training rows, and validation rows in place of held-out items."""
    train, valid = open_parts(options)
    dataset = Dataset.open(train.dataset)
    held = _choice_sources(valid, options)
    places = np.unique(np.linspace(0, len(held) - 1, min(options.valid_items, len(held))).round().astype(int))
    rows = Rows(
        dataset,
        Catalog(dataset, loaded.special_tokens),
        _choice_sources(train, options)[: options.limit],
        [held[place] for place in places],
        [],
        {},
        (0, 0),
        {},
    )
    return replace(rows, tokens=_check_budget(options, loaded, rows))


def _choice_sources(part: InstructionPart, options: GRPOOptions) -> list[Source]:
    table = rows_of_task(pl.scan_parquet(part.path, glob=False), CHOOSE)
    rows = table.select("id", "target", "prompt", "completion", "images").collect().to_dicts()
    if not rows:
        raise DataError(
            f"{part.path} has no rows of the task choose; build them with `recllm build instructions --form "
            "mmsrarec --tasks yes_no choose`"
        )
    return [_choice_source(row, part, options) for row in rows]


def _choice_source(row: Mapping[str, Any], part: InstructionPart, options: GRPOOptions) -> Source:
    messages = messages_of(row)
    text = "\n".join(piece["text"] for piece in messages[-1]["content"] if piece["type"] == "text")
    said = "".join(piece["text"] or "" for turn in row["completion"] for piece in turn["content"]).strip()
    count = _candidates_in(text)
    if not said.isdecimal() or not 1 <= int(said) <= count:
        raise DataError(
            f"{part.path}, row {row['id']!r}: the answer {said!r} is not the number of one of the "
            f"{count} candidates that the prompt ends with"
        )
    images = tuple(row["images"])
    return Source(
        row["id"],
        row["target"],
        "image" if images else "text",
        messages,
        images,
        form="choice",
        right=int(said),
        candidates=count,
        picks=options.picks,
    )


def _candidates_in(text: str) -> int:
    """Returns how many lines the last numbered list of a prompt has."""
    numbers = [int(number) for number in _NUMBERED_LINE.findall(text)]
    start = max((place for place, number in enumerate(numbers) if number == 1), default=len(numbers))
    last = numbers[start:]
    return len(last) if last == list(range(1, len(last) + 1)) else 0


def as_dataset(sources: Sequence[Source], folder: Path) -> datasets.Dataset:
    """Returns prompts as TRL takes them: prompt, images (paths, no pixels) and row, its place in `sources`.

    They are put together as they are read: a table would give each part of a chat the keys of all parts.
    """
    import datasets

    def rows(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [sources[row] for row in batch["row"]]
        return {
            "prompt": [_copied(source.messages) for source in chosen],
            "images": [[str(folder / image) for image in source.images] for source in chosen],
            "row": list(batch["row"]),
        }

    return datasets.Dataset.from_dict({"row": list(range(len(sources)))}).with_transform(rows)


def _copied(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [dict(part) for part in turn["content"]]} for turn in messages]


def _sources(
    options: GRPOOptions,
    dataset: Dataset,
    catalog: Catalog,
    templates: Mapping[str, Template],
    check: ImageCheck,
) -> Iterator[Source]:
    codes = range(len(catalog))[: options.limit]
    form = "keywords" if options.task == "keywords" else "summary"
    code_of = {catalog.ids[code]: code for code in codes}
    with_image = [code for code in codes if check(code)]
    if options.task == "imsg":
        texts = ItemTexts.open(catalog.folder, options.visual, dataset, "recllm build items")
        told = ((catalog.ids[code], _as_answer(texts.texts[code])) for code in codes if texts.texts[code])
        requests = text_requests(catalog, codes, templates["mllm_srec.imsg"], told)
    elif options.task == "viu" or "image" in options.prompts:
        name = "mllm_srec.viu" if options.task == "viu" else "mmsrarec.image_keywords"
        prompt = templates[name].fill({}, catalog.special_tokens)
        for request in image_requests(catalog, with_image, lambda _: prompt):
            image = catalog.image(code_of[request.id])
            yield Source(f"{request.id}/image", request.id, "image", request.messages, (image,), form=form)
        requests = iter(())
        if options.task == "keywords" and "text" in options.prompts:
            requests = text_requests(catalog, codes, templates["mmsrarec.text_keywords"])
    else:
        requests = text_requests(catalog, codes, templates["mmsrarec.text_keywords"])
    for request in requests:
        fields = catalog.fields(code_of[request.id])
        shown = " ".join(fields.values())
        yield Source(f"{request.id}/text", request.id, "text", request.messages, shown=shown, form=form)


def _as_answer(text: str) -> Result:
    return Result(b"", text, 0, 0, "stop")


def _templates(options: GRPOOptions, templates: Mapping[str, Template]) -> list[Template]:
    names = {"viu": ["mllm_srec.viu"], "imsg": ["mllm_srec.imsg"]}.get(
        options.task, [f"mmsrarec.{kind}_keywords" for kind in options.prompts]
    )
    return [templates[name] for name in names]


def _references(options: GRPOOptions, dataset: Dataset) -> Any:
    """Returns what gives a source's reference: of the catalog to text prompts alone, other texts to both."""
    texts = item_texts(dataset, options.reference)
    by_item = dict(zip(dataset.items["item"].to_list(), texts, strict=True))
    kinds = ("text",) if options.reference == CATALOG else ("text", "image")
    return lambda source: by_item[source.item].strip() if source.kind in kinds else ""


def _held_out(sources: Sequence[Source], count: int, seed: int) -> set[str]:
    """Draws the held-out items; the others are trained on."""
    items = list(dict.fromkeys(source.item for source in sources))
    order = np.random.default_rng([seed, 16]).permutation(len(items))
    return {items[place] for place in order[:count]}


def _other_images(sources: Sequence[Source], seed: int) -> dict[str, str]:
    """Returns for each item with an image that of the next one in a random order."""
    shown = {source.item: source.images[0] for source in sources if source.images}
    order = np.random.default_rng([seed, 17]).permutation(len(shown))
    items = [list(shown)[place] for place in order]
    if len(items) < 2:
        return {}
    return {item: shown[other] for item, other in zip(items, items[1:] + items[:1], strict=True)}


def _check_budget(options: GRPOOptions, loaded: LoadedModel, rows: Rows) -> tuple[int, int]:
    """Counts every prompt's tokens before anything is trained: TRL cuts none, and runs out of memory instead.

    Returns:
        The shortest and the longest.
    """
    room = loaded.max_positions - options.max_new_tokens
    most = room if options.max_prompt_tokens is None else min(room, options.max_prompt_tokens)
    shortest, longest = room, 0
    sources = [*rows.train, *rows.valid]
    with Progress(sources, desc="prompts", unit="prompt", disable=rank() > 0, leave=False) as bar:
        for source in bar:
            request = rows.request(source)
            sizes = [image_size(path) for path in request.images]
            tokens = count_tokens(loaded, expand(loaded, render(loaded, request), sizes))
            if tokens > most:
                raise DataError(
                    f"{source.id}: its prompt has {tokens:,} tokens, images included; at most {most:,} are "
                    "allowed. Lower --max-pixels, or raise --max-prompt-tokens where the model takes more"
                )
            shortest, longest = min(shortest, tokens), max(longest, tokens)
    return shortest, longest
