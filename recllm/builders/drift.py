"""TUBC of MLLM-SRec: a summary for each window of a history, fed into the next, so that drift shows."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import fields

from recllm.builders.catalog import SUMMARY_LIMIT
from recllm.builders.chats import item_line, window_prompt
from recllm.builders.histories import Histories, windows
from recllm.builders.options import UserOptions
from recllm.builders.session import Session
from recllm.mllm.chat import Request, message
from recllm.mllm.generation.run import Counts, Generated
from recllm.prompts.safe_text import safe_text
from recllm.prompts.templates import Template

TUBC_TOKENS = 256
"""The longest answer; ours."""


def follow_drift(
    session: Session, options: UserOptions, histories: Histories, summaries: Sequence[str]
) -> None:
    """Writes texts/tubc-PART: the windows of all users in turn, the first ones, then the second ones, ...

    Args:
        session: The run.
        options: Windows, limits.
        histories: The histories of one part; for `train`, each without its last item
            (`Histories.summarized`).
        summaries: What IMSG wrote of the items, by code.
    """
    name, decoding = f"tubc-{histories.part}", session.decoding(TUBC_TOKENS)
    template = session.templates["mllm_srec.tubc"]
    users = list(itertools.islice(histories.users(), options.limit))
    chains = [_Chain(session, options, histories, user) for user in users]
    counts, active = Counts(0, 0, 0, 0, 0), chains
    for wave in itertools.count():
        active = [chain for chain in active if chain.goes_on(wave)]
        if not active:
            break
        requests = (chain.request(wave, template, summaries) for chain in active)
        if options.dry_run:
            session.preview(name, requests, decoding)
            total = sum(len(chain.windows) for chain in active)
            print(f"{name}: {total:,} windows of {len(active):,} users; the above are the first of each")
            return
        answers = session.answer(f"{name}, window {wave + 1}", requests, decoding)
        for number, (chain, (_, result)) in enumerate(zip(active, answers.results(), strict=True)):
            chain.keys.append(answers.key(number))
            chain.prompt_hashes.append(int(answers.prompt_hash(number), 16))
            chain.latest = None if result.error else safe_text(result.text, limit=SUMMARY_LIMIT)
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
        "users": len(users),
    }
    extra = {
        "user": [chain.name for chain, _ in steps],
        "begin": [chain.windows[number][0] for chain, number in steps],
        "end": [chain.windows[number][1] for chain, number in steps],
    }
    session.write(name, generated, decoding, [template], facts, extra)


class _Chain:
    """The windows of one user, and what was summarized so far.

    Attributes:
        name: The user's id.
        windows: (begin, end) of each, in the user's history.
        latest: The last summary; None after a window without an answer, which ends the chain.
        keys: The request of each window summarized.
        prompt_hashes: The hashes of their prompts.
    """

    def __init__(self, session: Session, options: UserOptions, histories: Histories, user: int) -> None:
        self._catalog = session.catalog
        self._items = histories.summarized(user).items
        self.name: str = session.dataset.users["user"][user]
        self.windows = latest_windows(len(self._items), options.window, options.step, options.max_history)
        self.latest: str | None = ""
        self.keys: list[bytes] = []
        self.prompt_hashes: list[int] = []

    def goes_on(self, wave: int) -> bool:
        return wave < len(self.windows) and self.latest is not None

    def request_id(self, wave: int) -> str:
        return f"{self.name}#{wave}"

    def request(self, wave: int, template: Template, summaries: Sequence[str]) -> Request:
        begin, end = self.windows[wave]
        lines = [item_line(self._catalog, summaries, item) for item in self._items[begin:end].tolist()]
        prompt = window_prompt(template, lines, self.latest or "")
        return Request(self.request_id(wave), (message("user", prompt),))


def latest_windows(length: int, window: int, step: int, most: int) -> list[tuple[int, int]]:
    """Returns (begin, end) of the windows of a history, or of those in its latest part.

    Args:
        length: Interactions.
        window: Interactions in a window.
        step: Interactions from the start of one to the next.
        most: Windows begin within the latest `most` interactions; 0 for all. They stay where they are in the
            whole history.
    """
    first = length - most if most else 0
    return [(begin, end) for begin, end in windows(length, window, step) if begin >= first]


def _plus(one: Counts, other: Counts) -> Counts:
    return Counts(*(getattr(one, each.name) + getattr(other, each.name) for each in fields(Counts)))
