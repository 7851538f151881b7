"""Metrics by how popular a target is in training: a mean over all targets is mostly one over popular items.

Buckets (ours): `cold` are items without a training interaction. The others are put in order of their training
interactions and cut where the most popular ones have a third, and two thirds, of all training interactions:
`head`, `middle`, `tail`. Items with equally many interactions are in one bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from recllm.data.origins import check_same_origin
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.evaluation import tables
from recllm.evaluation.inputs import System
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.significance import RESAMPLES, bootstrap_means, check_same_records

NAMES = ("cold", "tail", "middle", "head")


@dataclass(frozen=True, eq=False)
class Buckets:
    """The bucket of each item.

    Attributes:
        of_item: Place in `NAMES`; int64, shape [items].
        least: The fewest training interactions of an item of each bucket; 0 where the bucket is empty.
        items: Items of each bucket.
    """

    of_item: np.ndarray
    least: tuple[int, ...]
    items: tuple[int, ...]

    @classmethod
    def of(cls, counts: np.ndarray) -> Buckets:
        """Cuts the catalog into buckets.

        Args:
            counts: Training interactions of each item; shape [items].
        """
        levels, items = np.unique(counts, return_counts=True)
        above = np.cumsum((levels * items)[::-1])[::-1] - levels * items  # interactions of more popular items
        total = max(int(counts.sum()), 1)
        of_level = np.where(3 * above < total, 3, np.where(3 * above < 2 * total, 2, 1))
        of_level = np.where(levels == 0, 0, of_level)
        of_item = of_level[np.searchsorted(levels, counts)]
        inside = [counts[of_item == bucket] for bucket in range(len(NAMES))]
        return cls(of_item, tuple(int(min(each, default=0)) for each in inside), tuple(map(len, inside)))


def popularity_table(
    systems: Sequence[System],
    split: Split,
    names: Sequence[str] = ("hr@10", "ndcg@10"),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tables.Table:
    """Tabulates metrics of systems for each bucket, with 95% bootstrap intervals over users.

    Where a list has targets in several buckets, those of the other buckets are candidates like any other.

    Raises:
        DataError: A system was ranked on another split, on other targets than the first, or on targets that
            the split does not have.
    """
    for system in systems:
        check_same_origin(
            replace(system.records.origin, what=str(system.path)),
            split.origin,
            remedy="give the split that the systems were ranked on",
        )
        check_same_records(systems[0].records, system.records)
    ids, items = split.dataset.items["item"], split.dataset.item_codes[split.rows("train")]
    buckets = Buckets.of(np.bincount(items, minlength=len(ids)))
    by_id = dict(zip(ids, buckets.of_item.tolist(), strict=True))
    rows, records = [], []
    for number, bucket in reversed(list(enumerate(NAMES))):
        chosen = [_in_bucket(system, by_id, number) for system in systems]
        if not len(chosen[0]):
            continue
        measured = [compute_metrics(each, names=names) for each in chosen]
        per_user = np.concatenate([each.per_user().drop("user").to_numpy() for each in measured], axis=1)
        ends = bootstrap_means(per_user, resamples=resamples, seed=seed).reshape(len(systems), -1, 2)
        head = f"{bucket} ({_span(buckets, number)})"
        rows.append([head, *[f"{len(each):,} targets" for each in chosen]])
        for m, name in enumerate(names):
            means = [each.mean()[name] for each in measured]
            rows.append(
                [f"  {name}", *(_cell(mean, *end) for mean, end in zip(means, ends[:, m], strict=True))]
            )
            records += [
                {
                    **{"bucket": bucket, "least_interactions": buckets.least[number]},
                    **{"items": buckets.items[number], "targets": len(chosen[0])},
                    **{"system": system.records.system, "metric": name, "value": float(mean)},
                    **{"low": float(end[0]), "high": float(end[1])},
                }
                for system, mean, end in zip(systems, means, ends[:, m], strict=True)
            ]
    protocol = systems[0].records.protocol
    notes = [
        "By training interactions of the target's item; head, middle and tail have a third of all training "
        f"interactions each. Means over users with a target in the bucket, 95% bootstrap intervals "
        f"({resamples} resamples, seed {seed}).",
    ]
    facts = {"protocol": protocol, "split": split.protocol, "resamples": resamples, "seed": seed}
    columns = ["", *(system.records.system for system in systems)]
    return tables.Table(f"Protocol {protocol}, by popularity", columns, rows, records, facts, set(), notes)


def _in_bucket(system: System, by_id: dict[str, int], number: int) -> RankRecords:
    records = system.records
    items = records.item.cast(pl.String)
    if unknown := set(items.unique()) - by_id.keys():
        raise DataError(f"{system.path}: the target {min(unknown)!r} is no item of the split's dataset")
    mask = items.replace_strict(by_id, return_dtype=pl.Int64) == number
    kept = mask.to_numpy()
    return replace(
        records,
        user=records.user.filter(mask),
        item=records.item.filter(mask),
        **{name: np.asarray(getattr(records, name))[kept] for name in ("above", "tied", "n")},
    )


def _span(buckets: Buckets, number: int) -> str:
    items = f"{buckets.items[number]:,} items"
    return items if number == 0 else f"{items} with {buckets.least[number]:,} or more"


def _cell(mean: float, low: float, high: float) -> str:
    return f"{tables.number(mean)} [{tables.number(low)}, {tables.number(high)}]"
