"""The two commands of the evaluation room: a table of systems, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from recllm.data.candidate_files import Candidates
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.evaluation import tables
from recllm.evaluation.coverage import Coverage
from recllm.evaluation.inputs import System, check_distinct, read_systems, stem
from recllm.evaluation.metrics import Metrics, compute_metrics, distinct_metric_names, one_positive_each
from recllm.evaluation.popularity import popularity_table
from recllm.evaluation.ranks import RankRecords, check_one_setting
from recllm.evaluation.significance import (
    RESAMPLES,
    bootstrap_means,
    check_draws,
    check_same_records,
    compare,
    holm,
    paired_differences,
    sign_flip_test,
)

ALPHA = 0.05


@dataclass
class RankReportConfig:
    """Measures one or more systems under one protocol and prints them in one table."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILES")]]
    """Score files (parquet, .csv or .csv.gz: user, item, score) or rank records (parquet), one per system.
    Put them before options that take several words."""
    candidates: Path | None = None
    """The candidate file that the scores belong to."""
    ks: tuple[int, ...] = (5, 10, 20)
    """Cutoffs."""
    metrics: tuple[str, ...] = ()
    """Only these metrics, for example ndcg@10 mrr auc. When not given: hr and ndcg at each cutoff, mrr and
    auc; every metric where lists have several positives."""
    out: Path | None = None
    """Folder for metrics.json, metrics.csv and metrics.tex."""
    save_ranks: Path | None = None
    """Folder for the rank records, one file per score file."""
    by_popularity: Annotated[Path | None, arg(metavar="SPLIT")] = None
    """The split folder that the systems were ranked on: a second table, by how popular a target is in
    training; with --out also by_popularity.json, .csv and .tex."""
    resamples: int = RESAMPLES
    """Bootstrap resamples and sign flips."""
    seed: int = 0
    """Seeds both."""


