"""TUBC of MLLM-SRec: a summary for each window of a history, fed into the next, so that drift shows."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import fields
from pathlib import Path

from recllm.builders.chats import window_prompt
from recllm.builders.histories import Histories, windows
from recllm.builders.options import UserOptions
from recllm.builders.preferences import ItemTexts
from recllm.builders.session import Session
from recllm.builders.texts import text_path
from recllm.mllm.chat import Request, message
from recllm.mllm.generation.run import Counts, Generated
from recllm.prompts.templates import Template

TUBC_TOKENS = 256
"""The longest answer; ours."""


def drift_path(session: Session, part: str) -> Path:
    """Returns where TUBC's summaries for a part go: texts/tubc[-TAG]-PART.parquet."""
    tag = f"-{session.options.tag}" if session.options.tag else ""
    return text_path(session.dataset.folder, f"tubc{tag}-{part}")


def follow_drift(
    session: Session,
    options: UserOptions,
    histories: Histories,
    told: ItemTexts,
    seen: set[tuple[str, bytes]],
) -> None:
    """Writes texts/tubc-PART: the windows of all users in turn, the first ones, then the second ones, ...

    Args:
        session: The run.
        options: Windows, limits.
        histories: The histories of one part; for `train`, each without its last item
            (`Histories.summarized`).
        told: What the windows say of the items, usually by IMSG.
        seen: Windows of earlier parts, for the estimate of a dry run; those of this one are added.
    """
    name, decoding = f"tubc-{histories.part}", session.decoding(TUBC_TOKENS)
    template = session.templates["mllm_srec.tubc"]
    users = list(itertools.islice(histories.users(), options.limit))
    chains = [_Chain(session, options, histories, told, user) for user in users]
    counts, active = Counts(0, 0, 0, 0, 0), chains
    for wave in itertools.count():
        active = [chain for chain in active if chain.goes_on(wave)]
        if not active:
            break
        requests = (chain.request(wave, template) for chain in active)
        if options.dry_run:
            windows_in_all = {window for chain in chains for window in chain.told_windows()} - seen
            seen |= windows_in_all
            session.preview(name, requests, decoding, total=len(windows_in_all))
            print(f"{name}: judged by first windows; later ones have a line more, the summary before")
            return
        answers = session.answer(f"{name}, window {wave + 1}", requests, decoding)
        for number, (chain, (_, result)) in enumerate(zip(active, answers.results(), strict=True)):
            chain.keys.append(answers.key(number))
            chain.prompt_hashes.append(int(answers.prompt_hash(number), 16))
            chain.latest = None if result.error else result.text
        counts = _plus(counts, answers.counts)
    steps = [(chain, number) for chain in chains for number in range(len(chain.keys))]
    generated = Generated(
        session.store,
        [chain.request_id(number) for chain, number in steps],
        bytearray(b"".join(chain.keys[number] for chain, number in steps)),
        array("Q", [chain.prompt_hashes[number] for chain, number in steps]),
        counts,
    )
    split = histories.split
    facts = {
        "split": split.protocol,
        "split_hash": split.split_hash,
        "part": histories.part,
        "window": options.window,
        "step": options.step,
        "max_history": options.max_history,
        "item_texts": told.name,
        "item_texts_sha256": told.sha256,
        "users": len(users),
        "users_without_summary": sum(not chain.keys for chain in chains),
    }
    extra = {
        "user": [chain.name for chain, _ in steps],
        "begin": [chain.windows[number][0] for chain, number in steps],
        "end": [chain.windows[number][1] for chain, number in steps],
    }
    path = drift_path(session, histories.part)
    session.write(name, generated, decoding, [template], facts, extra, path)


class _Chain:
    """The windows of one user, and what was summarized so far.

    Attributes:
        name: The user's id.
        windows: (begin, end) of each, in the user's history.
        latest: The last summary; None after a window without an answer, which ends the chain.
        keys: The request of each window summarized.
        prompt_hashes: The hashes of their prompts.
    """

    def __init__(
        self, session: Session, options: UserOptions, histories: Histories, told: ItemTexts, user: int
    ) -> None:
        self._catalog, self._told = session.catalog, told.texts
        self._items = histories.summarized(user).items
        self.name: str = session.dataset.users["user"][user]
        self.windows = latest_windows(len(self._items), options.window, options.step, options.max_history)
        self.latest: str | None = ""
        self.keys: list[bytes] = []
        self.prompt_hashes: list[int] = []

    def goes_on(self, wave: int) -> bool:
        return wave < len(self.windows) and self.latest is not None

    def told_windows(self) -> list[tuple[str, bytes]]:
        return [(self.name, self._items[:end].tobytes()) for _, end in self.windows]

    def request_id(self, wave: int) -> str:
        return f"{self.name}#{wave}"

    def request(self, wave: int, template: Template) -> Request:
        begin, end = self.windows[wave]
        lines = [self._catalog.told(item, self._told) for item in self._items[begin:end].tolist()]
        prompt = window_prompt(self._catalog, template, lines, self.latest or "")
        return Request(self.request_id(wave), (message("user", prompt),))


def latest_windows(length: int, window: int, step: int, most: int) -> list[tuple[int, int]]:
    """Returns (begin, end) of the windows of a history, or of those in its latest part.

    Args:
        length: Interactions.
        window: Interactions in a window.
        step: Interactions from the start of one to the next.
        most: Windows begin within the latest `most` interactions; 0 for all. They stay where they are in the
            whole history. The last one is always there.
    """
    cuts = windows(length, window, step)
    return [cut for cut in cuts if not most or cut[0] >= length - most] or cuts[-1:]


def _plus(one: Counts, other: Counts) -> Counts:
    return Counts(*(getattr(one, each.name) + getattr(other, each.name) for each in fields(Counts)))
