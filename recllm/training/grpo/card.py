"""The model card of a GRPO run: README.md with what was tuned, how well, and how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recllm.files import write_file
from recllm.training.card import base_of, escaped, fenced, flat, table

_WRITES = {
    "keywords": "the keywords of an item's image and of its text (MMSRARec, stage 1)",
    "viu": "what an item's image shows (MLLM-SRec, equation 1)",
    "imsg": "a summary of an item's image and text (MLLM-SRec, equation 2)",
    "choose": "which of some candidates a user will choose next (MMSRARec, stage 3), paid by rank",
}
_SYSTEMS = {"keywords": "mmsrarec", "viu": "mllm_srec", "imsg": "mllm_srec"}


def write_card(run: Path, manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Writes a run's README.md; whatever comes from data or options is escaped.

    Args:
        run: The run's folder.
        manifest: Its manifest.
        metrics: Its metrics.
    """
    text = _front_matter(manifest) + "\n".join(_sections(run, manifest, metrics))
    write_file(run / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _front_matter(manifest: Mapping[str, Any]) -> str:
    import yaml

    content: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["recommendation", "multimodal", "grpo", "recllm", "lora"],
    }
    if "revision" in manifest["model"]:
        content["base_model"] = manifest["model"]["model"]
        content["base_model_relation"] = "adapter"
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n\n"


def _sections(run: Path, manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    import yaml

    settings, data = manifest["settings"], dict(manifest["data"])
    data["dataset"] = Path(data["dataset"]).name  # where it lies is nobody's business
    before, after = metrics["untrained"], metrics["valid"]
    better = after[metrics["metric"]] > before[metrics["metric"]]
    use = _usage(settings, settings.get("push_to_hub") or str(run))
    return [
        f"# {escaped(run.resolve().name)}",
        "",
        f"{escaped(base_of(manifest))}, tuned by group relative policy optimization to write "
        f"{_WRITES[settings['task']]}; made by recllm.",
        "",
        "## Held-out items",
        "",
        f"Answered greedily, before training and with the weights of step {int(metrics['best_step'])}, which "
        f"had the highest {escaped(metrics['metric'])} of all checkpoints. The items were never trained on."
        + ("" if better else " **No step was better than the model before training.**"),
        "",
        *table(
            ["", "before", "after"],
            [[name, before.get(name, ""), value] for name, value in after.items() if name != "seconds"],
        ),
        "",
        "![Curves by step](curves.png)",
        "",
        "completions.html shows sampled answers with each part of their reward.",
        "",
        "## How to use",
        "",
        use,
        "",
        "## Data",
        "",
        *table(["made from", ""], flat(data)),
        "",
        "## What was trained",
        "",
        *table(["part", "parameters", "trained"], manifest["parts"]),
        "",
        "## Settings",
        "",
        fenced(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).rstrip(), "yaml"),
        "",
        "## How it was made",
        "",
        fenced(shlex.join(manifest["run"]["command"]), "bash"),
        "",
        *table(["", ""], flat({key: value for key, value in manifest["run"].items() if key != "command"})),
        "",
    ]


def _usage(settings: Mapping[str, Any], here: str) -> str:
    base = settings["model"]
    if settings["task"] == "choose":
        quantization = ", quantization='nf4'" if settings["method"] == "qlora" else ""
        return fenced(
            f"from recllm.mllm import load\n\nloaded = load({base!r}, adapter={here!r}{quantization})",
            "python",
        )
    quantized = " --quantization nf4" if settings["method"] == "qlora" else ""
    command = f"recllm build items DATASET --system {_SYSTEMS[settings['task']]} --model {base}{quantized}"
    return fenced(f"{command} --adapter {shlex.quote(here)} --tag tuned", "bash")
