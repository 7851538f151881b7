"""What `recllm score ranker` and eval/score_ranker.py do: a trained ranker's scores or rank records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tyro.conf import Positional, arg

from recllm.data.candidate_files import read_candidates
from recllm.data.candidates import Mask, full_ranking
from recllm.evaluation.coverage import Pool
from recllm.evaluation.full_ranking import Scores
from recllm.evaluation.score_files import ScoreFiles, check_pool


@dataclass
class ScoreRankerOptions:
    """Scores with a ranker that recipes/train_ranker.py has trained."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """The run's folder."""
    split: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """DATASET/splits/NAME, where it is not where it was in training."""
    text: str | None = None
    """Text features, where they are not where they were in training (see recipes/train_ranker.py)."""
    image: str | None = None
    """Image features, where they are not where they were in training."""
    feature_order: str | None = None
    """Which item each row of a .npy file belongs to, where that differs from training (see
    recipes/train_ranker.py)."""
    without: Literal["text", "image"] | None = None
    """Leaves a modality out that the ranker was trained with: it is zero after its projection, in what users
    have taken and in the candidates."""
    candidates: str = "full"
    """Name of the split's candidates (such as 1+20-uniform-seed42): writes scores. full: ranks the whole
    catalog and writes rank records."""
    part: Literal["valid", "test"] = "test"
    """Which targets to rank."""
    mask: Mask = "seen"
    """For full ranking, what is no candidate: seen (training, validation at test time), train, none."""
    graph: Literal["known", "training"] = "training"
    """What rankers over a graph of interactions propagate over. training: training interactions alone, as
    MMRec and RecBole do. known: also what else is known of each user before the first of the user's targets;
    a sequence ranker reads that of the user alone, so that the two are not on a par (ours). On a split that
    is not in time, both graphs hold training interactions that are later than targets."""
    pool: Pool = "all"
    """all: an item without content scores as one of its list's candidates with content, drawn at random, so
    that covering less gains nothing. covered: only items with content are candidates and targets, which is
    a protocol of its own. cold: only items without a training interaction are.
    Only rankers that know items by their content alone (UniSRec, MISSRec with --no-transductive,
    profile_fusion) lack any."""
    covered_by: tuple[str, ...] = ()
    """For --pool covered: texts (names as --texts of `recllm score profile` takes them) and files of vectors
    (.npy, .safetensors); the pool holds the items with content in all of them. By default those that the
    ranker has content for."""
    top_k: int = 0
    """For full ranking: also write each target's best so many items to topk/, for a second stage; 0 for
    none."""
    name: str | None = None
    """Name of the system and its files; by default the name of the run's folder, with `-without-text` or
    `-without-image` where that is left out."""
    out: Path = Path()
    """Folder for scores/, ranks/ and topk/."""
    overwrite: bool = False
    """Replace the files where they exist."""


def score_ranker(options: ScoreRankerOptions) -> Path:
    """Writes a ranker's scores or rank records, and returns the file.

    Raises:
        DataError: The run, its split or its features are missing or others than in training, a file exists,
            the modality to leave out is not one of the run's, or the ranker scores all candidates alike.
    """
    from recllm.rankers.pools import items_with_all
    from recllm.rankers.ranking import check_left, items_with_content, score_candidates, user_states
    from recllm.rankers.run_folder import LEAKY, load_run

    check_pool(options.pool, options.top_k)
    without = () if options.without is None else (options.without,)
    own_name = "-without-".join([options.run.resolve().name, *without])
    files = ScoreFiles(options, options.name or own_name)
    known = options.part if options.graph == "known" else None
    ranker, run, _ = load_run(
        options.run,
        options.split,
        text=options.text,
        image=options.image,
        feature_order=options.feature_order,
        known_before=known,
    )
    check_left(ranker, run.data, options.run, without)
    members = items_with_all(run.split.dataset, options.covered_by, options.feature_order)
    if run.data.user_features is not None and run.data.user_features.leak:
        print(LEAKY)
    facts = {
        **{"weights": [str(options.run)], "pool": options.pool, "members": members},
        **{"without": options.without},
        **{"present": items_with_content(ranker, run.data, without=without)},
        **({} if run.data.user_features is None else {"user_texts": run.data.user_features.facts}),
    }
    if files.full:
        ranking = full_ranking(run.split, options.part, mask=options.mask)

        def score(users: np.ndarray) -> Scores:
            states = user_states(ranker, run.data, run.split, options.part, users, without=without)
            return states.for_ranking()

        return files.write_ranks(ranking, score, run.split, **facts)
    candidates = read_candidates(run.split, options.candidates, options.part)
    return files.write_scores(
        candidates,
        lambda frame: score_candidates(ranker, run.data, run.split, options.part, frame, without=without),
        run.split,
        **facts,
    )
