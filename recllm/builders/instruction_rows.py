"""The rows of instruction tuples: who is asked about what, and what the prompt may tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recllm.builders.catalog import profiles_of
from recllm.builders.chats import NO, YES, Chat, Composer, UserChats
from recllm.builders.dislikes import Dislikes
from recllm.builders.histories import Histories, Target
from recllm.builders.keyword_chats import KeywordChats, KeywordComposer
from recllm.builders.negatives import TrainingNegatives
from recllm.builders.options import InstructionOptions
from recllm.builders.preferences import Preferences
from recllm.builders.prompt_length import PromptLength
from recllm.builders.tasks import CHOOSE, NEXT_KEYWORDS, SUMMARIZE, is_asked, shares_of, shuffled
from recllm.data.candidate_files import CandidateLists, read_candidates
from recllm.data.instructions import YES_NO
from recllm.data.splits import Split
from recllm.evaluation.top_k_files import TopK
from recllm.mllm.chat import IMAGE_PART, Request, message
from recllm.mllm.vision.images import resolve_image
from recllm.mllm.vision.token_budget import BudgetError


@dataclass(frozen=True)
class _Asked:
    """What one row asks: the task, the candidate's code, the answer, and the chat by items listed."""

    task: str
    item: int
    answer: str
    chat: Callable[[int], Chat]


