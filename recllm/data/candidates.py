"""What a system has to rank: for each target 1+N candidates in a file, the same for every system, or the
catalog.

`DATASET/splits/<split>/candidates/<name>/{valid,test}.parquet` has the columns `user, target, item, label`;
one list is one (user, target): the target (label 1) and N negatives (label 0). The file's metadata has the
protocol, a fingerprint of the rows, and the hashes of dataset and split (see `recllm.data.candidate_files`).

Negatives are items that the user has touched in no part of the log, as is the custom of the field. Validation
lists therefore know of a user's test items that they are no negatives; nothing else of the test part reaches
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from tyro.conf import Positional, arg

from recllm.data.candidate_files import candidate_metadata
from recllm.data.dataset import describe_file
from recllm.data.derived import refuse_derived
from recllm.data.splits import HeldOut, Split
from recllm.errors import DataError
from recllm.files import MANIFEST, staged_folder, write_json
from recllm.runs.provenance import describe_run

Mask = Literal["seen", "train", "none"]
_BLOCK = 1 << 22  # numbers drawn at a time
_MAX_DRAWS = 4096  # draws a target before the few remaining items are listed instead


@dataclass
class CandidateOptions:
    """Draws negatives for each validation and test target."""

    split: Positional[Annotated[Path, arg(metavar="SPLIT")]]
    """The split folder (DATASET/splits/<name>)."""
    negatives: int = 20
    """Negatives a target: items that the user has touched in no part of the log."""
    sampling: Literal["uniform", "popularity"] = "uniform"
    """Draw uniformly from the catalog, or in proportion to the training interactions of an item."""
    seed: int = 42
    """Seed of the draw. A list depends on it, on the user, what the user has touched, the target and the
    catalog (and the items' popularity) alone: not on the order of the log, nor on other users."""
    overwrite: bool = False
    """Replace the candidates where they exist."""

    @property
    def name(self) -> str:
        """The candidates' part of the protocol string."""
        return f"1+{self.negatives}-{self.sampling}-seed{self.seed}"


@dataclass
class FullRanking:
    """The whole catalog as candidates, in codes (row numbers in the dataset's `users` and `items`).

    Attributes:
        users: User code of each list; shape [lists].
        positives: Target item codes of all lists, one after the other.
        positive_offsets: List `i` has `positives[positive_offsets[i] : positive_offsets[i + 1]]`; shape
            [lists + 1].
        masked: Item codes that are not candidates (seen before), one list after the other; targets are not in
            it.
        masked_offsets: As `positive_offsets`.
        protocol: For example `loo/full/mask-seen`; the lists of the validation part end in `/valid`.
        user_ids: The ids of `users`.
        item_ids: The ids of the whole catalog, in the order of the codes.
        candidates: A fingerprint of split, part and mask: equal only where the lists are the same.
    """

    users: np.ndarray
    positives: np.ndarray
    positive_offsets: np.ndarray
    masked: np.ndarray
    masked_offsets: np.ndarray
    protocol: str
    user_ids: pl.Series
    item_ids: pl.Series
    candidates: str


def full_ranking(split: Split, part: HeldOut, *, mask: Mask = "seen") -> FullRanking:
    """Returns the lists of full-catalog ranking, one for each user with targets.

    A user's list is made once, before the first of the user's targets of the part: what precedes that one is
    known (see `recllm.data.user_histories`).

    Args:
        split: The split.
        part: `valid` or `test`.
        mask: Which items leave the candidates: `seen` (training, and validation at test time), `train`
            (training only, as MMRec has it), or `none` (as RecBole's sequential models). What is masked does
            not depend on time: an item that the user touches later is no candidate either.
    """
    dataset = split.dataset
    n_items = len(dataset.items)
    targets = split.rows(part, targets=True)
    pairs = np.unique(_pairs(dataset.user_codes[targets], dataset.item_codes[targets], n_items))
    users, lists = np.unique(pairs // n_items, return_inverse=True)
    masked = np.empty(0, dtype=np.int64)
    if mask != "none":
        known = part if mask == "seen" else "train"
        # An item that the user is known to have rated low has been touched, too.
        rows = np.concatenate([split.history_rows(known, disliked=disliked) for disliked in (False, True)])
        rows = rows[np.isin(dataset.user_codes[rows], users)]
        masked = np.unique(_pairs(dataset.user_codes[rows], dataset.item_codes[rows], n_items))
        masked = masked[~np.isin(masked, pairs, assume_unique=True)]
    masked_lists = np.searchsorted(users, masked // n_items)
    return FullRanking(
        users=users,
        positives=pairs % n_items,
        positive_offsets=_offsets(lists, len(users)),
        masked=masked % n_items,
        masked_offsets=_offsets(masked_lists, len(users)),
        protocol=_of_part(
            f"{split.protocol}/full/" + ("no-mask" if mask == "none" else f"mask-{mask}"), part
        ),
        user_ids=dataset.users["user"].gather(users),
        item_ids=dataset.items["item"],
        candidates=hashlib.sha256(
            f"{split.split_hash} {dataset.data_hash} {part} {mask}".encode()
        ).hexdigest()[:16],
    )


def make_candidates(split: Split, options: CandidateOptions) -> Path:
    """Draws and writes candidates for the validation and the test targets.

    Returns:
        The folder with `valid.parquet`, `test.parquet` and `manifest.json`.

    Raises:
        DataError: A user has touched so much that fewer than `options.negatives` items are left to draw from.
    """
    if options.negatives < 1 or options.seed < 0:
        raise DataError(f"--negatives {options.negatives} --seed {options.seed}: expected at least 1 and 0")
    dataset = split.dataset
    protocol = f"{split.protocol}/{options.name}"
    popularity = None
    if options.sampling == "popularity":
        popularity = np.bincount(dataset.item_codes[split.rows("train")], minlength=len(dataset.items))
    sampler = NegativeSampler(
        dataset.user_codes, dataset.item_codes, len(dataset.users), len(dataset.items), popularity
    )
    folder = split.folder / "candidates" / options.name
    refuse = partial(refuse_derived, own=("valid.parquet", "test.parquet", MANIFEST), discardable=False)
    with staged_folder(folder, overwrite=options.overwrite, refuse=refuse) as staging:
        left_out: dict[str, Any] = {}
        for part in ("valid", "test"):
            lists, left_out[part] = _draw_part(split, part, sampler, options)
            metadata = candidate_metadata(lists, split, _of_part(protocol, part))
            lists.write_parquet(staging / f"{part}.parquet", metadata=metadata)
        manifest = {
            "protocol": protocol,
            "data_hash": dataset.data_hash,
            "split_hash": split.split_hash,
            "left_out": left_out,
            "files": {
                f"{part}.parquet": describe_file(staging / f"{part}.parquet") for part in ("valid", "test")
            },
            "run": describe_run(),
        }
        write_json(staging / MANIFEST, manifest)
    return folder


class NegativeSampler:
    """Draws items that a user has never touched, without replacement, from a stream of numbers of the user's
    own.

    Args:
        user_codes: The user of each interaction of the whole log; shape [interactions].
        item_codes: The item of each interaction; shape [interactions].
        n_users: Number of users.
        n_items: Size of the catalog.
        popularity: Weight of each item, shape [n_items]; uniform where None. Items of weight 0 are never
            drawn.
    """

    def __init__(
        self,
        user_codes: np.ndarray,
        item_codes: np.ndarray,
        n_users: int,
        n_items: int,
        popularity: np.ndarray | None = None,
    ) -> None:
        self._pairs = np.unique(_pairs(user_codes, item_codes, n_items))
        self._offsets = np.searchsorted(self._pairs, np.arange(n_users + 1) * n_items)
        self._n_items = n_items
        self._weights = np.ones(n_items) if popularity is None else np.asarray(popularity, dtype=float)
        self._cumulative = None if popularity is None else np.cumsum(self._weights)

    def left(self, users: np.ndarray) -> np.ndarray:
        """Counts the items that can be drawn for each of `users`, int64 [users]."""
        owner, item = np.divmod(self._pairs, self._n_items)
        able = self._weights > 0
        touched = np.bincount(owner[able[item]], minlength=len(self._offsets) - 1)
        return int(able.sum()) - touched[users]

    def draw(self, users: np.ndarray, streams: np.ndarray, count: int) -> np.ndarray:
        """Draws `count` distinct items for each of `users`, in the order of their streams.

        Args:
            users: User codes; shape [lists].
            streams: The seed of each list's own stream; uint64, shape [lists].
            count: Items a list.

        Returns:
            Item codes; int64, shape [lists, count]. Row `i` depends on user `i`, its stream and the catalog
            alone.

        Raises:
            LookupError: A user has too few items left; its argument is the position in `users` and how many
            are left.
        """
        drawn = np.empty((len(users), count), dtype=np.int64)
        pending, draws = np.arange(len(users)), 2 * count + 8
        while len(pending) and draws <= _MAX_DRAWS:
            rows = max(1, _BLOCK // draws)
            missed = [
                self._reject(users, streams, drawn, pending[at : at + rows], draws)
                for at in range(0, len(pending), rows)
            ]
            pending, draws = np.concatenate(missed), draws * 4
        for place in pending:
            drawn[place] = self._list_and_choose(place, users[place], streams[place], count)
        return drawn

    def _reject(
        self, users: np.ndarray, streams: np.ndarray, drawn: np.ndarray, places: np.ndarray, draws: int
    ) -> np.ndarray:
        """Fills rows `places` of `drawn` from the first draws; returns those that need more."""
        count = drawn.shape[1]
        uniform = _uniform(streams[places, None] + np.arange(draws, dtype=np.uint64) * _GOLDEN)
        if self._cumulative is None:
            items = (uniform * self._n_items).astype(np.int64)
        else:
            items = np.searchsorted(self._cumulative, uniform * self._cumulative[-1], side="right")
        accepted = ~self._touched(users[places], items) & _first_in_row(items)
        rank = np.cumsum(accepted, axis=1)
        enough = rank[:, -1] >= count
        chosen = accepted & (rank <= count) & enough[:, None]
        drawn[places[enough]] = items[chosen].reshape(-1, count)
        return places[~enough]

    def _touched(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        asked = _pairs(users[:, None], items, self._n_items)
        found = np.minimum(np.searchsorted(self._pairs, asked), len(self._pairs) - 1)
        return self._pairs[found] == asked

    def _list_and_choose(self, place: int, user: int, stream: np.uint64, count: int) -> np.ndarray:
        """Draws for a user who has touched nearly everything: an exponential race of the items left."""
        left = self._weights > 0
        left[self._pairs[self._offsets[user] : self._offsets[user + 1]] % self._n_items] = False
        items = np.flatnonzero(left)
        if len(items) < count:
            raise LookupError(int(place), len(items))
        uniform = _uniform(_mix(stream) + items.astype(np.uint64) * _GOLDEN)
        return items[np.argsort(-np.log1p(-uniform) / self._weights[items], kind="stable")[:count]]


def _draw_part(
    split: Split, part: HeldOut, sampler: NegativeSampler, options: CandidateOptions
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Returns the lists of a part, and what is left out: users who have too few items left."""
    dataset, count = split.dataset, options.negatives
    rows = split.rows(part, targets=True)
    # One list for a target, also where the log repeats the pair (`--duplicates keep`); in the order of the
    # rows.
    pairs = _pairs(dataset.user_codes[rows], dataset.item_codes[rows], len(dataset.items))
    rows = rows[np.sort(np.unique(pairs, return_index=True)[1])]
    users, targets = dataset.user_codes[rows], dataset.item_codes[rows]
    user_ids, target_ids = dataset.users["user"].gather(users), dataset.items["item"].gather(targets)
    streams = np.fromiter(_streams(options.seed, user_ids, target_ids), dtype=np.uint64, count=len(rows))
    enough = sampler.left(users) >= count
    left_out = {
        "lists": int((~enough).sum()),
        "users": user_ids.filter(~enough).unique().sort().to_list()[:5],
    }
    if len(rows) and not enough.any():
        place = int(sampler.left(users).argmax())
        raise DataError(
            f"each user of the {part} part interacted with so much that fewer than {count} items are left to "
            f"draw negatives from ({options.sampling} sampling; user {user_ids[place]!r} has the most, "
            f"{sampler.left(users[place : place + 1])[0]}); use fewer --negatives, or full ranking"
        )
    users, targets, streams = users[enough], targets[enough], streams[enough]
    user_ids, target_ids = user_ids.filter(enough), target_ids.filter(enough)
    negatives = sampler.draw(users, streams, count)
    items = np.concatenate([targets[:, None], negatives], axis=1)
    # The target goes to a random place: a system that breaks ties by the order of rows gains nothing from it.
    place = (_mix(streams) % np.uint64(count + 1)).astype(np.int64)
    lists = np.arange(len(users))
    items[lists, 0], items[lists, place] = items[lists, place], targets
    repeats = np.repeat(lists, count + 1)
    label = np.zeros(items.shape, dtype=np.int8)
    label[lists, place] = 1
    drawn = pl.DataFrame(
        {
            "user": user_ids.gather(repeats),
            "target": target_ids.gather(repeats),
            "item": dataset.items["item"].gather(items.ravel()),
            "label": label.ravel(),
        }
    )
    return drawn, left_out


def _streams(seed: int, users: pl.Series, targets: pl.Series) -> Iterator[int]:
    for user, target in zip(users, targets, strict=True):
        digest = hashlib.blake2b(f"{seed}\0{user}\0{target}".encode(), digest_size=8).digest()
        yield int.from_bytes(digest, "little")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def _uniform(state: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) from 64-bit states."""
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _first_in_row(items: np.ndarray) -> np.ndarray:
    """True where a value occurs for the first time in its row."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    new = np.ones(items.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, axis=1)
    return first


def _pairs(users: np.ndarray, items: np.ndarray, n_items: int) -> np.ndarray:
    return users.astype(np.int64) * n_items + items


def _of_part(protocol: str, part: HeldOut) -> str:
    return protocol if part == "test" else f"{protocol}/{part}"


def _offsets(lists: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.bincount(lists, minlength=count))))
