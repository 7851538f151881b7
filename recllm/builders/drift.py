"""TUBC of MLLM-SRec: a summary for each window of a history, fed into the next, so that drift shows."""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np

from recllm.builders.chats import rated, told_ratings, window_prompt
from recllm.builders.histories import Histories, windows
from recllm.builders.options import UserOptions
from recllm.builders.session import Session
from recllm.data.texts import ItemTexts, text_path
from recllm.mllm.chat import Request, message
from recllm.mllm.generation.run import Counts, Generated
from recllm.processes import rank
from recllm.progress import Progress
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
        histories: The histories of one part, which are summarized up to the places that `Histories.cuts`
            gives.
        told: What the windows say of the items, usually by IMSG.
        seen: Windows of earlier parts, for the estimate of a dry run; those of this one are added.
    """
    name, decoding = f"tubc-{histories.part}", session.decoding(TUBC_TOKENS)
    template = session.templates["mllm_srec.tubc"]
    users = list(itertools.islice(histories.users(), options.limit))
    ratings = told_ratings(session.dataset, tell=options.tell_ratings)
    chains = [_Chain(session, options, histories, told, user, ratings) for user in users]
    counts, active = Counts(0, 0, 0, 0, 0), chains
    total = sum(len(chain.windows) for chain in chains)
    hidden = rank() > 0 or options.dry_run or sys.stderr.isatty()  # a terminal has a bar for each wave
    with Progress(desc=name, total=total, unit="window", disable=hidden) as bar:
        for wave in itertools.count():
            active = [chain for chain in active if chain.goes_on()]
            if not active:
                break
            requests = (request for chain in active for request in chain.requests(template))
            if options.dry_run:
                windows_in_all = {window for chain in chains for window in chain.told_windows()} - seen
                seen |= windows_in_all
                session.preview(name, requests, decoding, total=len(windows_in_all))
                print(f"{name}: judged by first windows; later ones have a line more, the summary before")
                return
            answers = session.answer(f"{name}, window {wave + 1}", requests, decoding)
            results = enumerate(answers.results())
            for chain in active:
                for number, (_, result) in itertools.islice(results, chain.waiting):
                    prompt_hash = int(answers.prompt_hash(number), 16)
                    chain.take(answers.key(number), prompt_hash, None if result.error else result.text)
            counts = _plus(counts, answers.counts)
            bar.update(len(answers))
    keys, hashes = bytearray(), array("Q")
    for chain in chains:
        keys += chain.keys
        hashes.extend(chain.prompt_hashes)
    ids = [chain.request_id(number) for chain in chains for number in range(chain.done)]
    generated = Generated(session.store, ids, keys, hashes, counts)
    windows_done = [chain.windows[: chain.done] for chain in chains]
    cuts = np.concatenate(windows_done) if windows_done else np.empty((0, 2), np.int32)
    split = histories.split
    facts = {
        "split": split.protocol,
        "split_hash": split.split_hash,
        "part": histories.part,
        "window": options.window,
        "step": options.step,
        "max_history": options.max_history,
        "tell_ratings": options.tell_ratings,
        "item_texts": told.name,
        "item_texts_sha256": told.sha256,
        "users": len(users),
        "users_without_summary": sum(not chain.done for chain in chains),
    }
    extra = {
        "user": [chain.name for chain in chains for _ in range(chain.done)],
        "begin": cuts[:, 0].astype(np.int64),
        "end": cuts[:, 1].astype(np.int64),
    }
    path = drift_path(session, histories.part)
    session.write(name, generated, decoding, [template], facts, extra, path)


class _Chain:
    """The windows of one user, and what was summarized so far.

    Full windows follow each other, each told the summary before it. A window that is cut short, because it
    ends before a target, is told the same as the full one that begins where it does, and nothing follows it.

    Attributes:
        name: The user's id.
        windows: (begin, end) of each, in the user's history, ascending; int32, shape [windows, 2].
        done: How many of them were asked about.
        keys: The keys of their requests, one after the other.
        prompt_hashes: The hashes of their prompts.
    """

    def __init__(
        self,
        session: Session,
        options: UserOptions,
        histories: Histories,
        told: ItemTexts,
        user: int,
        ratings: np.ndarray | None,
    ) -> None:
        self._catalog, self._told = session.catalog, told.texts
        history = histories.history(user)
        self._items, self._rows = history.items, history.rows
        self._ratings = ratings
        self.name: str = session.dataset.users["user"][user]
        bounds = options.window, options.step, options.max_history
        cuts = sorted({cut for end in histories.cuts(user) for cut in latest_windows(end, *bounds)})
        self.windows = np.array(cuts, np.int32).reshape(-1, 2)
        self._step, self._window = options.step, options.window
        self._latest: tuple[int, str] | None = None  # where the latest full window begins, its summary
        self.done = 0
        self.keys = bytearray()
        self.prompt_hashes = array("Q")

    @property
    def waiting(self) -> int:
        """How many windows are asked about next: those that begin where the next one does."""
        begins = self.windows[self.done :, 0]
        return int((begins == begins[0]).sum())

    def goes_on(self) -> bool:
        """Tells whether there is a window left; a full window without an answer ends the chain."""
        if self.done == len(self.windows):
            return False
        earlier = int(self.windows[self.done, 0]) - self._step
        full = (earlier, earlier + self._window) == self.windows[: self.done]
        return not full.all(1).any() or self._summary(earlier) is not None

    def _summary(self, begin: int) -> str | None:
        """Returns the summary of the latest full window, if it begins there."""
        return self._latest[1] if self._latest is not None and self._latest[0] == begin else None

    def told_windows(self) -> list[tuple[str, bytes]]:
        return [(self.name, self._items[:end].tobytes()) for end in self.windows[:, 1].tolist()]

    def request_id(self, number: int) -> str:
        return f"{self.name}#{number}"

    def requests(self, template: Template) -> Iterator[Request]:
        first = self.done
        cuts = self.windows[first : first + self.waiting].tolist()
        for number, (begin, end) in enumerate(cuts, first):
            lines = [
                rated(self._catalog.told(item, self._told), row, self._ratings)
                for item, row in zip(
                    self._items[begin:end].tolist(), self._rows[begin:end].tolist(), strict=True
                )
            ]
            previous = self._summary(begin - self._step) or ""
            prompt = window_prompt(self._catalog, template, lines, previous)
            yield Request(self.request_id(number), (message("user", prompt),))

    def take(self, key: bytes, prompt_hash: int, text: str | None) -> None:
        """Keeps the answer about the next window; None where there is none."""
        begin, end = self.windows[self.done].tolist()
        if text is not None and end - begin == self._window:
            self._latest = begin, text
        self.keys += key
        self.prompt_hashes.append(prompt_hash)
        self.done += 1


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
