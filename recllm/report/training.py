"""The section on fine-tuning: loss, validation by ranking, the step that was kept, and what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recllm.files import MANIFEST
from recllm.report import page, plots
from recllm.report.inputs import Inputs
from recllm.report.ledger import Ledger
from recllm.report.page import Section
from recllm.report.text import clean, escape, inline
from recllm.runs.reading import Run, finite

_LOSSES = (("loss", "training"), ("eval_loss", "validation"), ("valid_loss", "validation"))
_RANKING = (("valid_auc", "AUC"), ("valid_ndcg@10", "NDCG@10"))
_AVL = (
    (
        "avl-losses",
        "Losses of one modality",
        (("avl_loss_image", "vision-only"), ("avl_loss_text", "text-only")),
        "loss",
        "AVL's two passes without gradients: without texts, and without images. Means over an epoch.",
    ),
    (
        "avl-gaps",
        "Gaps between images and texts",
        (("avl_gap", "of a batch"), ("avl_reference", "of all steps")),
        "gap",
        "The exponential of vision-only minus text-only loss: mean over an epoch, and of the mean losses.",
    ),
    (
        "avl-k",
        "K of AVL",
        (("avl_k", "mean"), ("avl_k_min", "least"), ("avl_k_max", "most"), ("avl_k_text", "texts")),
        "K",
        "What scales images in training: above 1 in steps whose gap is above that of all steps.",
    ),
)
_TOLD = (
    "ranker", "loss", "negatives", "text", "image", "without", "avl", "avl_alpha", "avl_mean", "avl_decay",
    "model", "revision", "method", "lora_rank", "lora_alpha", "learning_rate", "schedule", "epochs",
    "max_steps", "batch_size", "accumulation", "seed", "instructions", "valid_users",
)  # fmt: skip
_OF_ADAPTERS = {"lora_rank", "lora_alpha"}


def training_section(inputs: Inputs, ledger: Ledger) -> Section:
    """Curves and facts of each run."""
    if not inputs.runs:
        line = page.missing(
            "Not shown: name run folders (runs/NAME) among the files, and their curves stand here."
        )
        return Section("training", "Training", line)
    return Section(
        "training", "Training", "".join(_run(run, place, ledger) for place, run in enumerate(inputs.runs, 1))
    )


def _run(run: Run, place: int, ledger: Ledger) -> str:
    name = clean(run.name, 60)
    groups = (
        (
            "loss",
            "Loss",
            _LOSSES,
            "loss",
            "Each point is the mean since the one before, as the run logged it.",
        ),
        (
            "valid",
            "Validation by ranking",
            _RANKING,
            "validation metric",
            "The weights of the marked step were kept; the test part was not looked at.",
        ),
    )
    if len(run.curve("avl_k")[0]):
        groups += _AVL
    drawings = []
    for kind, title, wanted, axis, caption in groups:
        curves = [(label, *run.curve(key)) for key, label in wanted]
        curves = [one for one in curves if len(one[1])]
        if not curves:
            drawings.append(page.missing(f"The log of {inline(name)} has no {escape(axis)}."))
            continue
        anchor = f"training-{place}-{kind}"
        what = f"{title} of {name}"
        ends = "; ".join(f"{label} {values[0]:.3f} to {values[-1]:.3f}" for label, _, values in curves)
        svg = plots.training(
            anchor,
            curves,
            run.best_step if kind == "valid" else None,
            axis,
            clean(f"{what}. {ends}", 600),
            run.unit,
        )
        drawings.append(
            ledger.figure(anchor, what, [run.log_path, run.folder / "metrics.json"], svg, caption)
        )
    ledger.passage(f"run-{place}", f"Facts of {name}", [run.folder / MANIFEST, run.folder / "metrics.json"])
    return (
        f'<h3 id="run-{place}">Run {inline(name)}</h3>'
        + page.facts(_facts(run))
        + page.figures(drawings)
        + _parts(run)
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    settings = run.manifest.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    unused = set(_OF_ADAPTERS) if settings.get("method") == "full" else set()
    unused |= {"negatives"} if settings.get("loss") in (None, "ce") else set()
    unused |= {"valid_users"} if settings.get("valid_users") == 0 else set()  # all of them
    unused |= {"epochs"} if settings.get("max_steps") is not None else set()
    pairs = [
        ("users validated" if key == "valid_users" else key.replace("_", " "), inline(settings[key], 120))
        for key in _TOLD
        if settings.get(key) is not None and key not in unused
    ]
    pairs.append((f"{run.unit} kept", "-" if run.best_step is None else f"{run.best_step:,.0f}"))
    steps = [step for line in run.log if (step := finite(line.get("step"))) is not None]
    pairs.append((f"last {run.unit}", f"{max(steps):,.0f}" if steps else "-"))
    valid = run.metrics.get("valid")
    for key, value in valid.items() if isinstance(valid, Mapping) else ():
        number = finite(value)
        pairs.append((f"validation {key}", inline(value, 40) if number is None else f"{number:.4f}"))
    return pairs


def _parts(run: Run) -> str:
    """What of the model was trained, as the run checked it."""
    rows = [
        _part(entry)
        for entry in run.manifest.get("parts") or []
        if isinstance(entry, list) and len(entry) == 3
    ]
    if not rows:
        return ""
    return page.table(["part", "parameters", "trained"], rows, caption="What was trained")


def _part(entry: list[Any]) -> list[str]:
    return [
        inline(entry[0], 80),
        *(f"{number:,.0f}" if (number := finite(each)) is not None else "-" for each in entry[1:]),
    ]