@dataclass
class CompareRunsConfig:
    """Compares the first system with each of the others, paired by user."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILES")]]
    """Two or more score files or rank records; the first is compared with each of the others. Put them before
    options that take several words."""
    candidates: Path | None = None
    """The candidate file that the scores belong to."""
    ks: tuple[int, ...] = (10,)
    """Cutoffs."""
    metrics: tuple[str, ...] = ()
    """Only these metrics, for example ndcg@10 mrr auc. When not given: hr and ndcg at each cutoff, mrr and
    auc; every metric where lists have several positives."""
    out: Path | None = None
    """Folder for comparison.json, comparison.csv and comparison.tex."""
    unequal_coverage: bool = False
    """Compare systems although they have content for different items. Without it this is an error: what
    differs may be due to the items that one of them knows nothing of."""
    resamples: int = RESAMPLES
    """Bootstrap resamples and sign flips."""
    seed: int = 0
    """Seeds both."""


def rank_report(config: RankReportConfig) -> tables.Table:
    """Runs `RankReportConfig`; returns the table that it printed."""
    _check_options(config)
    ranks = _rank_files(config.files, config.save_ranks) if config.save_ranks else []
    systems = _read(config)
    table = report_table(
        systems, config.ks, config.metrics or None, resamples=config.resamples, seed=config.seed
    )
    tables.show(table)
    popular = _by_popularity(config, systems)
    if config.save_ranks:
        for system, path in zip(systems, ranks, strict=True):
            system.records.save(path)
    if config.out:
        tables.write(table, config.out, "metrics")
        if popular:
            tables.write(popular, config.out, "by_popularity")
    return table


def _by_popularity(config: RankReportConfig, systems: list[System]) -> tables.Table | None:
    if config.by_popularity is None:
        return None
    names = config.metrics or tuple(f"{name}@{k}" for k in config.ks for name in ("hr", "ndcg"))
    split, draws = Split.open(config.by_popularity), {"resamples": config.resamples, "seed": config.seed}
    table = popularity_table(systems, split, names, **draws)
    tables.show(table)
    return table


def compare_runs(config: CompareRunsConfig) -> tables.Table:
    """Runs `CompareRunsConfig`; returns the table that it printed."""
    _check_options(config)
    if len(config.files) < 2:
        raise DataError(f"a comparison needs two files or more, {len(config.files)} given")
    table = comparison_table(
        _read(config),
        config.ks,
        config.metrics or None,
        resamples=config.resamples,
        seed=config.seed,
        unequal_coverage=config.unequal_coverage,
    )
    tables.show(table)
    if config.out:
        tables.write(table, config.out, "comparison")
    return table


def report_table(
    systems: list[System],
    ks: tuple[int, ...] = (5, 10, 20),
    names: tuple[str, ...] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tables.Table:
    """Tabulates metrics (rows) of systems (columns) with 95% bootstrap intervals.

    The best system of each metric is stressed, and those that differ from it are marked, by the sign-flip
    test with Holm's correction over every comparison that the table makes.
    """
    check_distinct(systems)
    check_one_setting([(system.records.system, system.records) for system in systems])
    for other in systems[1:]:
        check_same_records(systems[0].records, other.records)
    names, equal = _chosen(systems[0].records, ks, names)
    measured = [compute_metrics(system.records, ks, names) for system in systems]
    names = list(measured[0].lists)
    per_user = np.stack([one.per_user().drop("user").to_numpy() for one in measured])  # [S, U, M]
    means = np.array([[one.mean()[name] for name in names] for one in measured])
    intervals = _by_system(bootstrap_means(_side_by_side(per_user), resamples=resamples, seed=seed), systems)
    best = np.where(np.isnan(means), -np.inf, means.round(12)).argmax(0)  # of equal ones the first
    lead = paired_differences(per_user[best, :, np.arange(len(names))].T[None], per_user)
    p = holm_against(
        best, _by_system(sign_flip_test(_side_by_side(lead), resamples=resamples, seed=seed), systems)
    )

    rows, records, bold = [], [], set()
    for m, name in enumerate(names):
        row = [name]
        for s, system in enumerate(systems):
            low, high = intervals[s, m]
            figures = {"value": means[s, m], "low": low, "high": high, "p_holm_against_best": p[s, m]}
            head = {"protocol": system.records.protocol, "system": system.records.system, "metric": name}
            records.append({**head, **{key: float(value) for key, value in figures.items()}})
            mark = "†" if p[s, m] < ALPHA else ""
            row.append(f"{tables.number(means[s, m])} [{tables.number(low)}, {tables.number(high)}]{mark}")
            if s == best[m] and len(systems) > 1 and not np.isnan(means[s, m]):
                bold.add((len(rows), s + 1))
        rows.append(row)
    rows += _plain_rows(systems, measured)
    notes = [f"Means over users with 95% bootstrap intervals ({resamples} resamples, seed {seed}).", *equal]
    if len(systems) > 1:
        notes.append(
            f"† differs from the best system: sign-flip test, Holm-corrected over {np.isfinite(p).sum()} "
            f"comparisons, p < {ALPHA}."
        )
        notes.append(
            "The best system is chosen by the data that it is then tested on, which favors marks where more "
            "than two systems compete; to confirm one, name the pair beforehand and compare it on other data."
        )
        if np.isfinite(p).sum() >= ALPHA * (resamples + 1):
            notes.append("Nothing can be marked: more resamples are needed for so many comparisons.")
    notes += [
        f"{system.records.system}: {system.records.ignored} score rows are no candidates and were ignored."
        for system in systems
        if system.records.ignored
    ]
    notes += [
        f"{one.system}: {count} users have no defined {name} and are left out of its mean."
        for one in measured
        for name, count in one.undefined().items()
        if count
    ]
    notes += [*coverage_notes(systems), *foreign_notes(systems)]
    facts = {
        "protocol": measured[0].protocol,
        "candidates": _known_candidates(systems),
        "systems": {one.system: _facts(system, one) for system, one in zip(systems, measured, strict=True)},
        "resamples": resamples,
        "seed": seed,
    }
    columns = ["", *(one.system for one in measured)]
    return tables.Table(f"Protocol {measured[0].protocol}", columns, rows, records, facts, bold, notes)


def holm_against(best: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Corrects p-values [S, M] of every system against the `best` [M] as one family; NaN at the best."""
    p = p.copy()
    p[best, np.arange(len(best))] = np.nan
    return holm(p.reshape(-1)).reshape(p.shape)


