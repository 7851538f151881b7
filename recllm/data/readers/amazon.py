"""Amazon reviews of 2014, 2018 and 2023 as their authors ship them; the fields tell the generation."""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data.raw.anyfile import JSON, read_table, suffix_of
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import find_images, items_of, mapped
from recllm.data.raw.json_lines import scan_json_lines, scan_parquet_objects
from recllm.data.raw.lines import unpack
from recllm.data.raw.tables import LINE, RawDataset, RawTable, existing_file
from recllm.data.raw.values import (
    Record,
    as_flag,
    as_id,
    as_json,
    as_number,
    as_text,
    as_texts,
    as_whole,
)
from recllm.data.readers.options import ImportOptions
from recllm.errors import DataError

TEXT, TEXTS = pl.String(), pl.List(pl.String())
REVIEWS = {
    "user": TEXT,
    "item": TEXT,
    "timestamp": pl.Int64(),
    "rating": pl.Float64(),
    "review": TEXT,
    "summary": TEXT,
    "verified": pl.Boolean(),
    "helpful": pl.Int64(),
    "asin": TEXT,
    "parent_asin": TEXT,
    "style": TEXT,
    "image_urls": TEXTS,
}
ITEMS = {
    "item": TEXT,
    "title": TEXT,
    "text": TEXT,
    "categories": TEXTS,
    "brand": TEXT,
    "store": TEXT,
    "author": TEXT,
    "subtitle": TEXT,
    "price": TEXT,
    "main_category": TEXT,
    "details": TEXT,
    "image_urls": TEXTS,
}
SIZES = ("hi_res", "large", "thumb", "large_image_url", "medium_image_url", "small_image_url")
_2014 = {"user": "reviewerID", "item": "asin", "rating": "overall"}


