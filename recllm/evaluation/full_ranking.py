"""Ranks against the whole catalog, a block of users at a time.

Neither a users x items matrix nor a sorted list is ever made: a block of scores is computed, compared with
the score of each positive, counted and dropped. What the user has already seen is not masked in the block; it
is gathered from it and subtracted from the counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recllm.errors import DataError
from recllm.evaluation.ranks import RankRecords, as_scores, check_finite, check_ids, count_true
from recllm.evaluation.twins import tie_twins, twin_rows

if TYPE_CHECKING:
    from recllm.data.candidates import FullRanking

Scores = Any
"""A [U, I] array or tensor, a function from a slice of users to [B, I], or embeddings ([U, D], [I, D]).
Embeddings of users may be a function, too: from a slice of users to [B, D]."""
Rows = tuple[Any, Any]
"""Item numbers per user in CSR form: indptr [U + 1], indices [nnz]."""


def rank_full(
    scores: Scores,
    positives: Rows,
    n_items: int,
    *,
    seen: Rows | None = None,
    users: Sequence | pl.Series | None = None,
    items: Sequence | pl.Series | None = None,
    block: int | None = None,
    threads: int | None = None,
    protocol: str = "unspecified",
    system: str = "unnamed",
    candidates: str = "",
) -> RankRecords:
    """Ranks the positives of every user among all items that the user has not seen.

    Scores are compared in the precision in which they come (half precision and bfloat16 as float32, integers
    and extended precision as float64), and those of embeddings are float32 or float64 inner products. The
    score of a positive is read from the block in which it is ranked, so a positive always ties with itself,
    and items with equal vectors share one inner product, so they tie wherever they are stored. Torch tensors
    are ranked on their own device.

    Args:
        scores: A matrix [U, I], a function that maps a slice of users to their scores [B, I], or a pair of
            user and item embeddings; numpy arrays or torch tensors.
        positives: The items to rank, per user; users without one are passed over.
        n_items: The size I of the catalog.
        seen: Items that are no candidates, per user. A positive stays a candidate even where it was seen.
        users: [U] ids; 0 to U - 1 when None.
        items: [I] ids; 0 to I - 1 when None.
        block: Users per block; None takes about 1.5 million scores, at least 16 users.
        threads: Blocks in work at a time, on the CPU; None takes one per core. Memory grows with
            threads x block x I, never with U x I. A function is always called by one thread.
        candidates: A fingerprint of positives and seen items, for the records to keep.

    Returns:
        One record per positive; `n` is I less the number of the user's seen items that are not positives.

    Raises:
        DataError: A score is NaN or infinite (the user is named), or the inputs do not fit each other.
    """
    indptr, wanted = _csr(positives, n_items, "positives")
    u_count = len(indptr) - 1
    users = pl.Series("user", np.arange(u_count) if users is None else users)
    items = pl.Series("item", np.arange(n_items) if items is None else items)
    if len(users) != u_count or len(items) != n_items:
        raise DataError(
            f"{len(users)} user ids and {len(items)} item ids for {u_count} users, {n_items} items"
        )
    check_ids(users, "users")
    if users.n_unique() < u_count:
        raise DataError("users: an id repeats; one row is one user")
    owner = np.repeat(np.arange(u_count), np.diff(indptr))
    order = np.lexsort((wanted, owner))
    if (twice := (np.diff(owner[order]) == 0) & (np.diff(wanted[order]) == 0)).any():
        row = order[twice.argmax()]
        raise DataError(
            f"positives: user {users[int(owner[row])]!r} has item {items[int(wanted[row])]!r} twice"
        )
    hidden_ptr, hidden = _unseen_but(seen, owner, wanted, u_count, n_items)

    above, tied = np.empty((2, len(wanted)), np.int64)

    def count(start: int, stop: int, scored: Any) -> None:
        masked = _on_device(scored, hidden[hidden_ptr[start] : hidden_ptr[stop]])
        masked_row = _rows(scored, hidden_ptr, start, stop)
        masked_score = scored[masked_row, masked]
        degree = np.diff(indptr[start : stop + 1])
        for nth in range(degree.max(initial=0)):  # the nth positive of every user who has so many
            row = np.flatnonzero(degree > nth)
            record = indptr[start:stop][row] + nth
            part = scored if len(row) == stop - start else scored[row]
            at, column = _on_device(scored, np.arange(len(row))), _on_device(scored, wanted[record])
            positive = part[at, column][:, None]
            above[record] = _to_numpy(count_true(part > positive))
            tied[record] = _to_numpy(count_true(part == positive))
            if len(masked):
                of_user = np.full(stop - start, np.nan)  # stays NaN where the user has no nth positive
                of_user[row] = _to_numpy(positive[:, 0])
                compared = _on_device(scored, of_user)[masked_row]
                for counts, hit in ((above, masked_score > compared), (tied, masked_score == compared)):
                    hits = np.bincount(_to_numpy(masked_row[hit]), minlength=stop - start)
                    counts[record] -= hits[row]

    _over_blocks(count, scores, n_items, users, block, threads)
    n = n_items - np.diff(hidden_ptr)[owner]
    names = users[owner].rename("user"), items[wanted].rename("item")
    return RankRecords(*names, above, tied, n, "user", protocol, system, candidates)


def rank_catalog(
    ranking: FullRanking,
    scores: Scores,
    *,
    system: str,
    block: int | None = None,
    threads: int | None = None,
    made: Mapping[str, Any] | None = None,
) -> RankRecords:
    """Ranks the lists of `recllm.data.candidates.full_ranking`, with their ids, protocol and fingerprint.

    lists = full_ranking(split, "test")
    records = rank_catalog(lists, (user_vectors[lists.users], item_vectors), system="mine")
    records.save("ranks/mine.parquet")

    Args:
        ranking: The lists, L of them, over a catalog of I items.
        scores: As in `rank_full`, row i being the scores of list i (of user `ranking.users[i]`) and column j
            those of item j of the catalog: [L, I], a function from a slice of lists to [B, I], or
            embeddings ([L, D], [I, D]).
        system: The name of what made the scores.
        block: As in `rank_full`, in lists.
        threads: As in `rank_full`.
        made: How the scores were made, which the records keep.

    Raises:
        DataError: As `rank_full`.
    """
    records = rank_full(
        scores,
        (ranking.positive_offsets, ranking.positives),
        len(ranking.item_ids),
        seen=(ranking.masked_offsets, ranking.masked),
        users=ranking.user_ids,
        items=ranking.item_ids,
        block=block,
        threads=threads,
        protocol=ranking.protocol,
        system=system,
        candidates=ranking.candidates,
    )
    return replace(records, made=made or {})


def top_k(
    scores: Scores,
    k: int,
    n_users: int,
    n_items: int,
    *,
    seen: Rows | None = None,
    block: int | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k items with the highest scores of every user; of equal scores the lower item number comes
    first.

    Args:
        scores: As in `rank_full`.
        k: The length of the lists, at most I.
        n_users: U.
        n_items: I.
        seen: Items that may not be listed, per user.
        block: As in `rank_full`.
        threads: As in `rank_full`.

    Returns:
        Item numbers [U, k] and their scores [U, k]; -1 and NaN where a user has fewer than k items left.

    Raises:
        DataError: A score is NaN or infinite, or the inputs do not fit each other.
    """
    if not 1 <= k <= n_items:
        raise DataError(f"k is {k}; expected 1 to {n_items}, the number of items")
    users = pl.Series("user", np.arange(n_users))
    nothing = np.zeros(n_users + 1, np.int64), np.zeros(0, np.int64)
    hidden_ptr, hidden = nothing if seen is None else _csr(seen, n_items, "seen")
    _expect_users(hidden_ptr, n_users)
    listed = np.full((n_users, k), -1)
    listed_score = np.full((n_users, k), np.nan)

    def find(start: int, stop: int, scored: Any) -> None:
        candidate = scored.copy() if isinstance(scored, np.ndarray) else scored.clone()
        masked = _on_device(scored, hidden[hidden_ptr[start] : hidden_ptr[stop]])
        candidate[_rows(scored, hidden_ptr, start, stop), masked] = -np.inf
        if isinstance(candidate, np.ndarray):
            least = np.partition(candidate, n_items - k, axis=1)[:, n_items - k]
        else:
            least = candidate.topk(k, dim=1).values[:, -1]
        kept = (candidate >= least[:, None]) & (candidate > -np.inf)
        row, column = np.nonzero(kept) if isinstance(kept, np.ndarray) else kept.nonzero(as_tuple=True)
        score = _to_numpy(candidate[row, column]).astype(np.float64)
        row, column = _to_numpy(row), _to_numpy(column)
        order = np.lexsort((column, -score, row))
        row, column, score = row[order], column[order], score[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        fits = place < k
        listed[start + row[fits], place[fits]] = column[fits]
        listed_score[start + row[fits], place[fits]] = score[fits]

    _over_blocks(find, scores, n_items, users, block, threads)
    return listed, listed_score


def score_blocks(scores: Scores, users: pl.Series, n_items: int) -> Callable[[slice], Any]:
    """Returns a function from a slice of users to their scores [B, I], as `rank_full` computes them.

    Args:
        scores: As in `rank_full`.
        users: [U] ids, for errors.
        n_items: The size of the catalog.
    """
    source = _source(scores, len(users), n_items, users)
    return lambda part: _as_scores(source.block(part))


def _over_blocks(
    work: Callable[[int, int, Any], None],
    scores: Scores,
    n_items: int,
    users: pl.Series,
    block: int | None,
    threads: int | None,
) -> None:
    """Calls work(start, stop, finite scores [stop - start, n_items]) for all users.

    Each thread computes and counts blocks of its own with a BLAS of one thread: numpy lets go of the
    interpreter in all that takes time, and threads that never wait for each other lose little on a busy
    machine.
    """
    if (block is not None and block < 1) or (threads is not None and threads < 1):
        raise DataError(f"block is {block} and threads is {threads}; expected at least 1")
    block = block or max(16, 3 * 2**19 // max(n_items, 1))
    source = _source(scores, len(users), n_items, users)

    def run(start: int) -> None:
        stop = min(start + block, len(users))
        scored = _as_scores(source.block(slice(start, stop)))
        if tuple(scored.shape) != (stop - start, n_items):
            shape = tuple(scored.shape)
            raise DataError(
                f"scores of users {start} to {stop - 1}: shape {shape}, not {(stop - start, n_items)}"
            )
        if not source.finite:
            check_finite(scored, users[start:stop])
        work(start, stop, scored)

    starts = range(0, len(users), block)
    threads = min(threads or len(os.sched_getaffinity(0)), len(starts)) if source.parallel else 1
    if threads < 2:
        for start in starts:
            run(start)
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: [run(start) for start in starts[first::threads]], range(threads)))


