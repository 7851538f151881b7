"""What the `recllm score ...` commands do: fit a ranker on a split's training part, write its scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from recllm.data.candidate_files import read_candidates
from recllm.data.candidates import Mask, full_ranking
from recllm.data.splits import Split
from recllm.evaluation import rank_catalog
from recllm.evaluation.ranks import refuse_equal_scores
from recllm.files import write_file
from recllm.rankers.popularity import Popularity
from recllm.retrieval.score_files import check_absent, check_top_k, tell_stage
from recllm.retrieval.top_k import write_stage


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
    split = Split.open(options.split)
    name = "popularity" if options.part == "test" else f"popularity-{options.part}"
    full = options.candidates == "full"
    check_top_k(options.top_k, full=full)
    path = options.out / ("ranks" if full else "scores") / f"{name}.parquet"
    lists = options.out / "topk" / f"{name}.parquet"
    check_absent(path, *([lists] if options.top_k else []), overwrite=options.overwrite)
    model = Popularity(split)
    if full:
        ranking = full_ranking(split, options.part, mask=options.mask)
        if options.top_k:
            write_stage(
                ranking, model.score_lists, options.top_k, system="popularity", ranks=path, lists=lists
            )
            tell_stage(path, lists)
        else:
            rank_catalog(ranking, model.score_lists, system="popularity").save(path)
            print(f"{path}: rank records; next: recllm eval ranks {path}")
        return path
    candidates = read_candidates(split, options.candidates, options.part)
    scores = model.score(candidates.frame)
    refuse_equal_scores(candidates.frame, scores, "popularity", path)
    metadata = {"recllm.protocol": candidates.protocol, "recllm.system": "popularity"}
    write_file(path, lambda temporary: scores.write_parquet(temporary, metadata=metadata))
    print(f"{path}: scores; next: recllm eval ranks {path} --candidates {candidates.path}")
    return path
