"""The answer in a sentence: does the system win, by how much, and could it be luck?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recllm.evaluation import tables
from recllm.evaluation.commands import ALPHA
from recllm.report.text import inline, plural


def headline_metrics(table: tables.Table) -> list[str]:
    """Returns the two metrics that the answer is about: AUC, and NDCG at 10 or at the widest cutoff."""
    names = list(dict.fromkeys(record["metric"] for record in table.records))
    ndcg = [name for name in names if name.startswith("ndcg@")]
    widest = max(ndcg, key=lambda name: int(name.split("@")[1]), default=None)
    chosen = ["auc", "ndcg@10" if "ndcg@10" in ndcg else widest]
    return [name for name in chosen if name in names]


def spelled(metric: str) -> str:
    """Returns a metric as people write it: `NDCG@10`."""
    return metric.upper()


def figures_of(table: tables.Table, metric: str) -> dict[str, dict[str, Any]]:
    """Returns the figures of a metric by system, in the order of the table."""
    return {record["system"]: record for record in table.records if record["metric"] == metric}


def best_of(table: tables.Table, metric: str) -> str:
    """Returns the system that the table stresses in a metric's row; the only one where there is one."""
    row = next(place for place, cells in enumerate(table.rows) if cells[0] == metric)
    columns = [column for stressed, column in table.bold if stressed == row]
    return table.columns[columns[0] if columns else 1]


def answer(table: tables.Table, main: str, shown: Mapping[str, str]) -> str:
    """Returns the answer as HTML.

    Args:
        table: As `recllm.evaluation.commands.report_table` returns it; nothing is computed anew.
        main: The system that the report is about.
        shown: How people read the systems' names.
    """
    metrics = headline_metrics(table)
    users = plural(table.facts["systems"][main]["users"], "user")
    name = inline(shown[main])
    if len(table.columns) == 2:
        said = " and ".join(
            f"{spelled(metric)} {_with_interval(figures_of(table, metric)[main])}" for metric in metrics
        )
        lead = f"<strong>{name} reaches {said}</strong> on {users}; nothing stands beside it to compare with."
    else:
        won = [metric for metric in metrics if _wins(table, metric, main)]
        listed = " and ".join(map(spelled, metrics))
        if len(won) == len(metrics):
            verdict = f"{name} ranks best of {len(table.columns) - 1} systems by {listed}"
        elif won:
            verdict = f"{name} ranks best by {spelled(won[0])}, but not by {_others(metrics, won)}"
        else:
            verdict = f"{name} does not win: by {listed} another system is ahead"
        clauses = "; ".join(_clause(table, metric, main, shown) for metric in metrics)
        lead = f"<strong>{verdict}.</strong> {clauses}. Measured on {users}."
    lead = f'<p class="lead">{lead}</p>'
    auc = figures_of(table, "auc").get(main)
    if auc and auc["low"] <= 0.5 <= auc["high"]:
        lead += (
            f'<p class="warning">The 95% interval of the AUC of {name} includes 0.5: it cannot be told from '
            "guessing.</p>"
        )
    return lead


def _wins(table: tables.Table, metric: str, main: str) -> bool:
    figures = figures_of(table, metric)
    best = figures[best_of(table, metric)]["value"]
    return best_of(table, metric) == main or round(figures[main]["value"], 12) == round(best, 12)


def _others(metrics: list[str], won: list[str]) -> str:
    return " and ".join(spelled(metric) for metric in metrics if metric not in won)


def _clause(table: tables.Table, metric: str, main: str, shown: Mapping[str, str]) -> str:
    """The main system against the best other one, where it wins, or against the winner."""
    figures = figures_of(table, metric)
    best = best_of(table, metric)
    others = [name for name in figures if name != main]
    rival = max(others, key=lambda name: figures[name]["value"]) if _wins(table, metric, main) else best
    tested = rival if best == main else main
    p = figures[tested]["p_holm_against_best"]
    against = f"{tables.number(figures[rival]['value'], 3)} of {inline(shown[rival])}"
    head = f"{spelled(metric)} is {_with_interval(figures[main])} against {against}"
    if round(figures[main]["value"], 12) == round(figures[rival]["value"], 12):
        return f"{head} (equal)"
    if best not in (main, rival):  # the main system ties with the best, which stands before it
        return head
    if p >= ALPHA and _too_few_resamples(table):
        return f"{head} (too few resamples to tell)"
    verdict = "significant" if p < ALPHA else "not significant"
    return f"{head} ({verdict}, p = {tables.p_value(p)})".replace("p = <", "p &lt; ")


def _too_few_resamples(table: tables.Table) -> bool:
    """Whether no p-value of the table can come below the level, after Holm's correction."""
    comparisons = sum(not math.isnan(record["p_holm_against_best"]) for record in table.records)
    return comparisons >= ALPHA * (table.facts["resamples"] + 1)


def _with_interval(figure: Mapping[str, Any]) -> str:
    value, low, high = (tables.number(figure[key], 3) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