@dataclass(frozen=True)
class _Source:
    block: Callable[[slice], Any]
    finite: bool = False
    """No block can hold NaN or infinity, so none needs to be checked."""
    parallel: bool = False
    """Blocks are computed by numpy, and so may be by several threads at a time."""


def _source(scores: Scores, u_count: int, n_items: int, users: pl.Series) -> _Source:
    if callable(scores):
        return _Source(scores)
    if not isinstance(scores, tuple):
        matrix = scores if hasattr(scores, "detach") else np.asarray(scores)
        if tuple(matrix.shape) != (u_count, n_items):
            raise DataError(f"scores have shape {tuple(matrix.shape)}, expected {(u_count, n_items)}")
        return _Source(lambda part: matrix[part], parallel=str(matrix.device) == "cpu")
    if callable(scores[0]) and not hasattr(scores[0], "shape"):
        return _source_of_blocks(scores[0], _as_scores(scores[1]), n_items)
    of_users, of_items = (_as_scores(table) for table in scores)
    if of_users.shape[0] != u_count or of_items.shape[0] != n_items or of_users.shape[1] != of_items.shape[1]:
        raise DataError(
            f"embeddings {tuple(of_users.shape)} and {tuple(of_items.shape)}: expected [{u_count}, D] and "
            f"[{n_items}, D]"
        )
    check_finite(of_users, users)
    _check_finite_items(of_items)
    # |u . i| <= D max|u| max|i|: below the largest float no inner product or partial sum overflows.
    largest = [float(abs(table).max()) if 0 not in table.shape else 0.0 for table in (of_users, of_items)]
    float32_max = 3.4e38
    safe = of_users.shape[1] * largest[0] * largest[1] < float32_max
    twins = twin_rows(of_items)
    return _Source(
        lambda part: tie_twins(of_users[part] @ of_items.T, twins),
        finite=safe,
        parallel=isinstance(of_users, np.ndarray),
    )