@dataclass
class Amazon(ImportOptions):
    """Imports an Amazon review file of 2014, 2018 or 2023 with its metadata.

    Files may be .json.gz or .jsonl, .csv (reviews only) or .parquet, compressed or not. Items of the 2023
    files are `parent_asin`s. Image addresses are kept in the extra column `image_urls` and never fetched.
    What Amazon computed from everybody's later behavior (sales ranks, "also bought", mean ratings) is not
    taken over, for it would show the future to a model. HTML in texts stays as it is.
    """

    metadata: Path | None = None
    """The metadata file; by default `meta_<name>.*` beside the reviews, or in `../meta_categories`."""
    images: Path | None = None
    """Folder of item images, named by item id: `<item>.jpg`, `<item>_0.jpg`, ..."""
    variants: bool = False
    """Items are the variants (`asin`) of the 2023 files, with title and text of their `parent_asin`."""
    all_items: bool = False
    """Keep items of the metadata that nobody reviewed; a 5-core's metadata file holds the whole category."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads reviews and metadata."""
        existing_file(self.source, "the review file")
        reviews, generation = self._read_reviews(findings, workspace)
        raw = RawDataset(reviews, source={"generation": generation})
        metadata = self.metadata or find_metadata(self.source)
        if metadata is not None:
            existing_file(metadata, "the metadata file")
            raw.items = self._read_metadata(metadata, reviews, findings, workspace)
            raw.source["metadata"] = metadata.name
        else:
            findings.note(f"no metadata file (meta_*) beside {self.source.name}: items have no titles")
        if self.images is not None:
            find_images(raw, self.images)
        return raw

    def _read_reviews(self, findings: Findings, workspace: Path) -> tuple[RawTable, str]:
        suffix = suffix_of(self.source)
        if suffix not in (*JSON, ".parquet"):
            return self._read_csv(findings, workspace)
        seen: set[str] = set()

        def row(content: Record) -> dict[str, Any]:
            if "parent_asin" in content or "user_id" in content:
                seen.add("2023")
                return _review_2023(content, self.variants)
            seen.add("2018" if "verified" in content else "2014")
            return _review_2014(content)

        frame = _scan(self.source, row, REVIEWS, findings, workspace)
        if self.variants and seen and "2023" not in seen:
            raise DataError(f"{self.source}: --variants is for the files of 2023; these have no parent_asin")
        if frame.select(pl.len()).collect().item() == 0:
            told = "; ".join(findings.lines()[:2])
            raise DataError(f"{self.source}: no review could be read. {told}")
        return RawTable(self.source, _without_empty(frame, REVIEWS)), ", ".join(sorted(seen))

    def _read_csv(self, findings: Findings, workspace: Path) -> tuple[RawTable, str]:
        table = read_table(self.source, findings, workspace)
        found = [name for name in table.frame.collect_schema().names() if name != LINE]
        if {"user_id", "parent_asin"} <= set(found):
            key = "asin" if self.variants else "parent_asin"
            columns, generation = (
                {"user": "user_id", "item": key, "review": "text", "summary": "title"},
                "2023",
            )
            columns |= {"rating": "rating", "timestamp": "timestamp"}
            columns |= {"parent_asin": "parent_asin"} if self.variants else {}
        elif {"reviewerID", "asin"} <= set(found):
            columns, generation = {**_2014, "review": "reviewText", "timestamp": "unixReviewTime"}, "2014"
            if "unixReviewTime" not in found:
                columns["timestamp"] = "reviewTime"
        else:
            raise DataError(
                f"{self.source}: no column reviewerID or user_id; found: {', '.join(found)}. "
                "Files of ratings without a header line are for the reader of tables"
            )
        needed = ("user", "item", "parent_asin")
        columns = {name: source for name, source in columns.items() if source in found or name in needed}
        table = mapped(table, columns, "interactions")
        if generation == "2014" and "helpful" in found:
            # "[13, 14]": 13 of 14 votes say that the review helped.
            votes = pl.col("helpful").str.extract(r"^\[(\d+)").cast(pl.Int64)
            again = table.with_lines
            exactly = None if again is None else lambda: again().with_columns(votes)
            table = RawTable(table.path, table.frame.with_columns(votes), exactly)
        return table, generation

    def _read_metadata(self, path: Path, reviews: RawTable, findings: Findings, workspace: Path) -> RawTable:
        frame = _scan(path, _item, ITEMS, findings, workspace)
        total = frame.select(pl.len()).collect().item()
        frame = _without_empty(frame, ITEMS)
        ids = items_of(reviews, findings).frame
        if self.variants:
            pairs = reviews.frame.select("item", "parent_asin").unique(
                "item", keep="first", maintain_order=True
            )
            frame = pairs.join(
                frame, left_on="parent_asin", right_on="item", how="inner", maintain_order="left"
            )
        elif not self.all_items:
            frame = frame.join(ids, on="item", how="semi", maintain_order="left")
        items = frame.collect()
        distinct = items.unique("item", keep="first", maintain_order=True)
        if len(items) > len(distinct):
            findings.note(
                f"{path.name} repeats {len(items) - len(distinct):,} items; the first line of each counts"
            )
        if not self.all_items and not self.variants and total > len(items):
            unused = total - len(items)
            findings.note(
                f"{unused:,} of {total:,} lines of {path.name} are of items that nobody reviewed: not kept"
            )
        if len(distinct) == 0:
            example = ids.head(1).collect()["item"].to_list()
            raise DataError(
                f"{path} has no item of {self.source.name} (such as {example}); "
                "is it the right metadata file?"
            )
        return RawTable(path, distinct.lazy())


def find_metadata(reviews: Path) -> Path | None:
    """Returns the metadata file that belongs to a review file by its name, or None."""
    stem = _stem(reviews)
    stem = re.sub(r"(^reviews_|_reviews$)", "", re.sub(r"_\d+$", "", stem), flags=re.IGNORECASE)
    for folder in (reviews.parent, reviews.parent.parent / "meta_categories"):
        held = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [path for path in held if _stem(path).lower() == f"meta_{stem}".lower() and path.is_file()]
        if found:
            return found[0]
    return None


def _stem(path: Path) -> str:
    return re.sub(r"(\.(json|jsonl|csv|parquet|gz|bz2|xz|zip))+$", "", path.name, flags=re.IGNORECASE)


def _scan(
    path: Path,
    row: Callable[[Record], dict[str, Any]],
    types: dict[str, pl.DataType],
    findings: Findings,
    workspace: Path,
) -> pl.LazyFrame:
    if suffix_of(path) == ".parquet":
        return scan_parquet_objects(unpack(path, workspace), row, types, findings, workspace)
    return scan_json_lines(path, row, types, findings, workspace)


