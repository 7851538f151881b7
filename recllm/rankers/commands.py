"""What the `recllm score ...` commands do: fit a ranker on a split's training part, write its scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from recllm.data.candidate_files import read_candidates
from recllm.data.candidates import Mask, full_ranking
from recllm.data.splits import Split
from recllm.evaluation.coverage import Pool
from recllm.evaluation.score_files import ScoreFiles, check_pool
from recllm.rankers.models.popularity import Popularity
from recllm.rankers.pools import items_with_all


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
    pool: Pool = "all"
    """all: the catalog. covered: items with content alone are candidates and targets, as in the same pool of
    other systems; --covered-by says which these are. cold: items without a training interaction alone."""
    covered_by: tuple[str, ...] = ()
    """Texts (names as --texts of `recllm score profile` takes them) and files of vectors (.npy,
    .safetensors); an item with content in all of them is in the pool `covered`."""
    feature_order: str | None = None
    """Which item each row of a .npy file in --covered-by belongs to (see recipes/train_ranker.py)."""
    top_k: int = 0
    """For full ranking: also write each target's best so many items to topk/popularity.parquet, for a second
    stage; 0 for none."""
    out: Path = Path()
    """Folder for scores/popularity.parquet or ranks/popularity.parquet."""
    overwrite: bool = False
    """Replace the files where they exist."""


def popularity(options: PopularityOptions) -> Path:
    """Fits popularity on the training part; writes its scores or rank records and returns the file.

    Raises:
        DataError: A file exists, or all items are equally popular.
    """
    check_pool(options.pool, options.top_k)
    files = ScoreFiles(options, "popularity")
    split = Split.open(options.split)
    model = Popularity(split)
    members = items_with_all(split.dataset, options.covered_by, options.feature_order)
    pool: dict[str, Any] = {"pool": options.pool, "members": members}
    if files.full:
        ranking = full_ranking(split, options.part, mask=options.mask)
        return files.write_ranks(ranking, lambda _: model.score_lists, split, **pool)
    candidates = read_candidates(split, options.candidates, options.part)
    return files.write_scores(candidates, model.score, split, **pool)
