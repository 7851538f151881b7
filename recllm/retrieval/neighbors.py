"""Similar users of a target's user, by the states of a sequence ranker (MMSRARec, arXiv 2512.20916, stage 2).

    e_u        = the ranker's state of user u after the items that precede the target
    sim(u, v)  = e_u . e_v / (|e_u| |e_v|)                       the cosine
    neighbors  = the k training users with the highest similarity
    retrieved  = the items that each neighbor interacted with next, after the history that e_v was made of

The knowledge base has the training interactions alone: a neighbor's state is that of a prefix of the training
interactions, and what came next is a training interaction, too. Nobody is a neighbor of herself. A query is
made of what precedes its target (`recllm.data.user_histories`).

Ours, where the paper does not say: every prefix of a training user is in the knowledge base, and the most
similar one speaks for its user (`base` "last" takes the last one alone); what came next must precede the
target in time (`time` "any" takes all training interactions, which may be later); similarities are compared
at a grid of 1e-6, and of equal ones the more recent is first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import polars as pl
from tyro.conf import arg

from recllm.data.neighbors import SCHEMA, Time, neighbors_path, write_neighbors
from recllm.data.ordering import places_in_time
from recllm.data.origins import read_made
from recllm.data.splits import Split
from recllm.data.tables import read_table
from recllm.data.user_histories import UserHistories
from recllm.errors import DataError
from recllm.evaluation.score_files import check_word
from recllm.retrieval.nearest import nearest_users

if TYPE_CHECKING:
    import torch

    from recllm.rankers.ranker import Ranker
    from recllm.rankers.training_data import TrainingData


@dataclass
class NeighborOptions:
    """Finds similar training users for each target, and what they chose next (MMSRARec, stage 2)."""

    run: Annotated[Path, arg(metavar="RUN")]
    """The run of a sequence ranker (recipes/train_ranker.py), for example SASRec's."""
    split: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """DATASET/splits/NAME, if it has moved since training."""
    text: str | None = None
    """Text features, if they have moved since training (see recipes/train_ranker.py)."""
    image: str | None = None
    """Image features, if they have moved since training."""
    feature_order: str | None = None
    """Which item each row of a .npy file belongs to, if that differs from training."""
    top_k: int = 3
    """Neighbors of a target; 3 in the paper. They are different users."""
    base: Literal["prefixes", "last"] = "prefixes"
    """The knowledge base. prefixes: every prefix of each training user's interactions; of one user's, the
    most similar counts. last: one prefix of each training user, which all but the last interactions make."""
    time: Time = "known"
    """known: only neighbors whose next item precedes the target in time. any: all training interactions of
    other users, which may be later than the target."""
    next_items: int = 1
    """Items of each neighbor, after the history that was compared; fewer if not all precede the target."""
    parts: tuple[Literal["train", "valid", "test"], ...] = ("train", "valid")
    """Whose targets to find neighbors for; the test part is only opened when it is named."""
    targets_per_user: int = 1
    """The latest training targets of a user; 0 for all. `recllm build instructions` must not ask for more."""
    name: str | None = None
    """Writes DATASET/neighbors/NAME.parquet; by default the name of the run's folder."""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class KnowledgeBase:
    """Prefixes of training users, and where what came next is.

    Attributes:
        users: User code of each; int64, shape [n].
        known: How many training interactions, from the user's first, make the prefix; shape [n].
        rows: Row numbers of all training interactions, by user and in time.
        next_at: Where in `rows` what came next begins; shape [n].
        next_to: Where the user's interactions end in `rows`; shape [n].
    """

    users: np.ndarray
    known: np.ndarray
    rows: np.ndarray
    next_at: np.ndarray
    next_to: np.ndarray


def knowledge_base(split: Split, base: Literal["prefixes", "last"], next_items: int = 1) -> KnowledgeBase:
    """Returns the prefixes of training users that something comes after.

    Args:
        split: The split.
        base: Every prefix, or each user's last: the one that `next_items` interactions follow, or as many as
            leave one for the prefix.
        next_items: As for `NeighborOptions`.
    """
    histories = UserHistories.of(split, "train")
    lengths = np.diff(histories.offsets)
    if base == "last":
        users = np.flatnonzero(lengths > 1)
        known = np.maximum(lengths[users] - next_items, 1)
    else:
        per = np.maximum(lengths - 1, 0)
        users = np.repeat(np.arange(len(lengths)), per)
        known = np.arange(len(users)) - np.repeat(np.cumsum(per) - per, per) + 1
    next_at = histories.offsets[:-1][users] + known
    return KnowledgeBase(users, known, histories.rows, next_at, histories.offsets[1:][users])


