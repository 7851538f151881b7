"""Texts about users: what they prefer, window by window or from all of their training items."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

from recllm.builders.drift import drift_path, follow_drift
from recllm.builders.histories import Histories, History, windows
from recllm.builders.options import UserOptions, check_least, check_parts, check_plain
from recllm.builders.session import Session
from recllm.builders.texts import check_free
from recllm.data.splits import Split
from recllm.data.texts import ItemTexts
from recllm.data.user_histories import training_before_held_out
from recllm.errors import DataError
from recllm.mllm.chat import Request, message
from recllm.processes import rank
from recllm.prompts.templates import Template

PREFERENCE_TOKENS = 160
"""The longest answer: MLLMRec asks for 100 words."""


def summarize_users(options: UserOptions) -> None:
    """Writes the texts of one system about the users of a split; see `UserOptions`."""
    windows(1, options.window, options.step)
    check_parts(options.parts)
    check_least(0, max_history=options.max_history)
    check_least(1, max_prompt_tokens=options.max_prompt_tokens)
    check_plain("--split", options.split)
    check_plain("--item-texts", options.item_texts)
    if options.tell_ratings and options.system != "mllm_srec":
        raise DataError(
            f"--tell-ratings is for --system mllm_srec; {options.system} has no words for ratings"
        )
    if options.sample_history and not options.max_history:
        raise DataError("--sample-history draws --max-history interactions of each user; give that number")
    session = Session(options)
    split = Split.open(session.dataset.folder / "splits" / options.split, dataset=session.dataset)
    if options.system == "mllmrec":
        _preferences(session, options, split)
        return
    for part in options.parts:
        check_free(drift_path(session, part), overwrite=options.overwrite or options.dry_run)
    told = _item_texts(session, options.item_texts or "imsg", "mllm_srec")
    seen: set[tuple[str, bytes]] = set()
    for part in options.parts:
        histories = Histories(split, part, dislikes=options.tell_ratings)
        follow_drift(session, options, histories, told, seen)


def _preferences(session: Session, options: UserOptions, split: Split) -> None:
    """MLLMRec's Prompt 2 (equations 3 and 4) over the training items, or over all for a demonstration.

    One text stands for a user whatever the target: so it is made of the training items that precede all of
    the user's held-out targets. On a split in time these are all of them.
    """
    template, decoding = session.templates["mllmrec.preference"], session.decoding(PREFERENCE_TOKENS)
    leak = options.leak_all_interactions
    name = "preference-leaky" if leak else "preference"
    session.check_free(name)
    descriptions = _item_texts(session, options.item_texts or "description", "mllmrec")
    catalog = session.catalog
    histories = Histories(split, "test" if leak else "train")
    known = None if leak else training_before_held_out(split)

    def history_of(user: int) -> History:
        history = histories.history(user)
        return history if known is None else history.first(int(known[user]))

    lengths = [len(history_of(user).items) for user in range(len(session.dataset.users))]
    too_late = 0 if known is None else int(histories.allowed.sum()) - sum(lengths)
    users = [user for user, length in enumerate(lengths) if length]
    users = users[: options.limit]
    left_out = 0

    def items_of(user: int) -> list[int]:
        history = history_of(user)
        name = session.dataset.users["user"][user]
        if options.sample_history and len(history.items) > options.max_history:
            drawn = _random_of(name, "sample").choice(len(history.items), options.max_history, replace=False)
            items = history.items[np.sort(drawn)].tolist()
        else:
            items = history.latest(options.max_history).items.tolist()
        items += [target.item for target in histories.targets(user)] if leak else []
        if options.history_order == "shuffled":
            items = [items[place] for place in _random_of(name, "order").permutation(len(items))]
        return items

    def requests() -> Iterator[Request]:
        nonlocal left_out
        for user in users:
            told = [
                multimodal_description(catalog.metadata(code), catalog.safe(descriptions.texts[code]))
                for code in items_of(user)
            ]
            request, dropped = _within(session, user, template, told, options.max_prompt_tokens)
            left_out += dropped
            yield request

    if options.dry_run:
        first = itertools.islice(requests(), options.batch_size)
        session.preview(name, first, decoding, total=len(users))
        return
    answers = session.answer(name, requests(), decoding)
    facts = {
        "split": split.protocol,
        "split_hash": split.split_hash,
        "part": "train",
        "leak": leak,
        "item_texts": descriptions.name,
        "item_texts_sha256": descriptions.sha256,
        "max_history": options.max_history,
        "sample_history": options.sample_history,
        "history_order": options.history_order,
        "users": len(answers),
        "items_left_out": left_out,
        "items_after_a_target": too_late,
    }
    session.write(name, answers, decoding, [template], facts, {"user": answers.ids})
    if left_out and rank() == 0:
        which = "oldest" if options.history_order == "time" else "first"
        print(f"  {left_out:,} items left out, the {which} of each user (--max-prompt-tokens)")
    if too_late and rank() == 0:
        print(f"  {too_late:,} training interactions left out: they follow a held-out target of their user")


def _random_of(user: str, purpose: str) -> np.random.Generator:
    """Returns the generator of one user's draws: the same in every run, whoever else is in the data."""
    digest = hashlib.sha256(f"{purpose} {user}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def multimodal_description(text: str, description: str) -> str:
    """Returns an item's text followed by the description of its image (equation 2 of MLLMRec)."""
    return " ".join(part for part in (text, description) if part)


def _within(
    session: Session, user: int, template: Template, told: list[str], budget: int
) -> tuple[Request, int]:
    """Returns the request with as many of the latest items as fit, and how many were left out."""
    name = session.dataset.users["user"][user]

    def request(first: int) -> Request:
        values = {"items": "; ".join(told[first:])}
        return Request(name, (message("user", template.fill(values, session.catalog.special_tokens)),))

    def fits(first: int) -> bool:
        tokens = session.backend.count_tokens(request(first))
        return tokens is None or tokens <= budget

    if fits(0):
        return request(0), 0
    too_early, enough = 0, len(told) - 1
    if not fits(enough):
        raise DataError(
            f"user {name!r}: one item alone makes a prompt of more than --max-prompt-tokens {budget:,}"
        )
    while enough - too_early > 1:
        middle = (too_early + enough) // 2
        too_early, enough = (too_early, middle) if fits(middle) else (middle, enough)
    return request(enough), enough


def _item_texts(session: Session, name: str, system: str) -> ItemTexts:
    folder = session.dataset.folder
    command = f"recllm build items {folder} --system {system} --model {session.options.model}"
    texts = ItemTexts.open(folder, name, session.dataset, command)
    if rank() == 0:
        texts.tell_missing()
    return texts
