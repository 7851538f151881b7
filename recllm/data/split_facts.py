"""What a split cannot avoid: facts and warnings for its manifest and for `recllm data split` to print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from recllm.data.dataset import NO_TIME, Dataset
from recllm.data.ordering import group_by_user_in_time
from recllm.data.split_methods import TEST, TRAIN, VALID, Assignment

TRAINING_AFTER_A_TARGET = "training_interactions_after_a_held_out_target_of_their_user"
_SAID = {
    "items_without_training_row": "items have no training interaction",
    "users_without_training_row": "users have no training interaction",
    "users_without_test_target": "users have no test target",
    "items_without_test_target": "items are no test target",
    "test_targets_sharing_their_second": "test targets share their second with another interaction of their "
    "user: the order of the log decides which was first",
    "valid_targets_sharing_their_second": "validation targets share theirs",
    TRAINING_AFTER_A_TARGET: "training interactions follow a held-out target of their user: no history holds "
    "them for that target, but models that learn one vector for a user learn from them",
    "training_interactions_without_time": "training interactions have no time: they count as earlier than "
    "all others",
    "interactions_without_rating": "interactions have no rating: they are in no part",
}


def describe(dataset: Dataset, assignment: Assignment) -> None:
    """Adds the facts and warnings that depend on which targets there are in the end."""
    facts, users, items = assignment.facts, dataset.user_codes, dataset.item_codes
    train, valid, test = assignment.part == TRAIN, assignment.targets_of(VALID), assignment.targets_of(TEST)
    facts["users_without_targets"] = _without(users, valid | test, len(dataset.users))
    facts["users_without_test_target"] = _without(users, test, len(dataset.users))
    facts["users_without_training_row"] = _without(users, train, len(dataset.users))
    if assignment.protocol.startswith("random"):
        facts["items_without_test_target"] = _without(items, test, len(dataset.items))
    facts["items_without_training_row"] = _without(items, train, len(dataset.items))
    if dataset.has_timestamps:
        shared = _shares_its_second(dataset)
        facts["valid_targets_sharing_their_second"] = int(np.count_nonzero(shared & valid))
        facts["test_targets_sharing_their_second"] = int(np.count_nonzero(shared & test))
        untimed = dataset.timestamps == NO_TIME
        facts["training_interactions_without_time"] = int(np.count_nonzero(untimed & train))
    else:
        assignment.warnings.append("the log has no times: input order stands for time order")
    late = _after_a_target(dataset, train, valid | test)
    facts[TRAINING_AFTER_A_TARGET] = int(np.count_nonzero(late))
    if late.any():
        share = np.count_nonzero(late) / np.count_nonzero(train)
        assignment.warnings.append(
            "training holds interactions of the same user that are later than the targets "
            f"({share:.1%} of training)"
        )
    elif dataset.has_timestamps:
        _warn_of_the_future(dataset, assignment)


def said(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each fact that a reader of results should know."""
    for name, words in _SAID.items():
        if facts.get(name):
            yield f"{facts[name]:,} {words}"


def _without(codes: np.ndarray, chosen: np.ndarray, count: int) -> int:
    return count - len(np.unique(codes[chosen]))


def _shares_its_second(dataset: Dataset) -> np.ndarray:
    """Whether another interaction of the user has the same time; shape [interactions]."""
    times = dataset.timestamps
    order, _ = group_by_user_in_time(dataset.user_codes, times, len(dataset.users))
    equal = dataset.user_codes[order][1:] == dataset.user_codes[order][:-1]
    equal &= (times[order][1:] == times[order][:-1]) & (times[order][1:] != NO_TIME)
    shared = np.zeros(len(order), dtype=bool)
    shared[order[1:][equal]] = shared[order[:-1][equal]] = True
    return shared


def _after_a_target(dataset: Dataset, train: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Which training interactions follow a target of their user, in order; shape [interactions]."""
    order, offsets = group_by_user_in_time(dataset.user_codes, dataset.timestamps, len(dataset.users))
    seen = np.concatenate(([0], np.cumsum(targets[order])))
    before = seen[:-1] - np.repeat(seen[offsets[:-1]], np.diff(offsets))
    late = np.zeros(len(order), dtype=bool)
    late[order] = (before > 0) & train[order]
    return late


def _warn_of_the_future(dataset: Dataset, assignment: Assignment) -> None:
    """Measures how much of training lies after the test targets, which each model may then learn from."""
    times = dataset.timestamps
    training = np.sort(times[assignment.part == TRAIN])
    targets = times[assignment.targets_of(TEST)]
    if not len(targets) or not len(training):
        return
    later = 1 - np.searchsorted(training, targets, side="right") / len(training)
    leaking = float(np.mean(later > 0))
    assignment.facts["share_of_test_targets_older_than_some_training"] = round(leaking, 4)
    assignment.facts["median_share_of_training_later_than_the_target"] = round(float(np.median(later)), 4)
    if leaking:
        assignment.warnings.append(
            f"{leaking:.1%} of the test targets are older than some training interaction of another user "
            f"(at the median target, {np.median(later):.1%} of training is later): models can learn from the "
            f"future. This is known of {assignment.protocol.split('-')[0]} splits; `temporal` is free of it."
        )
