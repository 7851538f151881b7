"""The curves of a run as two small pictures: training loss, and validation metrics with the chosen step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recllm.errors import DataError
from recllm.files import read_json, write_file
from recllm.runs.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GRAY = "#0072b2", "#d55e00", "#666666"  # Okabe and Ito: told apart by colorblind readers
_SMOOTHED_FROM = 25  # logged steps
_NAME_LENGTH = 48


def draw_curves(run: Path) -> None:
    """Draws `loss.png` and `auc.png` from a run's log.jsonl; the step that metrics.json chose is marked.

    Args:
        run: The run's folder. Where metrics.json is not there yet, no step is marked.

    Raises:
        DataError: The log holds neither a loss nor a validation.
    """
    lines = read_log(run / "log.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_auc" in line]
    if not losses and not valid:
        raise DataError(f"{run / 'log.jsonl'}: no loss and no validation in it, so there is nothing to draw")
    best = None
    if (run / "metrics.json").is_file():
        best = read_json(run / "metrics.json", "a run's folder")["best_step"]
    name = _plain(run.resolve().name)
    _save(run / "loss.png", lambda axes: _draw_loss(axes, name, losses, best))
    _save(run / "auc.png", lambda axes: _draw_auc(axes, name, valid, best))


def smoothed(values: list[float], share: float = 0.05) -> list[float]:
    """Returns the running mean over the latest `share` of all values, at least five of them."""
    width = max(5, round(len(values) * share))
    return [
        sum(values[max(0, place - width + 1) : place + 1]) / min(width, place + 1)
        for place in range(len(values))
    ]


def _draw_loss(axes: Axes, name: str, losses: list[tuple[int, float]], best: int | None) -> None:
    steps, values = [step for step, _ in losses], [value for _, value in losses]
    many = len(values) >= _SMOOTHED_FROM
    mark = "." if len(values) < _SMOOTHED_FROM else ""
    axes.plot(
        steps, values, color=_BLUE, alpha=0.35 if many else 1, linewidth=1.2, marker=mark, label="logged"
    )
    if many:
        axes.plot(steps, smoothed(values), color=_BLUE, linewidth=2, label="running mean")
        axes.legend(frameon=False)
    if best is not None and losses:
        _mark_step(axes, best)
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_title(f"{name}: training loss", loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy of a completion token (nats)")


def _draw_auc(axes: Axes, name: str, valid: list[dict[str, Any]], best: int | None) -> None:
    steps = [line["step"] for line in valid]
    curves = [("valid_auc", "AUC", _BLUE, "o")]
    if all("valid_ndcg@10" in line for line in valid):
        curves.append(("valid_ndcg@10", "NDCG@10", _ORANGE, "s"))
    for key, label, color, mark in curves:
        axes.plot(
            steps,
            [line[key] for line in valid],
            color=color,
            marker=mark,
            markersize=4,
            label=label,
            clip_on=False,
        )
    axes.axhline(0.5, color=_GRAY, linewidth=0.8, linestyle=":")
    axes.annotate(
        "AUC by chance", (1, 0.5), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
        color=_GRAY, fontsize=8, ha="right",
    )  # fmt: skip
    if best is not None and best in steps:
        _mark_step(axes, best)
        auc = valid[steps.index(best)]["valid_auc"]
        axes.plot([best], [auc], "o", markersize=10, markerfacecolor="none", color=_BLUE, clip_on=False)
    axes.set_ylim(0, 1)
    if valid:
        axes.legend(frameon=False, loc="lower right")
    axes.set_title(f"{name}: validation lists", loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean over lists")


def _mark_step(axes: Axes, step: int) -> None:
    axes.axvline(step, color=_GRAY, linewidth=0.8)
    axes.annotate(
        f"best: step {step}", (step, 1), (0, 2), xycoords=("data", "axes fraction"),
        textcoords="offset points", color=_GRAY, fontsize=8, ha="center", annotation_clip=False,
    )  # fmt: skip


def _save(path: Path, draw: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    draw(axes)
    axes.title.set_y(1.05)  # clear of the mark of the best step
    canvas = FigureCanvasAgg(figure)
    write_file(path, lambda temporary: canvas.print_png(str(temporary), metadata={"Software": None}))


def _plain(text: str) -> str:
    short = text if len(text) <= _NAME_LENGTH else text[: _NAME_LENGTH - 1] + "…"
    return short.replace("$", r"\$")  # which would begin a formula