def _source_of_blocks(of_users: Callable[[slice], Any], of_items: Any, n_items: int) -> _Source:
    """Embeddings of users that are made when a block is ranked, so that they are never all in memory."""
    if of_items.shape[0] != n_items:
        raise DataError(f"embeddings of {of_items.shape[0]} items, expected {n_items}")
    _check_finite_items(of_items)
    twins, on_cpu = twin_rows(of_items), isinstance(of_items, np.ndarray)
    return _Source(lambda part: tie_twins(_as_scores(of_users(part)) @ of_items.T, twins), parallel=on_cpu)


def _check_finite_items(of_items: Any) -> None:
    try:
        check_finite(of_items, pl.Series(np.arange(of_items.shape[0])))
    except DataError as error:
        raise DataError(f"item embeddings: {str(error).replace('user', 'item', 1)}") from None


def _as_scores(scores: Any) -> Any:
    """Numpy for everything on the CPU (it compares faster there), torch elsewhere; at least float32."""
    if hasattr(scores, "detach"):
        scores = scores.detach()
        if not scores.is_floating_point():
            scores = scores.double()
        elif scores.itemsize < 4:
            scores = scores.float()
        return scores.numpy() if scores.device.type == "cpu" else scores
    scores = as_scores(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        return scores.astype(np.float64)
    return scores.astype(np.float32) if scores.dtype == np.float16 else scores


def _on_device(scored: Any, array: np.ndarray) -> Any:
    """Puts indices or scores beside a block of scores."""
    if isinstance(scored, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).to(scored.device)


def _to_numpy(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _rows(scored: Any, indptr: np.ndarray, start: int, stop: int) -> Any:
    """The row within its block of every entry of CSR rows `start` to `stop`."""
    return _on_device(scored, np.repeat(np.arange(stop - start), np.diff(indptr[start : stop + 1])))


def _unseen_but(
    seen: Rows | None, owner: np.ndarray, wanted: np.ndarray, u_count: int, n_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """The seen items of each user as a set, without the user's positives."""
    if seen is None:
        return np.zeros(u_count + 1, np.int64), np.zeros(0, np.int64)
    indptr, indices = _csr(seen, n_items, "seen")
    _expect_users(indptr, u_count)
    cells = np.sort(np.repeat(np.arange(u_count), np.diff(indptr)) * n_items + indices)
    cells = cells[np.diff(cells, prepend=-1) > 0]
    cells = cells[~np.isin(cells, owner * n_items + wanted)]
    return np.searchsorted(cells, np.arange(u_count + 1) * n_items), cells % n_items


def _csr(rows: Rows, n_items: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    indptr, indices = (_to_numpy(part) if hasattr(part, "cpu") else np.asarray(part) for part in rows)
    indptr, indices = indptr.astype(np.int64, copy=False), indices.astype(np.int64, copy=False)
    if len(indptr) == 0 or indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise DataError(f"{what}: indptr must rise from 0 to {len(indices)}, the number of indices")
    if len(indices) and not 0 <= indices.min() <= indices.max() < n_items:
        wrong = indices[(indices < 0) | (indices >= n_items)][0]
        raise DataError(f"{what}: item {wrong}; item numbers go from 0 to {n_items - 1}")
    return indptr, indices


def _expect_users(indptr: np.ndarray, u_count: int) -> None:
    if len(indptr) != u_count + 1:
        raise DataError(f"seen: rows for {len(indptr) - 1} users, expected {u_count}")
