"""The Yelp open dataset: businesses, reviews, users and photos as JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data.image_files import is_inside, is_plain_file
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import join_columns
from recllm.data.raw.json_lines import scan_json_lines
from recllm.data.raw.tables import RawDataset, RawTable, find_file
from recllm.data.raw.values import Record, as_flag, as_id, as_number, as_text, as_texts, as_whole
from recllm.data.readers.options import ImportOptions
from recllm.errors import DataError

TEXT, NUMBER = pl.String(), pl.Float64()
BUSINESS = {
    "item": TEXT,
    "title": TEXT,
    "categories": pl.List(pl.String()),
    "address": TEXT,
    "city": TEXT,
    "state": TEXT,
    "postal_code": TEXT,
    "latitude": NUMBER,
    "longitude": NUMBER,
    "stars": NUMBER,
    "is_open": pl.Int64(),
}
REVIEW = {
    "user": TEXT,
    "item": TEXT,
    "timestamp": TEXT,
    "rating": NUMBER,
    "review": TEXT,
    "review_id": TEXT,
    "useful": pl.Int64(),
    "funny": pl.Int64(),
    "cool": pl.Int64(),
}
USER = {"user": TEXT, "name": TEXT, "yelping_since": TEXT}
COMMA_NAMES = (
    "Beer, Wine & Spirits",
    "Books, Mags, Music & Video",
    "Used, Vintage & Consignment",
    "Wills, Trusts, & Probates",
)
"""The names among Yelp's categories that hold commas."""
_ASIDE = "\ue000"
PHOTO = {"photo": TEXT, "item": TEXT, "caption": TEXT, "label": TEXT}


@dataclass
class Yelp(ImportOptions):
    """Imports a folder with Yelp's JSON files, and photos where there are any.

    Read are `*business.json`, `*review.json`, and where there are any `*user.json` and `photos.json`. Items
    are businesses. Their `stars` are the mean over all reviews, later ones included, so a model must not see
    them in training. Photos belong to businesses; their captions and labels are the extra columns
    `photo_captions` and `photo_labels`, in the order of `images`.
    """

    photos: Path | None = None
    """Folder with `<photo_id>.jpg`; by default `photos` in SOURCE or beside `photos.json`."""
    photo_labels: tuple[str, ...] = ()
    """Keep only photos with one of these labels (food, drink, inside, outside, menu); by default all."""
    max_photos: int | None = None
    """Keep at most so many photos of a business, in the order of photos.json."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the files that the folder holds."""
        reviews = find_file(self.source, "*review.json", "*review.json.gz", what="Yelp review file")
        businesses = find_file(self.source, "*business.json", "*business.json.gz", what="Yelp business file")
        raw = RawDataset(
            RawTable(reviews, scan_json_lines(reviews, _review, REVIEW, findings, workspace)),
            RawTable(businesses, scan_json_lines(businesses, _business, BUSINESS, findings, workspace)),
        )
        users = sorted([*self.source.glob("*user.json"), *self.source.glob("*user.json.gz")])
        if users:
            raw.users = RawTable(users[0], scan_json_lines(users[0], _user, USER, findings, workspace))
        listing = self._photo_listing()
        if listing is not None:
            self._add_photos(raw, listing, findings, workspace)
        elif self.photos is not None:
            raise DataError(
                f"{self.source}: --photos needs photos.json, which says whose photos they are; none is there"
            )
        return raw

    def _photo_listing(self) -> Path | None:
        folders = [self.source, self.source / "yelp_photos"]
        if self.photos is not None:
            folders += [self.photos, self.photos.parent]
        found = (folder / name for folder in folders for name in ("photos.json", "photo.json"))
        return next((path for path in found if path.is_file()), None)

    def _add_photos(self, raw: RawDataset, listing: Path, findings: Findings, workspace: Path) -> None:
        beside = (self.source / "photos", listing.parent / "photos")
        folder = self.photos or next((path for path in beside if path.is_dir()), None)
        if folder is None:
            findings.note(
                f"{listing.name} is there, but no folder `photos` with the files: no images were imported"
            )
            return
        if not folder.is_dir():
            raise DataError(f"--photos {folder} is not a folder; expected the Yelp photos")
        photos = scan_json_lines(listing, _photo, PHOTO, findings, workspace).collect()
        if self.photo_labels:
            photos = photos.filter(pl.col("label").is_in(list(self.photo_labels)))
        names = [f"{photo}.jpg" for photo in photos["photo"]]
        inside = pl.Series([is_inside(name) and "/" not in name for name in names], dtype=pl.Boolean)
        outside = [
            f"item {item!r}: {photo!r}" for photo, item in photos.filter(~inside)["photo", "item"].rows()
        ]
        findings.drop("image paths that leave the image folder", len(outside), outside)
        there = pl.Series(
            [ok and _has_content(folder / name) for ok, name in zip(inside, names, strict=True)],
            dtype=pl.Boolean,
        )
        missing = photos.filter(inside & ~there)
        shown = [f"item {item!r}: '{photo}.jpg'" for photo, item in missing["photo", "item"].head(5).rows()]
        findings.drop("image files that are missing or empty", len(missing), shown)
        photos = photos.filter(there).unique("photo", keep="first", maintain_order=True)
        by_item = photos.group_by("item", maintain_order=True).agg(
            images=pl.format("{}.jpg", "photo"),
            photo_captions=pl.col("caption").fill_null(""),
            photo_labels=pl.col("label").fill_null(""),
        )
        if self.max_photos is not None:
            by_item = by_item.with_columns(pl.col(pl.List).list.head(self.max_photos))
        join_columns(raw, by_item, findings)
        raw.image_folder = folder


