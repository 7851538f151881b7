"""REVEAL's initial prompts, where feedback-guided extraction starts (arXiv 2606.09082, section 4.3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import orjson
import polars as pl

from recllm.builders.catalog import Catalog
from recllm.builders.histories import training_reviews
from recllm.builders.options import ImagePromptOptions, check_least, check_plain
from recllm.builders.texts import check_free, describe_template
from recllm.config import refuse_given
from recllm.data.dataset import Dataset
from recllm.data.splits import Split
from recllm.data.texts import text_path
from recllm.files import write_file
from recllm.prompts import TEMPLATES
from recllm.prompts.reveal import INITIAL, review_keywords
from recllm.prompts.templates import Template, load_templates

KEYWORD_LIMIT = 40


def initial_prompts(
    split: Split, count: int = 5, template: Template = INITIAL
) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (item id, prompt, keywords) for each item, in the order of the items table.

    The released code counts the words of reviews of all parts, and its feedback comes from test lists; here
    only training reviews are read. Like it, and unlike one sentence of the paper, prompts are per item.

    Args:
        split: The split; its training part is read.
        count: Keywords an item.
        template: The prompt.
    """
    catalog = Catalog(split.dataset)
    reviews = training_reviews(split)
    upcoming = next(reviews, None)
    for code, item in enumerate(catalog.ids):
        keywords: list[str] = []
        if upcoming is not None and upcoming[0] == code:
            keywords = [catalog.safe(word, KEYWORD_LIMIT) for word in review_keywords(upcoming[1], count)]
            upcoming = next(reviews, None)
        category = catalog.narrowest_category(code)
        values = {
            "category": category or "product",
            "item": category or "item",
            "title": catalog.title(code) or "unknown",
            "keywords": ", ".join(keywords) or "nothing yet",
        }
        yield item, template.fill(values), keywords


def write_initial_prompts(options: ImagePromptOptions) -> None:
    """Writes `id, text, keywords` to DATASET/texts/reveal-prompts.parquet or `out`; or prints the first ones.

    Raises:
        DataError: The split is missing, or the file exists.
    """
    check_plain("--tag", options.tag)
    check_plain("--split", options.split)
    check_least(1, keywords=options.keywords)
    if options.out is not None:
        refuse_given(options, ("tag",), "with --out. Leave it out")
    dataset = Dataset.open(options.dataset)
    split = Split.open(dataset.folder / "splits" / options.split, dataset=dataset)
    template = load_templates(TEMPLATES, options.templates)[INITIAL.name]
    prompts = initial_prompts(split, options.keywords, template)
    if options.dry_run:
        for item, prompt, _ in itertools.islice(prompts, 3):
            print(f"--- {item}\n{prompt}")
        return
    path = options.out or text_path(dataset.folder, "reveal-prompts", options.tag)
    check_free(path, overwrite=options.overwrite)
    schema = {"id": pl.String, "text": pl.String, "keywords": pl.List(pl.String)}
    table = pl.DataFrame(list(prompts), schema=schema, orient="row")
    facts = {
        "data_hash": dataset.data_hash,
        "split": split.protocol,
        "split_hash": split.split_hash,
        "part": "train",
        "keywords": options.keywords,
        "templates": {template.name: describe_template(template)},
    }
    metadata = {"recllm.prompts": orjson.dumps(facts).decode()}
    write_file(path, lambda temporary: table.write_parquet(temporary, metadata=metadata))
    without = int((table["keywords"].list.len() == 0).sum())
    print(f"{path}: {len(table):,} prompts, {without:,} of them of items without training reviews")