def comparison_table(
    systems: list[System],
    ks: tuple[int, ...] = (10,),
    names: tuple[str, ...] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    unequal_coverage: bool = False,
) -> tables.Table:
    """Tabulates the comparisons of the first system with each other one; Holm's family is all rows.

    Raises:
        DataError: The systems have content for different items and `unequal_coverage` is not set, or they
            were not ranked on the same lists.
    """
    first = systems[0].records
    check_distinct(systems)
    check_one_setting([(system.records.system, system.records) for system in systems])
    uneven = coverage_notes(systems)
    if uneven and not unequal_coverage:
        raise DataError(
            f"{' '.join(uneven)} Score both with --pool covered on one set of items, or give "
            "--unequal-coverage to compare them all the same"
        )
    names, equal = _chosen(first, ks, names)
    comparisons = [
        comparison
        for other in systems[1:]
        for comparison in compare(first, other.records, ks, names, resamples=resamples, seed=seed)
    ]
    adjusted = {
        f"{test}_holm": holm([getattr(comparison, test) for comparison in comparisons])
        for test in ("t_p", "wilcoxon_p", "permutation_p")
    }
    records = [
        {
            "protocol": first.protocol,
            **asdict(comparison),
            **{name: float(values[i]) for name, values in adjusted.items()},
        }
        for i, comparison in enumerate(comparisons)
    ]
    rows = [
        [
            *(f"{record['metric']}: {record['a']} - {record['b']}",),
            *(tables.number(record["mean_a"]), tables.number(record["mean_b"])),
            f"{record['difference']:+.4f} [{record['low']:+.4f}, {record['high']:+.4f}]",
            *(tables.p_value(record[f"{test}_holm"]) for test in ("t_p", "wilcoxon_p", "permutation_p")),
            *(tables.number(record["cohen_dz"], 3), tables.number(record["rank_biserial"], 3)),
        ]
        for record in records
    ]
    columns = ["", "A", "B", "A - B", "t", "Wilcoxon", "permutation", "d_z", "rank-biserial"]
    notes = [
        f"Paired by user ({comparisons[0].users} users). Difference with its 95% bootstrap interval "
        f"({resamples} resamples, seed {seed}).",
        f"p-values are two-sided, Holm-corrected over the {len(rows)} rows; the files have both kinds.",
        *equal,
        *uneven,
        *foreign_notes(systems),
    ]
    candidates = _known_candidates(systems)
    facts = {"protocol": first.protocol, "candidates": candidates, "resamples": resamples, "seed": seed}
    return tables.Table(f"Protocol {first.protocol}", columns, rows, records, facts, set(), notes)


def _read(config: RankReportConfig | CompareRunsConfig) -> list[System]:
    return read_systems(config.files, Candidates.read(config.candidates) if config.candidates else None)


def _check_options(config: RankReportConfig | CompareRunsConfig) -> None:
    """Refuses what can be refused before anything is read."""
    check_draws(config.resamples, config.seed)
    for word in config.metrics:
        if word.endswith((".parquet", ".csv", ".gz")) or "/" in word:
            raise DataError(
                f"--metrics took {word!r}, which looks like a file: an option of several words takes all "
                "that follow it; put the files first, before --metrics and --ks"
            )
    if not config.files:
        raise DataError("no score or rank files were given; put them first, before --metrics and --ks")


