"""The sections of facts: the data, the protocol, and how everything was made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from recllm.files import MANIFEST
from recllm.report import page
from recllm.report.inputs import Inputs
from recllm.report.ledger import Ledger
from recllm.report.page import Section
from recllm.report.protocols import explain
from recllm.report.text import escape, inline
from recllm.runs.provenance import describe_machine, describe_run

_LINES = 24  # facts that a nested manifest may fill


def data_section(inputs: Inputs, ledger: Ledger) -> Section:
    """The data card."""
    dataset, split = inputs.dataset, inputs.split
    if dataset is None or split is None:
        return Section(
            "data", "Data", page.missing("Not shown: <code>--dataset</code> names the dataset folder.")
        )
    counts, manifest = dataset.manifest["counts"], dataset.manifest
    ledger.passage("data", "Data card", [dataset.folder / MANIFEST, split.folder / MANIFEST])
    density = counts["interactions"] / (counts["users"] * counts["items"])
    pairs = [(name, f"{counts[name]:,}") for name in ("users", "items", "interactions")]
    pairs += [
        ("density", f"{density:.3%}"),
        ("interactions a user", f"{counts['interactions'] / counts['users']:.1f}"),
    ]
    if manifest.get("time_range"):
        first, last = (time.strftime("%Y-%m-%d", time.gmtime(when)) for when in manifest["time_range"])
        pairs.append(("dates", f"{first} to {last}"))
        untimed = counts["interactions"] - counts["timestamps"]
        pairs += [("interactions without a time", f"{untimed:,}")] if untimed else []
    else:
        pairs.append(("dates", "none: input order is the order"))
    pairs.append(("items with text", f"{counts['items_with_text']:,} of {counts['items']:,}"))
    pairs.append(("items with an image", f"{counts['items_with_image']:,} of {counts['items']:,}"))
    pairs.append(("unusable images", _unusable(inputs)))
    sizes = split.manifest["counts"]
    pairs += [(f"{part} interactions", f"{sizes[part]:,}") for part in ("train", "valid", "test")]
    pairs += [("targets", f"{sizes['valid_targets']:,} validation, {sizes['test_targets']:,} test")]
    if inputs.candidates is not None:
        pairs.append(("candidate rows", f"{inputs.candidates.frame.height:,}"))
        pairs.append(("candidates, fingerprint", f"<code>{escape(inputs.candidates.fingerprint)}</code>"))
    pairs.append(("data hash", f"<code>{escape(dataset.data_hash[:16])}</code>"))
    pairs.append(("split hash", f"<code>{escape(split.split_hash[:16])}</code>"))
    body = page.facts(pairs)
    body += "".join(
        f'<p class="warning">{escape(text, 600)}</p>' for text in split.manifest.get("warnings", [])
    )
    body += "<h3>Source</h3>" + _nested(manifest.get("source", {}))
    left_out = _nested(manifest.get("dropped", {}))
    body += "<h3>What was left out, and what was odd</h3>" + (left_out or page.note("Nothing."))
    return Section("data", "Data", body)


def protocol_section(inputs: Inputs) -> Section:
    """The protocol in words."""
    body = f"<p><code>{escape(inputs.protocol)}</code></p><p>{escape(explain(inputs.protocol), 1200)}</p>"
    body += page.note(
        "Metrics are exact expected values under random tie-breaking, computed from rank records: for each "
        "target how many candidates scored higher, how many as high, and how many there were. They are "
        "averaged over the lists of a user first, then over users, who are the unit of every interval and "
        "test."
    )
    return Section("protocol", "Protocol", body)


def making_section(inputs: Inputs) -> Section:
    """How each input, and this page, was made."""
    rows = [
        [
            escape(what),
            f"<code>{escape(' '.join(map(str, run.get('command', []))), 600)}</code>",
            escape(run.get("time", "-")),
            escape(_version(run)),
            escape(machine or run.get("machine") or "-"),
        ]
        for what, run, machine in _runs(inputs)
    ]
    own = describe_run()
    packages = ", ".join(f"{name} {version}" for name, version in own["packages"].items() if version)
    body = page.table(
        ["what", "command", "time (UTC)", "recllm", "machine"],
        rows,
        caption="From the manifests of the inputs; the last line is this report.",
        kind="text",
    )
    body += page.note(escape(f"This report: Python {own['python']}, {packages}.", 600))
    return Section("making", "How this was made", body)


def sources_section(ledger: Ledger) -> Section:
    """Which files each table and figure came from."""
    intro = page.note("The same list, for programs, is <code>sources.json</code> beside this page.")
    return Section("sources", "Sources of every figure", intro + ledger.html())


def _runs(inputs: Inputs) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    manifests = []
    if inputs.dataset is not None and inputs.split is not None:
        manifests = [("dataset", inputs.dataset.manifest), ("split", inputs.split.manifest)]
    manifests += [("candidates", inputs.candidates_manifest)] if inputs.candidates_manifest else []
    manifests += [("instructions", inputs.instructions_manifest)] if inputs.instructions_manifest else []
    manifests += [(f"run {run.name}", run.manifest) for run in inputs.runs]
    systems = [*inputs.systems, *inputs.ablation]
    made = {each.path: each.records.made for each in systems if each.records.made.get("run")}
    manifests += [(f"scores {path.name}", content) for path, content in made.items()]
    for what, manifest in manifests:
        machine = manifest.get("machine")
        yield what, manifest.get("run", {}), machine if isinstance(machine, str) else ""
    yield "this report", describe_run(), describe_machine()


def _version(run: Mapping[str, Any]) -> str:
    revision = run.get("git") or ""
    short = revision[:10] + (" with changes" if revision.endswith("+changes") else "")
    return f"{run.get('recllm', '-')}{f', {short}' if short else ''}"


def _unusable(inputs: Inputs) -> str:
    """What building the prompts found, which looks at the images that prompts show."""
    manifest = inputs.instructions_manifest
    count, settings = manifest.get("unusable_images_count"), manifest.get("settings", {})
    if not isinstance(count, int):
        return "not known: <code>--instructions</code> tells"
    if not settings.get("target_image") and "image" not in str(settings.get("history_as")):
        return "not known: the prompts show none"
    return f"{count:,} found in building the prompts"


def _nested(content: Any) -> str:
    """A manifest's facts as a list, one line a leaf; what does not fit is counted."""
    leaves = list(_leaves(content, ()))
    lines = [
        f"<li>{inline(' › '.join(path), 200)}: {inline(value, 300)}</li>" for path, value in leaves[:_LINES]
    ]
    if len(leaves) > _LINES:
        lines.append(f"<li>and {len(leaves) - _LINES:,} more, in the dataset's manifest.json</li>")
    return f'<ul class="note">{"".join(lines)}</ul>' if lines else ""


def _leaves(content: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, (*path, str(key).replace("_", " ")))
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, path)
    elif content is not None:
        number = isinstance(content, int) and not isinstance(content, bool)
        yield path, f"{content:,}" if number and path[-1:] != ("seed",) else str(content)
