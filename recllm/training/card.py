"""The model card of a run: README.md with what was trained, on which data, how well, and how to load it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, write_file

_METHODS = {
    "qlora": "QLoRA: LoRA on a language model in 4 bits (NF4, double quantization)",
    "lora": "LoRA",
    "full": "full fine-tuning",
}
_NAMES = {
    "auc": "AUC",
    "hr@1": "HR@1",
    "ndcg@10": "NDCG@10",
    "outside": "probability outside yes and no",
    "seconds": "seconds of one validation",
}


def write_card(run: Path) -> None:
    """Writes a run's README.md from its manifest.json and metrics.json; no other file is read.

    The front matter is the hub's: `base_model` is set where the base has a place on the hub. Whatever comes
    from data or options is escaped.

    Args:
        run: The run's folder.

    Raises:
        DataError: One of the two files is missing or is not a run's.
    """
    manifest = read_json(run / MANIFEST, "a run's folder")
    metrics = read_json(run / "metrics.json", "a run's folder")
    try:
        text = _front_matter(manifest) + "\n".join(_sections(run, manifest, metrics))
    except KeyError as error:
        raise DataError(f"{run}: manifest.json or metrics.json has no {error}; train the run again") from None
    write_file(run / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def escaped(text: Any) -> str:
    """Returns text as one line that Markdown and HTML show as it stands."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#!|~$])", r"\\\1", line)


def fenced(text: str, language: str = "") -> str:
    """Returns text as a block of code that nothing in the text can end."""
    text = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _front_matter(manifest: Mapping[str, Any]) -> str:
    import yaml

    full = manifest["settings"]["method"] == "full"
    content: dict[str, Any] = {
        "library_name": "transformers" if full else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["recommendation", "multimodal", "sft", "recllm"] + ([] if full else ["lora"]),
    }
    if "revision" in manifest["model"]:
        content["base_model"] = manifest["model"]["model"]
        content["base_model_relation"] = "finetune" if full else "adapter"
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n\n"


def _sections(run: Path, manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    import yaml

    settings = manifest["settings"]
    return [
        f"# {escaped(run.resolve().name)}",
        "",
        f"{escaped(base_of(manifest))}, fine-tuned to say for a user and an item whether the user will "
        "choose the item: the margin between the answers yes and no ranks candidates. "
        f"{_METHODS[settings['method']]}; made by recllm.",
        "",
        "## Validation",
        "",
        f"On the validation lists, with the weights of step {int(metrics['best_step'])}, which had the "
        "highest validation AUC. No test data was read.",
        "",
        *table(
            ["metric", "value"], [[_NAMES.get(key, key), value] for key, value in metrics["valid"].items()]
        ),
        "",
        "![Validation by step](auc.png) ![Training loss by step](loss.png)",
        "",
        "## Data",
        "",
        *table(["instructions", ""], flat(_without_place(manifest["instructions"]))),
        "",
        "## What was trained",
        "",
        *table(["part", "parameters", "trained"], manifest["parts"]),
        "",
        "## How to load",
        "",
        *_loading(run, settings),
        "",
        "## Settings",
        "",
        fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(), "yaml"),
        "",
        "## How it was made",
        "",
        fenced(shlex.join(manifest["run"]["command"]), "bash"),
        "",
        *table(["", ""], flat({key: value for key, value in manifest["run"].items() if key != "command"})),
        "",
    ]


def base_of(manifest: Mapping[str, Any]) -> str:
    """Returns a run's base model and which state of it, in words."""
    model = manifest["model"]
    if "revision" in model:
        return f"{model['model']} (revision {model['revision']})"
    return f"{model['model']} (fingerprint {model['fingerprint']})"


def _loading(run: Path, settings: Mapping[str, Any]) -> list[str]:
    here = settings.get("push_to_hub") or str(run)
    base = settings["model"]
    if settings["method"] == "full":
        ours = f"from recllm.mllm import load\n\nloaded = load({here!r})"
        plain = f"model = AutoModelForImageTextToText.from_pretrained({here!r}, dtype='auto')"
        imports = ""
    else:
        quantization = ", quantization='nf4'" if settings["method"] == "qlora" else ""
        ours = f"from recllm.mllm import load\n\nloaded = load({base!r}, adapter={here!r}{quantization})"
        folder = "  # the folder that `recllm model tiny` prints" if base == "tiny" else ""
        plain = (
            f"base = {base!r}{folder}\n"
            "model = AutoModelForImageTextToText.from_pretrained(base, dtype='auto')\n"
            f"model = PeftModel.from_pretrained(model, {here!r})"
        )
        imports = "from peft import PeftModel\n"
    transformers = (
        f"{imports}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f"processor = AutoProcessor.from_pretrained({here!r})\n{plain}"
    )
    score = f"python eval/score_yes_no.py DATASET/instructions/NAME --run {shlex.quote(here)}"
    export = f"recllm export {shlex.quote(here)} OUT"
    return [
        fenced(ours, "python"),
        "",
        "Or without recllm" + (", here with the base as it was saved and not in 4 bits:" if imports else ":"),
        "",
        fenced(transformers, "python"),
        "",
        "To score candidates, and to write a model of its own with everything merged:",
        "",
        fenced(f"{score}\n{export}", "bash"),
    ]


def _without_place(instructions: Mapping[str, Any]) -> dict[str, Any]:
    """What the rows came from; a card may be published, and where the dataset lies is nobody's business."""
    place = instructions.get("dataset")
    return {**instructions, "dataset": Path(place).name} if place else dict(instructions)


def flat(content: Mapping[str, Any], prefix: str = "") -> list[list[Any]]:
    """Returns nested settings as rows of two cells."""
    rows: list[list[Any]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key} / ")
        else:
            rows.append([f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else value])
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a table in Markdown, its cells escaped."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(escaped(_shown(value)) for value in row)} |" for row in rows]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
