"""What the `recllm score ...` commands do: fit a ranker on a split's training part, write its scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import polars as pl
from tyro.conf import Positional, arg

from recllm.data.candidates import Mask, full_ranking
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.evaluation import rank_catalog
from recllm.files import write_file
from recllm.rankers.popularity import Popularity


@dataclass
class PopularityOptions:
    """Scores items by their training interactions: the baseline that everything must beat."""

    split: Positional[Annotated[Path, arg(metavar="SPLIT")]]
    """The split folder (DATASET/splits/<name>)."""
    candidates: str = "full"
    """Name of the split's candidates (such as 1+20-uniform-seed42): writes scores. full: ranks the whole
    catalog and writes rank records."""
    part: Literal["valid", "test"] = "test"
    """Which targets to rank."""
    mask: Mask = "seen"
    """For full ranking, what is no candidate: seen (training, validation at test time), train, none."""
    out: Path = Path()
    """Folder for scores/popularity.parquet or ranks/popularity.parquet."""
    overwrite: bool = False
    """Replace that file where it exists."""


def popularity(options: PopularityOptions) -> Path:
    """Fits popularity on the training part; writes its scores or rank records and returns the file."""
    split = Split.open(options.split)
    name = "popularity" if options.part == "test" else f"popularity-{options.part}"
    full = options.candidates == "full"
    path = options.out / ("ranks" if full else "scores") / f"{name}.parquet"
    if path.exists() and not options.overwrite:
        raise DataError(f"{path} exists already; give another --out, or --overwrite to replace it")
    model = Popularity(split)
    if full:
        ranking = full_ranking(split, options.part, mask=options.mask)
        rank_catalog(ranking, model.score_lists, system="popularity").save(path)
        print(f"{path}: rank records; next: recllm eval ranks {path}")
        return path
    file = split.folder / "candidates" / options.candidates / f"{options.part}.parquet"
    if not file.exists():
        held = sorted(folder.name for folder in split.folder.glob("candidates/*") if folder.is_dir())
        known = ", ".join(held) or "none yet; make them with `recllm data candidates`"
        raise DataError(f"{file} does not exist; candidates of {split.folder}: {known}")
    scores = model.score(pl.read_parquet(file, glob=False))
    protocol = pl.read_parquet_metadata(file)["recllm.protocol"]
    metadata = {"recllm.protocol": protocol, "recllm.system": "popularity"}
    write_file(path, lambda temporary: scores.write_parquet(temporary, metadata=metadata))
    print(f"{path}: scores; next: recllm eval ranks {path} --candidates {file}")
    return path
