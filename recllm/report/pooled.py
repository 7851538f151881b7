"""The sections made from scores: ROC, precision-recall, calibration, ties, answers neither yes nor no."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recllm.evaluation import calibration, tables
from recllm.evaluation.diagnostics import brier, log_loss
from recllm.report import measures, page, plots
from recllm.report.inputs import Inputs
from recllm.report.ledger import Ledger
from recllm.report.page import Section
from recllm.report.text import describe, inline


def curves_section(inputs: Inputs, shown: Mapping[str, str], ledger: Ledger) -> Section:
    """ROC and precision-recall curves over the pooled rows."""
    title = "ROC and precision-recall"
    if not inputs.scored:
        return Section(
            "curves",
            title,
            page.missing(
                "Not shown: it needs score files with <code>--candidates</code>; rank records have no scores."
            ),
        )
    curves = {shown[one.name]: measures.curve(one.score, one.label) for one in inputs.scored}
    files = inputs.with_candidates([one.path for one in inputs.scored])
    rows = len(inputs.scored[0].label)
    body = page.note(
        f"Pooled over all {rows:,} candidate rows of all users: this asks whether a score means the same "
        "from one user to the next. The AUC of the main table compares within each user's list and does not."
    ) + _absent(inputs, shown)
    kinds = {
        "roc": (
            "ROC curves over the pooled rows",
            "Dashed: guessing.",
            {name: f"area {one.area:.3f}" for name, one in curves.items()},
        ),
        "pr": (
            "Precision over recall of the pooled rows",
            "Dashed: the share of positives.",
            {name: f"average precision {one.average_precision:.3f}" for name, one in curves.items()},
        ),
    }
    drawings = [
        ledger.figure(
            f"curve-{kind}",
            what,
            files,
            plots.pooled_curves(f"curve-{kind}", curves, kind, describe(what, said)),
            caption,
        )
        for kind, (what, caption, said) in kinds.items()
    ]
    return Section("curves", title, body + page.figures(drawings))


def calibration_section(inputs: Inputs, shown: Mapping[str, str], ledger: Ledger) -> Section:
    """Whether probabilities are true: reliability diagrams, Brier score, expected calibration error."""
    title = "Calibration"
    scored = [one for one in inputs.scored if one.probability is not None]
    if not scored:
        return Section(
            "calibration",
            title,
            page.missing("Not shown: no score file has a column <code>probability</code>."),
        )
    rows, drawings, folds = [], [], []
    for place, one in enumerate(scored):
        name, p = shown[one.name], np.asarray(one.probability)
        bins = calibration(p, one.label)
        loss = log_loss(p, one.label)
        base = float(one.label.mean())
        rows.append(
            [
                inline(name),
                *(tables.number(x) for x in (brier(p, one.label), base * (1 - base), bins.error)),
                tables.number(loss) if np.isfinite(loss) else "∞",
                tables.number(float(p.mean())),
                tables.number(base),
            ]
        )
        what = f"Reliability of the probabilities of {name}"
        files = inputs.with_candidates([one.path])
        anchor = f"reliability-{place + 1}"
        about = describe(what, {"expected calibration error": f"{bins.error:.3f}"})
        drawings.append(
            ledger.figure(
                anchor,
                what,
                files,
                plots.reliability(anchor, bins, about),
                "Below: how many rows each bin has.",
            )
        )
        lines = [
            [f"{low:.3f}–{high:.3f}", f"{count:,}", tables.number(confidence), tables.number(frequency)]
            for low, high, count, confidence, frequency in zip(
                bins.lower, bins.upper, bins.count, bins.confidence, bins.frequency, strict=True
            )
        ]
        folds.append(
            page.fold(
                f"Bins of {inline(name)}",
                page.table(
                    ["probability", "rows", "mean probability", "share of positives"],
                    lines,
                    caption=f"Reliability of {inline(name)}",
                ),
            )
        )
    number = ledger.table(
        "table-calibration", "Calibration", inputs.with_candidates([one.path for one in scored])
    )
    head = [
        "system",
        "Brier",
        "Brier of the base rate",
        "ECE",
        "log loss",
        "mean probability",
        "share of positives",
    ]
    body = page.table(
        head,
        rows,
        caption=f"<b>{number}.</b> Probabilities against labels, pooled over candidate rows.",
        anchor="table-calibration",
    )
    body += page.note(
        "Brier: mean squared difference of probability and label. ECE: over 15 bins of equal width, the mean "
        "absolute difference of mean probability and share of positives, weighted by rows (Guo et al. 2017). "
        "A model trained with another share of positives than the lists have is off by that much, without "
        "ranking any worse."
    )
    return Section("calibration", title, body + page.figures(drawings) + "".join(folds))


def trust_section(inputs: Inputs, table: tables.Table, shown: Mapping[str, str], ledger: Ledger) -> Section:
    """What a ranking does not show: ties, and answers that are neither yes nor no."""
    by_name = {one.name: one for one in inputs.scored}
    rows = []
    for system in inputs.systems:
        name = system.records.system
        outside = by_name[name].outside if name in by_name else None
        facts = (
            [
                f"{outside.mean():.4f}",
                f"{np.quantile(outside, 0.95):.4f}",
                f"{outside.max():.4f}",
                f"{(outside > 0.5).mean():.2%}",
            ]
            if outside is not None
            else ["-"] * 4
        )
        rows.append([inline(shown[name]), f"{table.facts['systems'][name]['tie_rate']:.4f}", *facts])
    number = ledger.table(
        "table-trust", "Ties and answers outside yes and no", inputs.with_candidates(inputs.score_files)
    )
    head = ["system", "tie rate", "mean outside", "95th percentile", "largest", "rows with more than half"]
    body = page.table(
        head,
        rows,
        caption=f"<b>{number}.</b> Ties, and probability mass outside yes and no.",
        anchor="table-trust",
    )
    body += page.note(
        "Tie rate: share of positives that have the score of a negative; every metric is the expected value "
        "over random orders of the tied. Outside: probability that the model gives to answers that are "
        "neither yes nor no. Where it is high, the margin of yes over no is one between two things that the "
        "model would not say. A dash: the file has no such column."
    )
    return Section("trust", "Ties and stray answers", body)


def _absent(inputs: Inputs, shown: Mapping[str, str]) -> str:
    with_scores: set[str] = {one.name for one in inputs.scored}
    absent = [
        inline(shown[one.records.system]) for one in inputs.systems if one.records.system not in with_scores
    ]
    return (
        page.note(f"Missing here, as they came as rank records without scores: {', '.join(absent)}.")
        if absent
        else ""
    )