class InstructionBuilder:
    """Makes the rows of one part.

    Args:
        split: The split.
        part: `train`, `valid` or `test`.
        options: What the rows are to hold.
        composer: Writes the chats.
        sampler: Draws negatives where no candidates are given.
        preferences: The summaries made for this part; None to go without.
        length: Counts the tokens of a prompt; None where there is no bound.
        top: A first stage's lists, where they take the place of positives and negatives.

    Attributes:
        counts: What was made and what was left out, for the manifest; complete after `rows` has ended.
        protocol: The split's protocol, with the candidates' part where a file of them is used.
        candidates: The fingerprint of that file; empty where none is used.

    Raises:
        DataError: The candidates or the first stage's lists are not those of this split and part.
    """

    def __init__(
        self,
        split: Split,
        part: str,
        options: InstructionOptions,
        composer: Composer | KeywordComposer,
        sampler: TrainingNegatives,
        preferences: Preferences | None,
        length: PromptLength | None,
        top: TopK | None = None,
    ) -> None:
        self.split, self.part, self.options = split, part, options
        self.composer, self.sampler = composer, sampler
        self.preferences, self.length = preferences, length
        self.histories = Histories(split, part, dislikes=options.tell_ratings)
        self.dislikes = Dislikes(split, part) if split.like is not None else None
        self._user_ids = split.dataset.users["user"]
        self._profiles = profiles_of(split.dataset)
        self._item_ids = split.dataset.items["item"]
        self.protocol = split.protocol
        self._candidates, self.candidates = None, ""
        if options.candidates is not None and part != "train":
            candidates = read_candidates(split, options.candidates, part)
            self.candidates = candidates.fingerprint
            self._candidates, self.protocol = CandidateLists(candidates, split), candidates.protocol
        self._listed = None
        if top is not None:
            self._listed, self.protocol = top.lists_for(split, part), top.reranked_protocol  # type: ignore[arg-type]
        self._shares = {YES_NO: 1.0}
        if isinstance(composer, KeywordComposer):
            self._shares = shares_of(options.tasks)
            if part != "train":
                self._shares[YES_NO] = 1.0  # a list is whole, or it is no list
            if top is not None:
                self._shares = {YES_NO: 1.0}
        self._is_training = np.zeros(len(split.dataset.user_codes), dtype=bool)
        self._is_training[split.rows("train")] = True
        self.counts: Counter[str] = Counter()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows, user by user, targets in order of time, each positive before its negatives, or
        its first stage's list in the list's order."""
        for user in islice(self.histories.users(), self.options.limit):
            self.counts["users"] += 1
            known_items = np.unique(self._touched(user))
            chosen = self._chosen(user, self.histories.targets(user))
            for target, disliked in self._with_dislikes(user, chosen):
                self.counts["targets_without_history"] += target.known == 0
                items = self._items(user, target, known_items, disliked)
                yield from self._rows_of(user, target, items, disliked)

    def _touched(self, user: int) -> np.ndarray:
        """Item codes of the user's interactions that the part knows of; some may repeat."""
        touched = [self.histories.history(user).items]
        touched.append([target.item for target in self.histories.targets(user)])
        if self.dislikes is not None:
            touched.append(self.dislikes.touched(user))
        return np.concatenate(touched).astype(np.int64)

    def _with_dislikes(self, user: int, targets: list[Target]) -> Iterator[tuple[Target, dict[int, int]]]:
        """Yields the targets with the dislikes that are asked about beside each, as row number by item. What
        is known is cut before the first of them, so that no history tells what a row asks."""
        given: dict[int, list[int]] = {}
        if self.dislikes is not None and self._candidates is None and self._listed is None:
            given = self.dislikes.of_targets(user, targets, self.options.negatives)
        codes = self.split.dataset.item_codes
        for target in targets:
            disliked = {int(codes[row]): row for row in given.get(target.row, [])}
            if disliked:
                rows = self.histories.history(user).rows[: target.known]
                known = sum(self.histories.precedes(rows, min(disliked.values(), key=self.histories.place)))
                target = replace(target, known=int(known))
            yield target, disliked

    def _chosen(self, user: int, targets: list[Target]) -> list[Target]:
        if self.part != "train":
            return targets
        if self.preferences is not None:
            ends = set(self.preferences.ends(self._user_ids[user]).tolist())
            passed_over = [target for target in targets if target.known not in ends]
            self.counts["targets_passed_over_without_summary"] += len(passed_over)
            targets = [target for target in targets if target.known in ends]
            self.counts["users_without_summary"] += not targets
        return targets[-self.options.targets_per_user :] if self.options.targets_per_user else targets

    def _items(
        self, user: int, target: Target, known_items: np.ndarray, disliked: Mapping[int, int]
    ) -> list[int]:
        """What a target's rows ask about: it and its negatives, or what a first stage has listed."""
        if self._listed is None:
            return [target.item, *disliked, *self._others(user, target, known_items, len(disliked))]
        listed = self._listed[self._user_ids[user], self._item_ids[target.item]]
        self.counts["targets_not_listed"] += target.item not in listed
        return listed

    def _others(self, user: int, target: Target, known_items: np.ndarray, explicit: int) -> list[int]:
        """The negatives of a target that it does not have by explicit dislikes. The targets of one held-out
        part are no negatives of each other; training knows of no held-out part."""
        if self._candidates is not None:
            return self._candidates.negatives(user, target.item)
        wanted = self.options.negatives - explicit
        drawn = self.sampler.draw(user, target, known_items, wanted) if wanted else []
        self.counts["explicit_negatives"] += explicit
        self.counts["negatives_missing"] += wanted - len(drawn)
        return drawn

    def _rows_of(
        self, user: int, target: Target, items: list[int], disliked: Mapping[int, int]
    ) -> Iterator[dict[str, Any]]:
        """The rows of one target: it and its negatives, and its other tasks; all with the same history."""
        name, target_name = self._user_ids[user], self._item_ids[target.item]
        tasks = [
            task
            for task, share in self._shares.items()
            if is_asked(task, share, self.options.seed, name, target_name, target.row)
        ]
        chats = self._about(user, target, len(items) if YES_NO in tasks else 0, disliked)
        asked: list[_Asked] = []
        if YES_NO in tasks:
            asked = [
                _Asked(YES_NO, item, YES if item == target.item else NO, partial(chats.chat, item))
                for item in items
            ]
        if isinstance(chats, KeywordChats):
            asked += self._other_tasks(user, target, items, tasks, chats)
        if not asked:
            return
        listed = self._fitting(chats, target, name, asked)
        for each in asked:
            if each.task != YES_NO and not listed:  # the budget has left no history to answer from
                self.counts[f"{each.task}_without_answer"] += 1
                continue
            chat, item = each.chat(listed), each.item
            self._guard(chat, target.row, f"user {name!r}, row {target.row}")
            if item in disliked:
                self._guard(chat, disliked[item], f"user {name!r}, row {disliked[item]}")
            self.counts["rows"] += 1
            self.counts[f"rows_{each.task}"] += isinstance(chats, KeywordChats)
            identifier = f"{target.row}/{name}/{self._item_ids[item]}"
            if each.task == YES_NO:
                self.counts["positives" if item == target.item else "negatives"] += 1
                if self.options.target_image and self.composer.image(item) is None:
                    self.counts["rows_without_target_image"] += 1
                if self.options.form == "cot" and not chat.looked:
                    self.counts["rows_without_viu_and_imsg"] += 1
            yield {
                "id": identifier if each.task == YES_NO else f"{each.task}:{identifier}",
                "user": name,
                "item": self._item_ids[item],
                "label": int(item == target.item),
                "target": target_name,
                "target_row": target.row,
                "prompt": list(chat.messages),
                "completion": [message("assistant", each.answer)],
                "images": list(chat.images),
                "shown": list(chat.shown),
                "task": each.task,
                "retrieved": list(chat.retrieved),
            }

    def _about(
        self, user: int, target: Target, rows: int, disliked: Mapping[int, int]
    ) -> UserChats | KeywordChats:
        """What writes the chats about a target's user, of what may be known of her by then."""
        name, known = self._user_ids[user], self.histories.history(user).first(target.known)
        if isinstance(self.composer, KeywordComposer):
            neighbors = self.composer.neighbors
            found = [] if neighbors is None else neighbors.next_rows(target.row)
            if neighbors is not None and neighbors.time == "known":
                # Beside a dislike, what is known ends before it, and so does what is known of others.
                first = min([target.row, *disliked.values()], key=self.histories.place)
                found = [each[self.histories.precedes(each, first)] for each in found]
                found = [each for each in found if len(each)]
            self.counts["targets_without_neighbors"] += neighbors is not None and not found
            return self.composer.about(known, found)
        summary = self.preferences.before(name, target.known) if self.preferences else None
        self.counts["rows_without_summary"] += rows * (self.preferences is not None and summary is None)
        profile = self._profiles[user] if self._profiles is not None else ""
        return self.composer.about(name, profile, known, summary)

    def _other_tasks(
        self, user: int, target: Target, items: list[int], tasks: Sequence[str], chats: KeywordChats
    ) -> Iterator[_Asked]:
        """The tasks of a target but yes_no, as far as they can be answered from what there is."""
        if not target.known or not chats.most_listed:
            return
        answers = {}
        if NEXT_KEYWORDS in tasks:
            answers[NEXT_KEYWORDS] = self.composer.answer(target.item), chats.next_keywords
        if CHOOSE in tasks:
            candidates = self._choices(user, target, items)
            number = str(candidates.index(target.item) + 1) if len(candidates) > 1 else ""
            answers[CHOOSE] = number, partial(chats.choose, candidates)
        if SUMMARIZE in tasks:
            answers[SUMMARIZE] = chats.preference(), chats.summarize
        for task, (answer, chat) in answers.items():
            self.counts[f"{task}_without_answer"] += not answer
            if answer:
                yield _Asked(task, target.item, answer, chat)

    def _choices(self, user: int, target: Target, items: list[int]) -> list[int]:
        """The candidates of the task choose: the target and its first negatives, filled up with more of the
        training items where these are too few, in an order of their own."""
        wanted = self.options.choices - 1
        negatives = [item for item in items if item != target.item][:wanted]
        if len(negatives) < wanted and self._candidates is None:
            known_items = np.unique(np.concatenate([self._touched(user), negatives]).astype(np.int64))
            negatives += self.sampler.draw(user, target, known_items, wanted - len(negatives))
        name = self._user_ids[user], self._item_ids[target.item]
        return shuffled([target.item, *negatives], self.options.seed, *name, target.row)

    def _guard(self, chat: Chat, asked: int, where: str) -> None:
        """Stops the run where a prompt tells what must not be known: a defense against our own faults."""
        if not self.histories.known_before(asked, np.array(chat.shown, dtype=np.int64)):
            raise RuntimeError(
                f"{where}: the prompt tells of an interaction that must not be known: of another user, of a "
                "part that is held out, or not earlier than the target"
            )
        others = np.array(chat.retrieved, dtype=np.int64)
        if len(others) and not self._may_retrieve(others, asked):
            raise RuntimeError(
                f"{where}: the prompt tells of a neighbor's interaction that must not be known: the user's "
                "own, not a training interaction, or not earlier than the target"
            )
        parts = (part["type"] for turn in chat.messages for part in turn["content"])
        if sum(kind == "image" for kind in parts) != len(chat.images):
            raise RuntimeError(f"{where}: the prompt has not as many image parts as images")

    def _may_retrieve(self, rows: np.ndarray, asked: int) -> bool:
        """Tells whether interactions of other users may be told of in a prompt about the row `asked`."""
        users = self.split.dataset.user_codes
        allowed = self._is_training[rows] & (users[rows] != users[asked])
        if self.composer.neighbors.time == "known":
            allowed &= self.histories.precedes(rows, asked)
        return bool(allowed.all())

    def _fitting(
        self, chats: UserChats | KeywordChats, target: Target, name: str, asked: Sequence[_Asked]
    ) -> int:
        """Returns how many history items the prompts of all rows can list within the budget."""
        budget = self.options.max_prompt_tokens
        if self.length is None or budget is None:
            return chats.most_listed

        def longest(listed: int) -> tuple[int, int]:
            return max((self.length.of(name, each.chat(listed)), each.item) for each in asked)

        too_many, listed = chats.most_listed + 1, 0
        tokens, item = longest(0)
        if tokens > budget:
            raise BudgetError(
                f"sample {target.row}/{name}/{self._item_ids[item]}: its prompt has {tokens:,} tokens "
                f"without any listed history item, but --max-prompt-tokens is {budget:,}; allow more, or "
                "fewer --max-pixels"
            )
        while too_many - listed > 1:
            middle = (too_many + listed) // 2
            fits = longest(middle)[0]
            if fits <= budget:
                listed, tokens = middle, fits
            else:
                too_many = middle
        self.counts["history_items_left_out"] += (chats.most_listed - listed) * len(asked)
        self.counts["longest_prompt_tokens"] = max(self.counts["longest_prompt_tokens"], tokens)
        return listed


def request_of(row: Mapping[str, Any], folder: Path) -> Request:
    """Returns the prompt of a row that was read from disk, as models take it.

    Args:
        row: A row of `instructions/<name>/<part>.parquet`, as a dictionary.
        folder: The dataset folder, which the row's image paths are relative to.
    """
    messages = [
        {
            "role": turn["role"],
            "content": [
                dict(IMAGE_PART) if part["type"] == "image" else dict(part) for part in turn["content"]
            ],
        }
        for turn in row["prompt"]
    ]
    return Request(row["id"], tuple(messages), tuple(resolve_image(folder, image) for image in row["images"]))