def _without_empty(frame: pl.LazyFrame, types: dict[str, pl.DataType]) -> pl.LazyFrame:
    """Drops the columns that this generation of files does not have."""
    counts = (
        frame.select(pl.col(name).count() for name in types).collect(engine="streaming").row(0, named=True)
    )
    return frame.drop(name for name, count in counts.items() if count == 0 and name not in ("user", "item"))


def _review_2014(content: Record) -> dict[str, Any]:
    """A review of 2014 or 2018."""
    timestamp = content.take(as_whole, "unixReviewTime")
    return {
        "user": as_id(content["reviewerID"]),
        "item": as_id(content["asin"]),
        "timestamp": _day(content.get("reviewTime")) if timestamp is None else timestamp,
        "rating": content.take(as_number, "overall"),
        "review": content.take(as_text, "reviewText"),
        "summary": content.take(as_text, "summary"),
        "verified": content.take(as_flag, "verified"),
        "helpful": content.take(_votes, "helpful", "vote"),
        "style": content.take(as_json, "style"),
        "image_urls": content.take(as_texts, "image", empty=[]) or None,
    }


def _review_2023(content: Record, variants: bool) -> dict[str, Any]:
    parent = as_id(content["parent_asin"])
    return {
        "user": as_id(content["user_id"]),
        "item": as_id(content["asin"]) if variants else parent,
        "timestamp": content.take(as_whole, "timestamp", "sort_timestamp"),
        "rating": content.take(as_number, "rating"),
        "review": content.take(as_text, "text"),
        "summary": content.take(as_text, "title"),
        "verified": content.take(as_flag, "verified_purchase"),
        "helpful": content.take(as_whole, "helpful_vote"),
        "asin": None if variants else content.take(as_text, "asin"),
        "parent_asin": parent if variants else None,
        "image_urls": content.take(_addresses, "images", empty=[]) or None,
    }


def _item(content: Record) -> dict[str, Any]:
    """A metadata line of any generation."""
    parts = content.take(as_texts, "description", empty=[]) + content.take(
        as_texts, "features", "feature", empty=[]
    )
    urls = content.take(as_texts, "imageURLHighRes", empty=[]) or content.take(
        as_texts, "imageURL", "imUrl", empty=[]
    )
    categories = content.take(as_texts, "categories", "category", empty=[])
    return {
        "item": as_id(content["parent_asin"] if "parent_asin" in content else content["asin"]),
        "title": content.take(as_text, "title"),
        "text": "\n".join(dict.fromkeys(part for part in parts if part.strip())),
        "categories": list(dict.fromkeys(categories)),
        "brand": content.take(as_text, "brand"),
        "store": content.take(as_text, "store"),
        "author": content.take(_author, "author"),
        "subtitle": content.take(as_text, "subtitle"),
        "price": content.take(as_text, "price"),
        "main_category": content.take(as_text, "main_category", "main_cat"),
        "details": content.take(as_json, "details"),
        "image_urls": urls or content.take(_addresses, "images", empty=[]) or None,
    }


def _addresses(images: Any) -> list[str]:
    """Returns the largest address of each image; images are a list of objects, or an object of lists."""
    if isinstance(images, dict):
        columns = {name: values for name, values in images.items() if isinstance(values, list)}
        count = max(map(len, columns.values()), default=0)
        images = [
            {name: values[place] for name, values in columns.items() if place < len(values)}
            for place in range(count)
        ]
    found = []
    for image in _as_list(images):
        if isinstance(image, dict):
            image = next((image[size] for size in SIZES if image.get(size)), None)
        found += as_texts(image)
    return found


def _as_list(value: Any) -> list[Any]:
    """A list as it is, None as an empty one, and anything else as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _votes(value: Any) -> int | None:
    """Helpful votes; 2014: `[helpful votes, votes]`."""
    return as_whole(value[0] if isinstance(value, list) and value else value)


def _author(value: Any) -> str | None:
    return as_text(value.get("name")) if isinstance(value, dict) else as_json(value)


def _day(text: Any) -> int | None:
    """Returns the first second of a day such as "09 4, 2015"; None where it is none."""
    try:
        return calendar.timegm(time.strptime(text, "%m %d, %Y"))
    except (TypeError, ValueError):
        return None
