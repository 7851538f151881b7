"""A small dataset with images, candidates, prompts and scores, and a reader of the page that came of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from recllm.builders.instructions import build_instructions
from recllm.builders.options import InstructionOptions
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.dataset import write_dataset
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.report.commands import report
from recllm.report.options import ReportOptions

PROTOCOL = "loo/1+20-uniform-seed42"
USERS, ITEMS = 40, 60


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    root: Path
    split: Split
    candidates: Path

    @property
    def dataset(self) -> Path:
        return self.root / "shop"

    @property
    def instructions(self) -> Path:
        return self.dataset / "instructions" / "asked"

    def rows(self) -> pl.DataFrame:
        return pl.read_parquet(self.candidates)

    def scores(
        self, name: str, skill: float, *, seed: int = 0, probability: bool = True, system: str = ""
    ) -> Path:
        """Writes scores: normal noise, plus `skill` for the positive."""
        rng = np.random.default_rng(seed)
        rows = self.rows()
        margin = rng.normal(size=rows.height) + skill * rows["label"].to_numpy()
        frame = rows.select("user", "target", "item").with_columns(score=pl.Series(margin.astype(np.float32)))
        if probability:
            mass = pl.Series(rng.uniform(0, 0.1, rows.height).astype(np.float32))
            frame = frame.with_columns(probability=(1 / (1 + (-pl.col("score")).exp())), outside=mass)
        path = self.root / "scores" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        frame.write_parquet(path, metadata={"recllm.protocol": PROTOCOL, "recllm.system": system or name})
        return path

    def run(self, name: str = "tiny", **changes: Any) -> Path:
        """Writes a run folder; `changes` replace its files by name."""
        folder = self.root / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        log = [{"step": step, "loss": 1 / step} for step in range(1, 61)]
        log += [
            {"step": step, "valid_auc": 0.5 + step / 200, "valid_ndcg@10": 0.3} for step in (0, 20, 40, 60)
        ]
        files = {
            "log.jsonl": "".join(json.dumps(line) + "\n" for line in log),
            "metrics.json": json.dumps({"best_step": 40, "valid": {"auc": 0.7012, "outside": 0.01}}),
            "manifest.json": json.dumps(
                {
                    "kind": "sft run",
                    "settings": {"model": "tiny", "method": "qlora"},
                    "parts": [["language model", 1000, 100], ["vision tower", 500, 0]],
                    "run": {"command": ["sft.py"], "time": "2026-01-01T00:00:00Z", "recllm": "0.1.0"},
                }
            ),
        }
        for file, content in {**files, **changes}.items():
            (folder / file).write_text(content)
        return folder

    def report(self, *files: Path, out: str = "out", **options: Any) -> Path:
        """Makes a report with few resamples; gives the candidates unless told otherwise."""
        given = {"candidates": self.candidates, "resamples": 200, **options}
        return report(ReportOptions(files=files, out=self.root / out, overwrite=True, **given))


def make_world(
    root: Path, *, titles: dict[int, str] | None = None, user_ids: dict[int, str] | None = None
) -> World:
    """Writes the world; `titles` and `user_ids` replace those of some items and users."""
    rng = np.random.default_rng(0)
    titles, user_ids = titles or {}, user_ids or {}
    items = [f"i{code:02d}" for code in range(ITEMS)]
    users = [user_ids.get(code, f"u{code:02d}") for code in range(USERS)]
    log = [
        (users[user], items[item], 1_600_000_000 + 86_400 * at)
        for user in range(USERS)
        for at, item in enumerate(rng.permutation(ITEMS)[: 4 + user % 9])
    ]

    def stage(folder: Path) -> None:
        (folder / "images").mkdir()
        for code, item in enumerate(items[:-2]):
            color = tuple(int(part) for part in rng.integers(0, 255, 3))
            Image.new("RGB", (200 + code, 150), color).save(folder / "images" / f"{item}.png")
        (folder / "images" / f"{items[-2]}.png").write_bytes(b"<svg onload=alert(1)>")

    catalog = {
        "item": items,
        "title": [titles.get(code, f"Thing {code}") for code in range(ITEMS)],
        "images": [[f"images/{item}.png"] if item != items[-1] else [] for item in items],
    }
    dataset = write_dataset(
        root / "shop",
        items=pl.DataFrame(catalog),
        interactions=pl.DataFrame(log, schema=["user", "item", "timestamp"], orient="row"),
        users=pl.DataFrame({"user": users}),
        source={"made": "by a test"},
        stage=stage,
    )
    split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    folder = make_candidates(split, CandidateOptions(split.folder))
    build_instructions(
        InstructionOptions(
            dataset.folder,
            parts=("test",),
            preference="none",
            history=3,
            history_as="title",
            candidates=folder.name,
            target_image=False,
            name="asked",
        )
    )
    (dataset.folder / "texts").mkdir()
    texts = pl.DataFrame(
        {"id": items, "text": [f"A model says {item}." for item in items], "prompt_hash": "0" * 16}
    )
    facts = json.dumps({"data_hash": dataset.data_hash})
    texts.write_parquet(dataset.folder / "texts" / "imsg.parquet", metadata={"recllm.texts": facts})
    stale = json.dumps({"data_hash": "of another state"})
    texts.write_parquet(dataset.folder / "texts" / "viu.parquet", metadata={"recllm.texts": stale})
    return World(root, split, folder / "test.parquet")


class Page(HTMLParser):
    """What stands in a page: its text, its tables by id, its tags."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._section = ""
        self._table: list[list[str]] | None = None
        self._missing = False
        self.missing: dict[str, str] = {}
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "section":
            self._section = given["id"] or ""
        if given.get("class") == "table" and given.get("id"):
            self._table = self.tables.setdefault(given["id"] or "", [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("th", "td") and self._table is not None:
            self._table[-1].append("")
        self._missing = given.get("class") == "missing" or (self._missing and tag != "p")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table" and self._table is not None:
            self._table[:] = [[cell.strip() for cell in row] for row in self._table]
            self._table = None
        if tag == "p":
            self._missing = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._table and self._table[-1]:
            self._table[-1][-1] += data
        if self._missing:
            self.missing[self._section] = self.missing.get(self._section, "") + data