def find_neighbors(options: NeighborOptions) -> Path:
    """Writes DATASET/neighbors/NAME.parquet, and returns the file.

    Raises:
        DataError: The run is not one of a sequence ranker, its split or features are missing or have changed,
            the file exists, or the log has no times and `time` is "known".
    """
    from recllm.rankers.ranker import SequenceRanker
    from recllm.rankers.run_folder import load_run

    for flag, value in (("top_k", options.top_k), ("next_items", options.next_items)):
        if value < 1:
            raise DataError(f"--{flag.replace('_', '-')} {value}: expected 1 or more")
    if options.targets_per_user < 0:
        raise DataError(f"--targets-per-user {options.targets_per_user}: expected 0 (all) or more")
    if not options.parts or len(set(options.parts)) < len(options.parts):
        raise DataError("--parts: expected one or more of train, valid and test, each once")
    name = options.name or options.run.resolve().name
    check_word("--name", name)
    ranker, run, kind = load_run(
        options.run,
        options.split,
        text=options.text,
        image=options.image,
        feature_order=options.feature_order,
    )
    split = run.split
    if not isinstance(ranker, SequenceRanker):
        raise DataError(
            f"{options.run} is a run of {kind}, which has a vector for each user, not for each history; give "
            " the run of a sequence ranker (sasrec, gru4rec, and others)"
        )
    if options.time == "known" and not split.dataset.has_timestamps:
        raise DataError(
            f"{split.dataset.folder}: the log has no times, so what precedes a target among other users' "
            "interactions is not known; --time any takes all of their training interactions"
        )
    path = neighbors_path(split.dataset.folder, name)
    _check_free(path, options)
    base = knowledge_base(split, options.base, options.next_items)
    places = places_in_time(split.dataset.timestamps, len(split.dataset.user_codes))
    print(f"knowledge base: {len(base.users):,} histories of {len(np.unique(base.users)):,} training users")
    frames, counts = [], {}
    states = _states(ranker, run.data, split, "train", base.users, base.known)
    for part in options.parts:
        frame, targets = _of_part(options, ranker, run.data, split, part, base, states, places)
        frames.append(frame)
        found = frame.group_by("target_row").len()
        counts[part] = {"targets": targets, "with_neighbors": len(found)}
        mean = frame["similarity"].mean()
        print(
            f"{part}: {targets:,} targets, {targets - len(found):,} of them without a neighbor; "
            f"{len(frame):,} neighbors" + ("" if mean is None else f", mean similarity {mean:.3f}")
        )
    if not sum(map(len, frames)):
        raise DataError(f"{split.folder}: no target has a neighbor; is there more than one training user?")
    facts = {
        **{name: getattr(options, name) for name in ("top_k", "base", "time", "next_items")},
        **{"ranker": kind, "weights": [str(options.run)], "targets_per_user": options.targets_per_user},
    }
    write_neighbors(path, pl.concat(frames), split, parts=counts, **facts)
    print(
        f"{path}; next: recllm build instructions {split.dataset.folder} --split {split.folder.name} "
        f"--form mmsrarec --neighbors {name}"
    )
    return path


def _of_part(
    options: NeighborOptions,
    ranker: Ranker,
    data: TrainingData,
    split: Split,
    part: str,
    base: KnowledgeBase,
    states: torch.Tensor,
    places: np.ndarray,
) -> tuple[pl.DataFrame, int]:
    """The neighbors of a part's targets, and how many targets it has."""
    targets, users, known = _targets(split, part, options.targets_per_user)
    with_history = known > 0
    targets, asked, known = targets[with_history], users[with_history], known[with_history]
    found, cosines = nearest_users(
        _states(ranker, data, split, part, asked, known, split.dataset.item_codes[targets]),
        states,
        options.top_k,
        query_users=asked,
        key_users=base.users,
        key_places=places[base.rows[base.next_at]],
        query_places=places[targets] if options.time == "known" else None,
        progress=True,
    )
    row, rank = np.nonzero(found >= 0)
    key, target = found[row, rank], targets[row]
    stop = np.minimum(base.next_to[key], base.next_at[key] + options.next_items)
    next_rows = [base.rows[begin:end] for begin, end in zip(base.next_at[key], stop, strict=True)]
    if options.time == "known":
        next_rows = [rows[places[rows] < places[of]] for rows, of in zip(next_rows, target, strict=True)]
    user_ids, item_ids, codes = (
        split.dataset.users["user"],
        split.dataset.items["item"],
        split.dataset.item_codes,
    )
    columns = {
        "part": pl.repeat(part, len(key), dtype=pl.String, eager=True),
        "user": user_ids.gather(asked[row]),
        "target": item_ids.gather(codes[target]),
        "target_row": target,
        "rank": rank + 1,
        "similarity": cosines[row, rank],
        "neighbor": user_ids.gather(base.users[key]),
        "known": base.known[key],
        "next": [item_ids.gather(codes[rows]).to_list() for rows in next_rows],
        "next_rows": [rows.tolist() for rows in next_rows],
    }
    return pl.DataFrame(columns, schema_overrides=SCHEMA).cast(SCHEMA), len(users)  # type: ignore[arg-type]


def _targets(split: Split, part: str, per_user: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of the targets, their users, and how many interactions precede each; shape [targets]."""
    histories = UserHistories.of(split, part)
    counts = np.diff(histories.target_offsets)
    users = np.repeat(np.arange(len(counts)), counts)
    chosen = np.ones(len(users), dtype=bool)
    if part == "train" and per_user:
        chosen = np.arange(len(users)) >= histories.target_offsets[1:][users] - per_user
    return histories.target_rows[chosen], users[chosen], histories.known[chosen]


def _states(
    ranker: Ranker,
    data: TrainingData,
    split: Split,
    part: str,
    users: np.ndarray,
    known: np.ndarray,
    items: np.ndarray | None = None,
) -> torch.Tensor:
    """States after the first `known` items of histories; `items`: the targets of a held-out part."""
    from recllm.rankers.ranking import UserStates

    histories = data.train
    if part != "train":
        histories, _ = data.known_before_each(split, part, users, items)  # type: ignore[arg-type]
    return UserStates(ranker, data, histories, users, known).states


def _check_free(path: Path, options: NeighborOptions) -> None:
    """Refuses to replace a file without being told to, or by one that lacks some of its parts."""
    if not path.exists():
        return
    if not options.overwrite:
        raise DataError(f"{path} exists already; --overwrite replaces it, --name writes beside it")
    held = read_made(read_table(path)[1], path).get("parts", {})
    if lost := [part for part in held if part not in options.parts]:
        raise DataError(
            f"{path} also has neighbors for {', '.join(lost)}, which --overwrite would delete; name all "
            "--parts, or give another --name"
        )
