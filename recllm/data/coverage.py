"""A random split in which users and items stand in training and in test, as far as that can be.

What cannot be: a user or an item with one interaction stands in one part only, which is training. An item
that only such a row could bring into test stays out of it, and where the test part is smaller than what it
would have to cover, rows that bring both a user and an item in come first. The parts keep their sizes.
"""

from __future__ import annotations

import numpy as np


def covering_parts(
    users: np.ndarray,
    items: np.ndarray,
    n_users: int,
    n_items: int,
    timed: np.ndarray,
    sizes: tuple[int, int],
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the rows of validation and test; the rest is training.

    Args:
        users: The user of each row; shape [rows].
        items: The item of each row; shape [rows].
        n_users: Number of users.
        n_items: Number of items.
        timed: Which rows may be held out; bool, shape [rows].
        sizes: Rows of validation and of test.
        random: Where chance comes from.

    Returns:
        Row numbers of validation and of test; fewer than asked for where each user and item would lose its
        training row.
    """
    spare = np.bincount(users, minlength=n_users), np.bincount(items, minlength=n_items)
    # What can only be training: rows without a time, and the one row of a user or an item.
    kept = ~timed | (spare[0][users] == 1) | (spare[1][items] == 1)
    everything = np.ones(len(users), dtype=bool)
    kept[_cover(users, items, everything, len(users), random, spare, covered=kept)] = True
    test = _cover(users, items, timed & ~kept, sizes[1], random, spare)
    free = timed & ~kept
    free[test] = False
    rest = random.permutation(np.flatnonzero(free))
    more = sizes[1] - len(test)
    return rest[more : more + sizes[0]], np.concatenate([test, rest[:more]])


def _cover(
    users: np.ndarray,
    items: np.ndarray,
    allowed: np.ndarray,
    count: int,
    random: np.random.Generator,
    spare: tuple[np.ndarray, np.ndarray],
    covered: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses rows, few and at random, so that each user and each item has one.

    In each round every row that brings in a user or an item bids, those that bring in both first; a row is
    taken where it is the best bid for whatever it brings in.

    Args:
        users: The user of each row; shape [rows].
        items: The item of each row; shape [rows].
        allowed: Which rows may be chosen; bool, shape [rows].
        count: The most rows to choose.
        random: Where chance comes from.
        spare: How many rows each user and each item has; shapes [users] and [items]. Of a row that brings in
            one of the two, the other should have many.
        covered: Rows that are chosen already; bool, shape [rows].

    Returns:
        The chosen rows; shape [chosen].
    """
    has_user, has_item = (np.zeros(len(each), dtype=bool) for each in spare)
    if covered is not None:
        has_user[users[covered]] = has_item[items[covered]] = True
    taken: list[np.ndarray] = []
    left = np.flatnonzero(allowed)
    order = random.permutation(len(users))
    while len(left) and count > 0:
        new_user, new_item = ~has_user[users[left]], ~has_item[items[left]]
        bids = new_user | new_item
        left, new_user, new_item = left[bids], new_user[bids], new_item[bids]
        if not len(left):
            break
        of_user, of_item = spare[0][users[left]], spare[1][items[left]]
        cost = -np.where(new_user, np.where(new_item, 0, of_item), of_user)
        rank = np.empty(len(left), dtype=np.int64)
        rank[np.lexsort((order[left], cost, ~(new_user & new_item)))] = np.arange(len(left))
        best_user, best_item = (np.full(len(each), len(left)) for each in spare)
        np.minimum.at(best_user, users[left[new_user]], rank[new_user])
        np.minimum.at(best_item, items[left[new_item]], rank[new_item])
        won = ~new_user | (best_user[users[left]] == rank)
        won &= ~new_item | (best_item[items[left]] == rank)
        rows = left[won][np.argsort(rank[won])][:count]
        has_user[users[rows]] = has_item[items[rows]] = True
        taken.append(rows)
        count -= len(rows)
    return np.concatenate([*taken, left[:0]])