def _rank_files(files: tuple[Path, ...], folder: Path) -> list[Path]:
    """The file for the rank records of each of `files`, none of them taken twice or from an input."""
    ranks = [folder / f"{stem(path)}.parquet" for path in files]
    owner: dict[Path, Path] = {}
    for path, rank in zip(files, ranks, strict=True):
        if rank in owner:
            raise DataError(f"--save-ranks: {owner[rank]} and {path} would both go to {rank}; rename one")
        owner[rank] = path
    taken = {path.resolve() for path in files}
    for rank in ranks:
        if rank.resolve() in taken:
            raise DataError(f"--save-ranks: {rank} is one of the files to measure; give another folder")
    return ranks


def _chosen(
    records: RankRecords, ks: tuple[int, ...], names: tuple[str, ...] | None
) -> tuple[Sequence[str], list[str]]:
    """The metrics of a table, and a note on those that it leaves out."""
    if names is not None:
        return names, []
    note = (
        "Every list has one positive, so that recall@k = hr@k, precision@k = hr@k / k, map = mrr (at cutoffs "
        "too) and ndcg@1 = hr@1; --metrics names any of them."
    )
    return distinct_metric_names(records, ks), [note] * one_positive_each(records)


def _known_candidates(systems: list[System]) -> str | None:
    return next((system.records.candidates for system in systems if system.records.candidates), None)


def _side_by_side(values: np.ndarray) -> np.ndarray:
    """[S, U, M] to [U, S x M], so that all systems share one set of resamples."""
    return values.transpose(1, 0, 2).reshape(values.shape[1], -1)


def _by_system(values: np.ndarray, systems: list[System]) -> np.ndarray:
    return values.reshape(len(systems), -1, *values.shape[1:])


def _plain_rows(systems: list[System], measured: list[Metrics]) -> list[list[str]]:
    rows = []
    if any(system.pooled_auc is not None for system in systems):
        values = [np.nan if system.pooled_auc is None else system.pooled_auc for system in systems]
        rows.append(["pooled auc", *map(tables.number, values)])
    rows.append(["tie rate", *(tables.number(one.tie_rate) for one in measured)])
    covered = [system.coverage for system in systems]
    if any(covered):
        for what in ("items", "targets"):
            rows.append([f"covered {what}", *(_share(each, what) for each in covered)])
    rows.append(["users", *(str(one.user.n_unique()) for one in measured)])
    rows.append(["positives", *(str(one.records) for one in measured)])
    return rows


def _share(coverage: Coverage | None, what: str) -> str:
    if coverage is None:
        return "all"
    return f"{getattr(coverage, what)}/{getattr(coverage, f'of_{what}')}"


def coverage_notes(systems: Sequence[System]) -> list[str]:
    """Returns a note where systems have content for different items; nothing where they do not."""
    found = [(system.records.system, system.coverage) for system in systems]
    sets = {"" if each is None or each.complete else each.fingerprint for _, each in found}
    if len(sets) < 2:
        return []
    told = "; ".join(f"{name} {_share(each, 'items')}" for name, each in found)
    return [
        f"Unequal coverage: the systems have content for different items ({told}). An item without content "
        "scored as a candidate with content, drawn at random."
    ]


def foreign_notes(systems: Sequence[System]) -> list[str]:
    """Returns a note on each system that was trained on another split than it was scored on."""
    return [
        f"{system.records.system} was trained on another split or dataset than it was scored on "
        "(--allow-other-split): what it was trained on may be among these targets."
        for system in systems
        if system.records.made.get("trained_on_other_split")
    ]


def _facts(system: System, measured: Metrics) -> dict[str, Any]:
    return {
        "file": system.path.name,
        "users": measured.user.n_unique(),
        "positives": measured.records,
        "tie_rate": measured.tie_rate,
        "pooled_auc": system.pooled_auc,
        "coverage": system.coverage.as_json() if system.coverage else None,
        "score_rows_ignored": system.records.ignored,
    }
