"""The section of examples: what was known of a user, what the model was told, and how it ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recllm.data.dataset import Dataset
from recllm.report import page
from recllm.report.choice import Chosen, Turn, choose, histories, item_texts, prompts, rest_of, shared
from recllm.report.inputs import Inputs, Scored
from recllm.report.ledger import Ledger
from recllm.report.page import Section
from recllm.report.text import escape, inline, plural
from recllm.report.thumbnails import thumbnail

_HISTORY = 8  # items of a history
_TOP, _OTHERS = 5, 50  # candidates of a list: in sight, and below a fold
_LINES = 40  # of a prompt
_TITLE = "Examples"
_ROLES = {"user": "asked", "assistant": "answered", "system": "system"}


@dataclass(frozen=True, eq=False)
class _Catalog:
    """Items as people see them."""

    dataset: Dataset
    texts: Mapping[str, Mapping[str, str]]
    codes: Mapping[str, int]

    def title(self, item: str) -> str:
        return self.dataset.items["title"][self.codes[item]] or item

    def picture(self, item: str) -> str:
        images = self.dataset.items["images"][self.codes[item]]
        return thumbnail(self.dataset.folder, images[0] if len(images) else None, self.title(item))

    def about(self, item: str, positive: bool) -> str:
        """The title, and what models wrote."""
        lines = [
            f"<small>{escape(name)}: {inline(texts[item], 240)}</small>"
            for name, texts in self.texts.items()
            if texts.get(item)
        ]
        tag = '<span class="tag">positive</span>' if positive else ""
        return inline(self.title(item), 120) + tag + "".join(lines)


def examples_section(
    inputs: Inputs, shown: Mapping[str, str], count: int, seed: int, ledger: Ledger
) -> Section:
    """A few users, chosen by a rule, with the ranking of the system that the report is about."""
    main = inputs.systems[0].records
    scored = next((one for one in inputs.scored if one.name == main.system), None)
    reason = _why_not(inputs, scored, count)
    if reason:
        return Section("examples", _TITLE, page.missing(f"Not shown: {reason}."))
    assert inputs.dataset is not None and inputs.split is not None and inputs.candidates and scored
    dataset, frame = inputs.dataset, inputs.candidates.frame
    part = "valid" if inputs.protocol.endswith("/valid") else "test"
    chosen = choose(main, count, seed)
    known = histories(inputs.split, part, chosen)
    users, targets = (
        frame["user"].to_numpy(),
        frame["target"].to_numpy() if "target" in frame.columns else None,
    )
    lists = [
        np.flatnonzero((users == one.user) & ((targets == one.target) if targets is not None else True))
        for one in chosen
    ]
    items = frame["item"].gather(np.concatenate(lists)).to_list()
    texts, files, stale = item_texts(dataset, items)
    codes = {item: code for code, item in enumerate(dataset.items["item"])}
    catalog = _Catalog(dataset, texts, codes)
    files = [
        scored.path,
        inputs.candidates.path,
        dataset.folder / "items.parquet",
        dataset.folder / "interactions.parquet",
        *files,
    ]
    files += [inputs.instructions] if inputs.instructions else []
    ledger.passage("examples", "Examples", files)
    name = inline(shown[main.system])
    body = page.note(
        f"Chosen by a rule, not by hand: the lists are sorted by the expected rank that {name} gives the "
        f"positive, equal ranks in an order drawn with seed {seed}; shown are the first, the middle and the "
        "last."
    )
    body += (
        page.note(f"Texts of another state of the dataset are left out: {escape(', '.join(stale))}.")
        if stale
        else ""
    )
    if inputs.instructions is None:
        body += page.missing("The prompts are not shown: <code>--instructions</code> names their folder.")
    for one, rows, items_known in zip(chosen, lists, known, strict=True):
        body += _example(
            one,
            frame["item"].gather(rows).to_list(),
            scored,
            rows,
            items_known,
            catalog,
            inputs.instructions,
        )
    return Section("examples", _TITLE, body)


def _why_not(inputs: Inputs, scored: Scored | None, count: int) -> str:
    if count == 0:
        return "<code>--examples 0</code>"
    if inputs.dataset is None:
        return "<code>--dataset</code> names the dataset folder, with histories, titles and images"
    if scored is None:
        return (
            "they need the scores of the first system with <code>--candidates</code>; it came as rank records"
        )
    return ""


def _example(
    one: Chosen,
    items: Sequence[str],
    scored: Scored,
    rows: np.ndarray,
    known: Sequence[int],
    catalog: _Catalog,
    instructions: Path | None,
) -> str:
    rank = f"{one.rank:g}"
    head = f"{one.why}: user {inline(one.user, 60)}, the positive at rank {rank} of {one.candidates:,}"
    body = [f'<article class="example"><h3>{head}</h3>', _strip(known, catalog)]
    if instructions is not None:
        body.append(_prompt(prompts(instructions, one), items, scored.label[rows]))
    body.append(_candidates(items, scored, rows, catalog))
    return "\n".join([*body, "</article>"])


def _strip(known: Sequence[int], catalog: _Catalog) -> str:
    """The latest known items as pictures."""
    latest = [catalog.dataset.items["item"][code] for code in known[-_HISTORY:]]
    cells = "".join(f"<li>{catalog.picture(item)}{inline(catalog.title(item), 60)}</li>" for item in latest)
    earlier = len(known) - len(latest)
    told = f" ({plural(earlier, 'earlier one')} not shown)" if earlier else ""
    if not latest:
        return page.note("Nothing was known of this user before the target.")
    return (
        page.note(f"Known before the target, oldest first{told}:")
        + f'<ol class="strip" tabindex="0">{cells}</ol>'
    )


def _prompt(chats: Mapping[str, list[Turn]], items: Sequence[str], labels: np.ndarray) -> str:
    """What every prompt of the list begins with, and how the one about the positive goes on."""
    asked = [chats[item] for item in items if item in chats]
    positive = next(
        (item for item, label in zip(items, labels, strict=True) if label and item in chats), None
    )
    if not asked or positive is None:
        return page.missing(
            "The instructions have no prompts for this list; build them with <code>--candidates</code>."
        )
    beginning = shared(asked) if len(asked) > 1 else []
    parts = "".join(_turn(role, text) for role, text in beginning)
    goes_on = "".join(
        _turn("about the positive, it goes on", text) for _, text in rest_of(chats[positive], beginning)
    )
    return (
        page.note("What the model was told of the user, before each candidate:")
        + f'<div class="prompt">{parts}{goes_on}</div>'
    )


def _turn(role: str, text: str) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    shown = "".join(f"<p>{inline(line, 700)}</p>" for line in lines[:_LINES])
    more = f"<p>and {plural(len(lines) - _LINES, 'line')} more</p>" if len(lines) > _LINES else ""
    return f'<p class="role">{escape(_ROLES.get(role, role), 40)}</p>{shown}{more}'


def _candidates(items: Sequence[str], scored: Scored, rows: np.ndarray, catalog: _Catalog) -> str:
    """The list as the system ranked it: its top and the positives, and below a fold the others."""
    scores, labels = scored.score[rows], scored.label[rows]
    order = np.argsort(-scores, kind="stable")
    largest = float(np.abs(scores).max()) or 1.0
    what = "score" if scored.probability is None else "margin"

    def listed(places: Sequence[int], caption: str) -> str:
        lines = []
        for place in places:
            item, score = items[place], float(scores[place])
            rank = 1 + int((scores > score).sum())
            positive = bool(labels[place])
            lines.append(
                [f"{rank}", catalog.picture(item), catalog.about(item, positive), _bar(score, largest)]
            )
        marked = {line for line, place in enumerate(places) if labels[place]}
        return page.table(
            ["rank", "", "item", what], lines, caption=caption, kind="candidates wide", marked=marked
        )

    top = [place for at, place in enumerate(order) if at < _TOP or labels[place]]
    others = [place for place in order if place not in top]
    body = listed(top, f"The first {_TOP} of {len(items):,} candidates by {what}, and the positive.")
    if others:
        shown = others[:_OTHERS]
        left_out = f", the first {len(shown)} of them" if len(shown) < len(others) else ""
        body += page.fold(
            f"The other {plural(len(others), 'candidate')}{left_out}",
            listed(shown, f"Further candidates by {what}."),
        )
    return body


def _bar(value: float, largest: float) -> str:
    width = abs(value) / largest * 50
    left = 50 - width if value < 0 else 50
    style = f"left:{left:.1f}%;width:{width:.1f}%"
    return f'{value:.3f}<span class="bar" aria-hidden="true"><i style="{style}"></i></span>'
