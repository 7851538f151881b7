"""The curves of a GRPO run as one picture: rewards, divergence, length, dead groups, faults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recllm.errors import DataError
from recllm.files import read_json, write_file
from recllm.runs.log import read_log
from recllm.training.curves import smoothed

_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#8c510a", "#762a83", "#666666", "#b2182b"),
)
_FAULTS = ("empty", "truncated", "repeating", "copied", "invalid", "repeated", "wrong")


def draw_curves(run: Path, parts: Sequence[str]) -> None:
    """Draws `curves.png` from a run's log.jsonl; the step that metrics.json chose is marked.

    Args:
        run: The run's folder.
        parts: The names of the reward's parts.

    Raises:
        DataError: The log holds no step and no validation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(run / "log.jsonl")
    if not lines:
        raise DataError(f"{run / 'log.jsonl'}: nothing in it to draw")
    best = None
    if (run / "metrics.json").is_file():
        best = read_json(run / "metrics.json", "a run's folder")["best_step"]
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels: list[tuple[str, str, list[tuple[str, str]], bool]] = [
        (
            "Held-out items, greedy",
            "mean",
            [("valid_reward", "all parts")] + [(f"valid_{name}", name) for name in parts],
            False,
        ),
        (
            "Sampled answers",
            "mean of each part",
            [(f"rewards/{name}/mean", name) for name in parts],
            True,
        ),
        ("Divergence from the base model", "nats a token", [("kl", "KL"), ("entropy", "entropy")], True),
        (
            "Length of sampled answers",
            "tokens",
            [("completions/mean_length", "mean"), ("completions/max_length", "longest")],
            True,
        ),
        (
            "Dead groups",
            "share of groups",
            [(f"dead_groups/{name}", name) for name in (*parts, "all")],
            True,
        ),
        (
            "Faults of sampled answers",
            "share of answers",
            [(f"faults/{name}", name) for name in _FAULTS],
            True,
        ),
    ]
    for axes, (title, label, curves, smooth) in zip(figure.subplots(3, 2).flat, panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
        for place, (key, name) in enumerate(curves):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                steps, values = map(list, zip(*points, strict=True))
                shown = smoothed(values) if smooth and len(values) > 25 else values
                mark = "." if len(values) <= 25 else ""
                number = parts.index(name) if name in parts else place
                color = "black" if name.startswith("all") else _COLORS[number % len(_COLORS)]
                axes.plot(steps, shown, color=color, linewidth=1.5, marker=mark, label=_plain(name))
        if best is not None:
            axes.axvline(best, color="#666666", linewidth=0.8)
        axes.set_title(title, loc="left")
        axes.set_ylabel(label)
        axes.set_xlabel("optimizer step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    canvas = FigureCanvasAgg(figure)
    write_file(
        run / "curves.png",
        lambda temporary: canvas.print_png(str(temporary), metadata={"Software": None}),
    )


def _plain(text: str) -> str:
    return text.replace("$", r"\$").replace("_", " ")
