"""The four tasks of MMSRARec's fine-tuning (stage 3): which targets each is asked of, and the answers.

The paper names "four types of recommendation tasks" after LC-Rec and gives no contents; these are ours:

* `yes_no`: whether the user would like an item next. Scores come from it.
* `next_keywords`: the keywords of the next item.
* `choose`: the number of the next item among candidates, in an order drawn for each target.
* `summarize`: the keywords that at least two items of the user's known history share, the most frequent
  first, of equal ones the most recent; at most six.

The share of a task is the probability that a target is asked it. The draw depends on the seed, the task, the
user and the target alone, so that changing one task's share leaves the rows of the others as they are.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from recllm.data.instructions import YES_NO
from recllm.errors import DataError

NEXT_KEYWORDS, CHOOSE, SUMMARIZE = "next_keywords", "choose", "summarize"
TASKS = (YES_NO, NEXT_KEYWORDS, CHOOSE, SUMMARIZE)
SUMMARY_KEYWORDS = 6
"""Most keywords of the answer to `summarize`; stage 1's lists have three to six."""


def shares_of(words: Sequence[str]) -> dict[str, float]:
    """Reads `--tasks`: names of tasks, each with `=SHARE` or without.

    Returns:
        The share of each task, above 0 and at most 1, in the order of `TASKS`.

    Raises:
        DataError: A name is unknown or repeated, a share is not within its bounds, or there are none.
    """
    shares: dict[str, float] = {}
    for word in words:
        name, equals, share = word.partition("=")
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0)[0]
            raise DataError(
                f"--tasks {word!r}: no task {name!r}, the nearest is {near!r} ({', '.join(TASKS)})"
            )
        if name in shares:
            raise DataError(f"--tasks: {name!r} is named twice")
        try:
            shares[name] = float(share) if equals else 1.0
        except ValueError:
            shares[name] = -1.0
        if not 0 < shares[name] <= 1:
            raise DataError(
                f"--tasks {word!r}: expected NAME or NAME=SHARE, the share above 0 and at most 1; leave a "
                "task out to have none of it"
            )
    if not shares:
        raise DataError(f"--tasks: expected one or more of {', '.join(TASKS)}")
    return {name: shares[name] for name in TASKS if name in shares}


def is_asked(task: str, share: float, seed: int, user: str, target: str, row: int) -> bool:
    """Tells whether a target is among the share of the targets that a task is asked of."""
    return share >= 1 or _number(seed, task, user, target, row) < share * 2**64


def shuffled(items: Sequence[int], seed: int, user: str, target: str, row: int) -> list[int]:
    """Returns the candidates of a target in an order that depends on seed, user and target alone."""
    random = np.random.default_rng(_number(seed, "order of candidates", user, target, row))
    return random.permutation(np.asarray(items, dtype=np.int64)).tolist()


def recurring(lists: Sequence[Sequence[str]], most: int = SUMMARY_KEYWORDS) -> list[str]:
    """Returns the keywords that at least two of the lists have, the most frequent first.

    Two keywords are the same if they differ in case alone; the latest spelling is returned.

    Args:
        lists: The keywords of each item, oldest first.
        most: How many at most.
    """
    counts: Counter[str] = Counter()
    latest: dict[str, tuple[int, int, str]] = {}
    for number, words in enumerate(lists):
        counts.update({word.casefold() for word in words})
        for place, word in enumerate(words):
            latest[word.casefold()] = (-number, place, word)
    again = [key for key, count in counts.items() if count > 1]
    again.sort(key=lambda key: (-counts[key], latest[key]))
    return [latest[key][2] for key in again[:most]]


def counts_of(counts: Mapping[str, int]) -> str:
    """Returns how many rows each task but `yes_no` has, for people: `12 next_keywords, 9 choose`."""
    return ", ".join(f"{counts[f'rows_{task}']:,} {task}" for task in TASKS[1:] if counts.get(f"rows_{task}"))


def _number(seed: int, purpose: str, user: str, target: str, row: int) -> int:
    name = f"{seed} {purpose} {len(user)} {user} {row} {target}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
