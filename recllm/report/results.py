"""The sections made from ranks: the main table, the ablation, metrics over the cutoff and the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data.user_histories import UserHistories
from recllm.evaluation import compute_metrics, tables
from recllm.report import measures, page, plots
from recllm.report.headline import figures_of, headline_metrics, spelled
from recllm.report.inputs import Inputs
from recllm.report.ledger import Ledger
from recllm.report.page import Section
from recllm.report.text import describe, escape, inline, shown_names

_LARGEST_K = 20


def main_section(inputs: Inputs, table: tables.Table, shown: Mapping[str, str], ledger: Ledger) -> Section:
    """The table of `recllm eval ranks`, and its two leading metrics drawn."""
    files = inputs.with_candidates(inputs.score_files)
    number = ledger.table("table-main", "Metrics of every system", files)
    body = grid(
        table,
        shown,
        f"<b>{number}.</b> Metrics with 95% intervals{'; the best of each row is bold' * bool(table.bold)}.",
        "table-main",
    )
    body += _drawn(table, shown, "main", files, ledger, guess=_guess(inputs), bars=False)
    return Section("results", "Results", f'<div class="beside">{body}</div>' + notes(table))


def ablation_section(
    inputs: Inputs, table: tables.Table | None, main: tables.Table, ledger: Ledger
) -> Section:
    """The modality ablation (MLLM-SRec, table 4): a table, bars, and the notes that `main` has not."""
    title = "What each modality adds"
    if table is None:
        line = page.missing(
            "Not shown: <code>--ablation image=FILE text=FILE both=FILE</code> names the systems of it."
        )
        return Section("ablation", title, line)
    shown = shown_names(table.columns[1:])
    files = inputs.with_candidates([system.path for system in inputs.ablation])
    number = ledger.table("table-ablation", "Modality ablation", files)
    caption = (
        f"<b>{number}.</b> Modality ablation: the same method with less to see (table 4 of MLLM-SRec). "
        "Tests are corrected over this table alone."
    )
    body = grid(table, shown, caption, "table-ablation")
    body += _drawn(table, shown, "ablation", files, ledger, guess=_guess(inputs), bars=True)
    told = notes(table, main.notes)
    return Section("ablation", title, f'<div class="beside">{body}</div>' + told)


def cutoff_section(inputs: Inputs, shown: Mapping[str, str], ledger: Ledger) -> Section:
    """HR and NDCG over the cutoff, with a random order for comparison."""
    ks = range(1, _LARGEST_K + 1)
    guess = measures.over_cutoffs(measures.in_random_order(inputs.systems[0].records), ks)
    lines = {shown[one.records.system]: measures.over_cutoffs(one.records, ks) for one in inputs.systems}
    files = inputs.with_candidates(inputs.score_files)
    drawings = []
    for metric in ("hr", "ndcg"):
        title = f"{spelled(metric)}@k of each system over the cutoff k"
        svg = plots.over_cutoffs(
            f"cutoff-{metric}",
            list(ks),
            {name: values[metric] for name, values in lines.items()},
            guess[metric],
            f"{spelled(metric)}@k",
            describe(title, {name: f"{values[metric][9]:.3f} at 10" for name, values in lines.items()}),
        )
        drawings.append(ledger.figure(f"cutoff-{metric}", title, files, svg, "Means over users."))
    return Section("cutoffs", "Over the cutoff", page.figures(drawings))


def history_section(
    inputs: Inputs, table: tables.Table, shown: Mapping[str, str], ledger: Ledger, resamples: int, seed: int
) -> Section:
    """The leading metrics over how much is known of a user."""
    title = "Over the length of the history"
    dataset, split = inputs.dataset, inputs.split
    if dataset is None or split is None:
        return Section(
            "history",
            title,
            page.missing("Not shown: <code>--dataset</code> tells how much is known of each user."),
        )
    users = compute_metrics(inputs.systems[0].records, names=["auc"]).per_user()["user"]
    part = "valid" if inputs.protocol.endswith("/valid") else "test"
    known = known_interactions(inputs, users, part)
    bins = measures.history_bins(known)
    files = inputs.with_candidates(inputs.score_files)
    files += [split.folder / f"{name}.parquet" for name in ("train", "valid", "test")]
    names = headline_metrics(table)
    values = {
        name: {
            shown[one.records.system]: measures.by_bin(
                compute_metrics(one.records, names=[name]), name, users, bins, resamples=resamples, seed=seed
            )
            for one in inputs.systems
        }
        for name in names
    }
    drawings, rows = [], []
    for name in names:
        anchor, what = (
            f"history-{name.replace('@', '-')}",
            f"{spelled(name)} by how many interactions of a user are known",
        )
        svg = plots.by_history(
            anchor,
            bins,
            values[name],
            spelled(name),
            describe(
                what,
                {system: f"{line[0, 0]:.3f} to {line[-1, 0]:.3f}" for system, line in values[name].items()},
            ),
        )
        drawings.append(
            ledger.figure(
                anchor, what, files, svg, "Bins of about equally many users; 95% bootstrap intervals."
            )
        )
        for system, line in values[name].items():
            rows.append([f"{spelled(name)}, {inline(system)}", *(_interval(*row) for row in line)])
    number = ledger.table("table-history", "Metrics by history length", files)
    head = [
        "known interactions",
        *(f'{one.label} <span class="interval">{len(one.users):,} users</span>' for one in bins),
    ]
    body = page.figures(drawings) + page.fold(
        "The same as a table",
        page.table(
            head,
            rows,
            caption=f"<b>{number}.</b> Means over users with 95% intervals.",
            kind="results",
            anchor="table-history",
        ),
    )
    return Section("history", title, body)


def known_interactions(inputs: Inputs, users: pl.Series, part: str) -> np.ndarray:
    """Returns for each of `users` [U] how many interactions are known before the first of its targets."""
    assert inputs.dataset is not None and inputs.split is not None
    counts = UserHistories.of(inputs.split, part).before_first_target()
    table = inputs.dataset.users.select("user").with_columns(known=pl.Series(counts))
    return (
        pl.DataFrame({"user": users})
        .join(table, on="user", how="left", maintain_order="left")["known"]
        .to_numpy()
    )


def grid(table: tables.Table, shown: Mapping[str, str], caption: str, anchor: str) -> str:
    """Returns a table of evaluation as HTML, figure by figure as it stands there."""
    rows = [
        [escape(_metric(row[0])), *(_cell(text, (r, c) in table.bold) for c, text in enumerate(row[1:], 1))]
        for r, row in enumerate(table.rows)
    ]
    head = ["", *(inline(shown[name]) for name in table.columns[1:])]
    return page.table(head, rows, caption=caption, kind="results", anchor=anchor)


def notes(table: tables.Table, known: Sequence[str] = ()) -> str:
    """Returns the notes of a table of evaluation, less those that the reader knows."""
    return "".join(page.note(escape(text, 600)) for text in table.notes if text not in known)


def _metric(name: str) -> str:
    return spelled(name) if "@" in name or name in ("mrr", "map", "auc") else name.replace("auc", "AUC")


def _cell(text: str, best: bool) -> str:
    """`0.5785 [0.5502, 0.6048]†` as a figure with its interval below."""
    value, bracket, rest = text.partition(" [")
    interval, _, mark = rest.partition("]")
    body = f'<strong class="best">{escape(value)}</strong>' if best else escape(value)
    return body + (escape(mark) + f' <span class="interval">[{escape(interval)}]</span>' if bracket else "")


def _interval(value: float, low: float, high: float) -> str:
    return (
        f'{tables.number(value)} <span class="interval">[{tables.number(low)}, {tables.number(high)}]</span>'
    )


def _drawn(
    table: tables.Table,
    shown: Mapping[str, str],
    name: str,
    files: Sequence[Path],
    ledger: Ledger,
    *,
    guess: Mapping[str, float],
    bars: bool,
) -> str:
    drawings = []
    for metric in headline_metrics(table):
        figures = [{**one, "name": shown[system]} for system, one in figures_of(table, metric).items()]
        figures = [one for one in figures if not np.isnan(one["value"])]
        if not figures:
            continue
        anchor = f"{name}-{metric.replace('@', '-')}"
        title = f"{spelled(metric)} with 95% intervals"
        about = describe(title, {one["name"]: f"{one['value']:.3f}" for one in figures})
        svg = plots.intervals(anchor, figures, spelled(metric), about, bars=bars, guess=guess.get(metric))
        drawings.append(ledger.figure(anchor, title, files, svg))
    return page.figures(drawings)


def _guess(inputs: Inputs) -> dict[str, float]:
    records = measures.in_random_order(inputs.systems[0].records)
    return compute_metrics(records, ks=(1, 5, 10, 20)).mean()