def _has_content(path: Path) -> bool:
    return is_plain_file(path) and path.stat().st_size > 0


def _review(content: Record) -> dict[str, Any]:
    if isinstance(votes := content.get("votes"), dict):  # the releases up to 2017
        content.update({name: votes.get(name) for name in ("useful", "funny", "cool")})
    return {
        "user": as_id(content["user_id"]),
        "item": as_id(content["business_id"]),
        "timestamp": content.take(as_text, "date"),
        "rating": content.take(as_number, "stars"),
        "review": content.take(as_text, "text"),
        "review_id": content.take(as_text, "review_id"),
        **{name: content.take(as_whole, name) for name in ("useful", "funny", "cool")},
    }


def _business(content: Record) -> dict[str, Any]:
    if "full_address" in content:  # the releases up to 2017
        content.setdefault("address", content["full_address"])
    is_open = content.take(as_flag, "is_open", "open")
    return {
        "item": as_id(content["business_id"]),
        "title": content.take(as_text, "name"),
        "categories": content.take(_categories, "categories", empty=[]),
        **{name: content.take(as_text, name) for name in ("address", "city", "state", "postal_code")},
        **{name: content.take(as_number, name) for name in ("latitude", "longitude", "stars")},
        "is_open": None if is_open is None else int(is_open),
    }


def _categories(value: Any) -> list[str]:
    """Names as a list (before 2018) or as one text, in which some names hold commas themselves."""
    if not isinstance(value, str):
        return as_texts(value)
    for name in COMMA_NAMES:
        value = value.replace(name, name.replace(",", _ASIDE))
    names = (name.replace(_ASIDE, ",").strip() for name in value.split(","))
    return [name for name in names if name]


def _user(content: Record) -> dict[str, Any]:
    return {
        "user": as_id(content["user_id"]),
        "name": content.take(as_text, "name"),
        "yelping_since": content.take(as_text, "yelping_since"),
    }


def _photo(content: Record) -> dict[str, Any]:
    return {
        "photo": as_id(content["photo_id"]),
        "item": as_id(content["business_id"]),
        "caption": content.take(as_text, "caption"),
        "label": content.take(as_text, "label"),
    }
