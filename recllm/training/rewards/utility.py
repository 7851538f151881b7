"""R_utility: whether the keywords of an item tell the users who take it next from those who do not. Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from recllm.builders.catalog import Catalog, numbered
from recllm.builders.histories import Histories
from recllm.data.splits import Split
from recllm.data.texts import CATALOG, item_texts
from recllm.errors import DataError
from recllm.mllm.chat import message
from recllm.mllm.scoring import YesNoScorer, score_table
from recllm.prompts.mllm_srec import QUESTION
from recllm.prompts.safe_text import safe_text
from recllm.training.rewards.answers import Answer, Source

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel


@dataclass(frozen=True)
class Contexts:
    """Histories of training users, for each item: of those who took it next, and of as many who never did.

    Attributes:
        lines: What the prompt lists of each history; empty for an item without any.
        takers: For each item id, places in `lines`.
        others: As `takers`, equally many.
    """

    lines: list[str]
    takers: Mapping[str, Sequence[int]]
    others: Mapping[str, Sequence[int]]


def training_contexts(
    split: Split, catalog: Catalog, *, users: int, history: int, texts: str = CATALOG, seed: int = 0
) -> Contexts:
    """Draws the contexts of every item from the training part; no held-out interaction is opened.

    Args:
        split: The split.
        catalog: The items.
        users: How many users who took an item next, and how many others, an item.
        history: The latest items of a history that are listed.
        texts: What is listed of an item: `catalog` (title, categories, text), or the name of a file of texts.
        seed: Seed of the draws; an item's depend on it and on the item's number alone.
    """
    of = Histories(split, "train")
    told = None if texts == CATALOG else item_texts(split.dataset, texts)
    lines: list[str] = []
    owners: list[int] = []
    takers: dict[int, list[int]] = {}
    touched: list[set[int]] = []
    for user in of.users():
        own = of.history(user)
        for target in of.targets(user):
            known = own.first(target.known).latest(history).items.tolist()
            if known:
                takers.setdefault(target.item, []).append(len(lines))
                lines.append(numbered([catalog.told(item, told or ()) for item in known]))
                owners.append(len(touched))
        touched.append(set(own.items.tolist()))
    found: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for item, places in takers.items():
        rng = np.random.default_rng([seed, item])
        negative = [place for place in rng.permutation(len(lines)) if item not in touched[owners[place]]]
        count = min(users, len(places), len(negative))
        if count:
            found[0][catalog.ids[item]] = sorted(rng.permutation(places)[:count].tolist())
            found[1][catalog.ids[item]] = sorted(int(place) for place in negative[:count])
    return Contexts(lines, *found)


class Utility:
    """R_utility = mean over (u, v) of sigmoid(m(u, W) - m(v, W)), in [0, 1]; ours.

    m is the yes/no margin of a frozen scorer for a user's history and a target that is described by the
    keywords W alone; u are training users whose next item is the item that W is about, v are training users
    who never took it. It is a smooth AUC over users: 1/2 where the keywords tell nothing. Keywords that suit
    everybody gain nothing.

    Args:
        scorer: Reads margins; its weights are frozen.
        contexts: Of `training_contexts`.
        folder: The dataset folder.
        policy: The scorer's model is the policy: switch its adapter off meanwhile.
    """

    def __init__(
        self, loaded: LoadedModel, contexts: Contexts, folder: Path, *, policy: bool = False
    ) -> None:
        self._loaded, self._contexts, self._folder, self._policy = loaded, contexts, folder, policy
        self._scorer = YesNoScorer(loaded)
        if not contexts.takers:
            raise DataError(
                f"{folder}: no training user took one item after another, so utility has nothing to judge by"
            )

    def applies(self, source: Source) -> bool:
        """Returns whether a training user took the item next."""
        return source.item in self._contexts.takers

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """Returns a number for each answer; None for items that no training user took next."""
        asked: dict[tuple[str, int], None] = {}
        for answer in answers:
            for place in self._places(answer):
                asked[answer.content, place] = None
        margins = self._margins(list(asked))
        values: list[float | None] = []
        for answer in answers:
            takers = [
                margins[answer.content, place] for place in self._contexts.takers.get(answer.source.item, ())
            ]
            others = [
                margins[answer.content, place] for place in self._contexts.others.get(answer.source.item, ())
            ]
            gaps = np.subtract.outer(takers, others)
            values.append(float((1 / (1 + np.exp(-gaps))).mean()) if gaps.size else None)
        return values

    def _places(self, answer: Answer) -> list[int]:
        item = answer.source.item
        return [*self._contexts.takers.get(item, ()), *self._contexts.others.get(item, ())]

    def _margins(self, asked: Sequence[tuple[str, int]]) -> dict[tuple[str, int], float]:
        if not asked:
            return {}
        tokens = self._loaded.special_tokens
        rows = [
            {
                "id": f"context {place}",
                "user": str(place),
                "target": "",
                "item": content,
                "label": 0,
                "prompt": [self._prompt(content, place, tokens)],
                "images": [],
            }
            for content, place in asked
        ]
        schema = {
            "id": pl.String, "user": pl.String, "target": pl.String, "item": pl.String, "label": pl.Int8,
            "prompt": pl.Object, "images": pl.List(pl.String),
        }  # fmt: skip
        frozen = self._loaded.model.disable_adapter() if self._policy else nullcontext()
        with frozen:
            scored = score_table(self._scorer, pl.DataFrame(rows, schema=schema), self._folder)
        return dict(zip(asked, scored["margin"].to_list(), strict=True))

    def _prompt(self, content: str, place: int, tokens: Sequence[str]) -> dict:
        values = {
            "user": "",
            "profile": "",
            "preference": "",
            "history": self._contexts.lines[place],
            "target": safe_text(content, special_tokens=tokens),
        }
        return message("user", QUESTION.fill(values, tokens))
