"""completions.html: items with their picture, sampled answers, each part of their reward, advantages."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recllm.files import write_file
from recllm.mllm.vision.images import ImageError, load_image

if TYPE_CHECKING:
    from recllm.training.grpo.steps import TrainingData

_SHOWN_STEPS, _SHOWN_PROMPTS, _LONGEST = 4, 3, 300
_THUMBNAIL = 96 * 96
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.4rem 0 1.6rem;font-variant-numeric:tabular-nums}
td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left;max-width:34rem;overflow-wrap:anywhere}
th{font-weight:600;vertical-align:bottom}img{vertical-align:middle;margin-right:.8rem;border-radius:3px}
.cut{color:#a33}h2{margin-top:2.2rem}
"""


def write_page(
    path: Path,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    data: TrainingData,
) -> None:
    """Writes the page: one file, without scripts and without anything that is fetched.

    Args:
        path: Where to.
        manifest: The run's manifest.
        metrics: Its metrics.
        samples: Lines of completions.jsonl.
        held_out: Lines of held_out.jsonl.
        data: The prompts, for pictures and titles.
    """
    names = list(data.rewards.names)
    best = metrics["best_step"]
    body = [
        f"<h1>{escape(path.resolve().parent.name)}: what was written, and what it was worth</h1>",
        f"<p>{escape(str(manifest['settings']['model']))}, task {escape(manifest['settings']['task'])}. "
        "Weights: "
        + ", ".join(f"{escape(name)} {weight:g}" for name, weight in data.rewards.settings.weights.items())
        + ".</p>",
        f"<h2>Held-out items, before training and at step {best}</h2>",
        *_held_out(held_out, best, names, data),
    ]
    steps = sorted({line["step"] for line in samples})
    chosen = (
        [steps[round(place * (len(steps) - 1) / (_SHOWN_STEPS - 1))] for place in range(_SHOWN_STEPS)]
        if steps
        else []
    )
    for step in dict.fromkeys(chosen):
        body.append(f"<h2>Sampled for step {step}</h2>")
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for line in samples:
            if line["step"] == step:
                groups.setdefault(line["id"], []).append(line)
        for id_, lines in list(groups.items())[:_SHOWN_PROMPTS]:
            body.append(_heading(id_, lines[0]["item"], data))
            ordered = sorted(lines, key=lambda line: -line["advantage"])
            rows = [_row(line, names, f"{line['advantage']:+.2f}") for line in ordered]
            body.append(_table([*names, "advantage"], rows))
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Completions</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _held_out(
    lines: Sequence[Mapping[str, Any]], best: int, names: Sequence[str], data: TrainingData
) -> list[str]:
    before = {line["id"]: line for line in lines if line["step"] == 0}
    after = {line["id"]: line for line in lines if line["step"] == best}
    parts = []
    for id_ in list(after)[: 2 * _SHOWN_PROMPTS]:
        pair = [before[id_], after[id_]] if id_ in before else [after[id_]]
        parts.append(_heading(id_, after[id_]["item"], data))
        rows = [_row(line, names, _number(line["rewards"].get("reward"))) for line in pair]
        parts.append(_table([*names, "reward"], rows))
    return parts


def _heading(id_: str, item: str, data: TrainingData) -> str:
    sources = {source.id: source for source in (*data.rows.train, *data.rows.valid)}
    source = sources[id_]
    picture = _thumbnail(data.rows.dataset.folder / source.images[0]) if source.images else ""
    return f"<h3>{picture}{escape(id_)}</h3>"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in heads)
    return f"<table><tr><th>answer</th>{cells}</tr>{''.join(rows)}</table>"


def _row(line: Mapping[str, Any], names: Sequence[str], last: str) -> str:
    text = line["text"] if len(line["text"]) <= _LONGEST else line["text"][:_LONGEST] + "…"
    cut = "" if line["finished"] else ' <span class="cut">(cut off)</span>'
    cells = "".join(f"<td>{_number(line['rewards'].get(name))}</td>" for name in names)
    return f"<tr><td>{escape(text) or '<i>empty</i>'}{cut}</td>{cells}<td>{last}</td></tr>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _thumbnail(path: Path) -> str:
    try:
        image = load_image(path, max_pixels=_THUMBNAIL)
    except ImageError:
        return ""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
