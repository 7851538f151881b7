"""Observers of the toy world: what can be scored by one who knows a certain thing, and no more.

Apart from `recent`, an observer ranks candidates by the exact probability that the user picks them, given
what the observer knows. No scorer with the same knowledge has a higher expected AUC, so an observer is the
ceiling for every model that lacks what it lacks (`order_blind` but for about .01 AUC, as it says). They read
the answer key; models must not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data.dataset import Dataset
from recllm.data.toyworld import words
from recllm.data.toyworld.histories import attribute_weights
from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES
from recllm.data.toyworld.parameters import SIZES, Parameters
from recllm.data.toyworld.world import ToyWorld
from recllm.errors import DataError

_VOCABULARIES = {"color": COLORS, "pattern": PATTERNS, "shape": SHAPES}


@dataclass(frozen=True)
class Key:
    """A world's answer key as arrays of codes; users and items are numbered as in the world's tables.

    Attributes:
        parameters: What the world was made from.
        attributes: Color, pattern and shape of the items, shape [items, 3].
        category: Of the items, shape [items].
        favorite: The users' liked category, shape [users].
        tastes: Shape [users, phases, 3]; one past the vocabulary for an attribute that is not looked at.
        taken: The users' items in order, shape [users, longest history], -1 after the last.
        phase: The phase of each, of the same shape.
        total: Number of interactions of the users, shape [users].
    """

    parameters: Parameters
    attributes: np.ndarray
    category: np.ndarray
    favorite: np.ndarray
    tastes: np.ndarray
    taken: np.ndarray
    phase: np.ndarray
    total: np.ndarray


@dataclass(frozen=True)
class View:
    """A block of candidate lists, as observers are asked about them.

    Attributes:
        key: The answer key.
        user: The user of each list, shape [lists].
        position: The target's place in its user's history, shape [lists].
        free: Whether the user has not taken the item before the target, shape [lists, items].
        row_list: The list of each candidate, shape [rows].
        row_item: The item of each candidate, shape [rows].
    """

    key: Key
    user: np.ndarray
    position: np.ndarray
    free: np.ndarray
    row_list: np.ndarray
    row_item: np.ndarray

    def chances(self, weights: np.ndarray) -> np.ndarray:
        """Turns item weights [lists, items] into the candidates' choice probabilities [rows], with noise."""
        noise = self.key.parameters.noise
        mass = (weights * self.free).sum(axis=1)
        chosen = (1 - noise) * weights[self.row_list, self.row_item] / mass[self.row_list]
        return chosen + noise / self.free.sum(axis=1)[self.row_list]

    def category_weights(self) -> np.ndarray:
        """What the liked category contributes to the weights, shape [lists, items]."""
        liked = self.key.favorite[self.user][:, None] == self.key.category
        return np.exp(self.key.parameters.category * liked)

    def taste_weights(self, phase: np.ndarray) -> np.ndarray:
        """What the taste of a phase (one a list) contributes to the weights, shape [lists, items]."""
        color, pattern, shape = self.key.tastes[self.user, phase].T
        by_color, by_pattern, by_shape = attribute_weights(self.key.attributes, self.key.parameters.taste)
        return by_color[color] * by_pattern[pattern] * by_shape[shape]


def oracle(view: View) -> np.ndarray:
    """Knows the taste at the moment of the target, the pictures and the profile: the true choice probability.

    The ceiling for every model. What it misses is chance: the draw among items that fit, and noise picks.
    """
    phase = view.key.phase[view.user, view.position]
    return view.chances(view.taste_weights(phase) * view.category_weights())


def order_blind(view: View) -> np.ndarray:
    """Knows all tastes of the user so far, how many history items fell into each, pictures and profile.

    It does not know the order (nor the times, which would tell it). It knows how the world is made and how
    many interactions are still to come (a protocol such as leave-one-out gives that away), and mixes the
    choice probabilities of the tastes by their exact posterior weights of being the present one. A model that
    sees the history as a bag has to infer the tastes, which this observer is given, so the observer bounds
    all such models (mean profiles, sums, attention without positions), but for one thing that it leaves
    unused: which items are already gone hints faintly at the order in which the tastes came. A model that
    used that in full could stand up to about .01 AUC above it (measured by sampling orders with a Markov
    chain), so a test that a model reads the order should ask for a margin beyond that. At the last
    interaction of a user the posterior is uniform.
    """
    key = view.key
    begun, left = key.phase[view.user, view.position] + 1, key.total[view.user] - view.position - 1
    posterior = posterior_of_phase(_counts(view), begun, left, key.parameters)
    likely = view.category_weights()
    scores = np.zeros(len(view.row_list))
    for number in range(key.parameters.phases):
        phase = np.full(len(view.user), number)
        # phases that have not begun have posterior 0, so their tastes are not used
        scores += posterior[view.row_list, number] * view.chances(view.taste_weights(phase) * likely)
    return scores


def sightless(view: View) -> np.ndarray:
    """Knows titles, categories and the profile; neither pictures nor reviews, nor who took what.

    Attributes are independent of everything that it knows. Seen from here, all items of a category are alike,
    and the liked category is the more probable one, so this order is the best there is for whoever reads
    titles and profile only. A model of item ids or of reviews is not bound by it: co-occurrence and words
    betray the attributes. The probability is exact up to that: attributes are averaged out, which keeps the
    order.
    """
    return view.chances(view.category_weights())


def recent(view: View) -> np.ndarray:
    """Counts the attributes that a candidate shares with the three history items before the target.

    Not a ceiling but a mark that a model can attain which sees and knows the order: it uses only what
    pictures show, and knows neither which attributes the user looks at nor the profile. Between 0 and 9.
    """
    scores = np.zeros(len(view.row_list))
    for back in (1, 2, 3):
        place = view.position - back
        item = view.key.taken[view.user, np.maximum(place, 0)]
        shared = view.key.attributes[item][view.row_list] == view.key.attributes[view.row_item]
        scores += (place >= 0)[view.row_list] * shared.sum(axis=1)
    return scores


OBSERVERS: dict[str, Callable[[View], np.ndarray]] = {
    "oracle": oracle,
    "recent": recent,
    "order_blind": order_blind,
    "sightless": sightless,
}


def observer_scores(
    world: ToyWorld | Dataset | Path | str, candidates: pl.DataFrame, observer: str
) -> pl.DataFrame:
    """Scores candidates as an observer would.

    Args:
        world: A toy world, its dataset, or its dataset folder.
        candidates: `user, target, item`; each (user, target) must be an interaction of the world. Other
            columns are ignored. A list is judged at the moment of its target.
        observer: A key of `OBSERVERS`.

    Returns:
        `user, target, item, score`, in the order of `candidates`.

    Raises:
        DataError: A column is missing, or an id or an observer is not known.
    """
    if observer not in OBSERVERS:
        raise DataError(f"observer {observer!r} is unknown; expected one of {', '.join(OBSERVERS)}")
    missing = [name for name in ("user", "target", "item") if name not in candidates.columns]
    if missing:
        raise DataError(
            f"candidates of the toy world need the column {missing[0]!r}; "
            f"found: {', '.join(candidates.columns)}"
        )
    if isinstance(world, Dataset):
        world = world.folder
    if not isinstance(world, ToyWorld):
        world = ToyWorld.open(world)
    key = read_key(world)
    rows = candidates.select("user", "target", "item")
    user, target = _codes(rows["user"], world.users["user"]), _codes(rows["target"], world.items["item"])
    item = _codes(rows["item"], world.items["item"])
    lists, list_of_row = np.unique(user * len(world.items) + target, return_inverse=True)
    owner, target = np.divmod(lists, len(world.items))
    hit = key.taken[owner] == target[:, None]
    if not hit.any(axis=1).all():
        where = int(np.argmin(hit.any(axis=1)))
        raise DataError(
            f"candidates: user {world.users['user'][int(owner[where])]!r} has no interaction with the target "
            f"{world.items['item'][int(target[where])]!r} in this toy world; were they made from another one?"
        )
    position = hit.argmax(axis=1)
    scores = np.empty(len(rows))
    by_list = np.argsort(list_of_row, kind="stable")
    block = max(1, 1_000_000 // len(world.items))
    for first in range(0, len(lists), block):
        part = slice(first, min(first + block, len(lists)))
        start, stop = np.searchsorted(list_of_row[by_list], (part.start, part.stop))
        own = by_list[start:stop]
        free = _free(key, owner[part], position[part])
        view = View(key, owner[part], position[part], free, list_of_row[own] - first, item[own])
        scores[own] = OBSERVERS[observer](view)
    return rows.with_columns(pl.Series("score", scores))


def read_key(world: ToyWorld) -> Key:
    """Returns a world's answer key as arrays."""
    parameters = world.parameters
    answers = world.interaction_answers
    user, item = _codes(answers["user"], world.users["user"]), _codes(answers["item"], world.items["item"])
    position, phase = answers["position"].to_numpy(), answers["phase"].to_numpy()
    shape = (parameters.users, parameters.longest_history)
    taken, phases = np.full(shape, -1), np.zeros(shape, dtype=int)
    taken[user, position], phases[user, position] = item, phase
    tastes = np.zeros((parameters.users, parameters.phases, 3), dtype=int)
    for axis, (name, vocabulary) in enumerate(_VOCABULARIES.items()):
        codes = answers[name].cast(pl.Enum(vocabulary)).to_physical().fill_null(SIZES[axis])
        tastes[user, phase, axis] = codes.to_numpy()
    attributes = [
        world.item_answers[name].cast(pl.Enum(vocabulary)).to_physical().to_numpy()
        for name, vocabulary in _VOCABULARIES.items()
    ]
    categories = pl.Series(words.CATEGORIES)
    return Key(
        parameters=parameters,
        attributes=np.stack(attributes, axis=1).astype(int),
        category=_codes(world.item_answers["category"], categories),
        favorite=_codes(world.users["favorite"], categories),
        tastes=tastes,
        taken=taken,
        phase=phases,
        total=(taken >= 0).sum(axis=1),
    )


def _codes(ids: pl.Series, known: pl.Series) -> np.ndarray:
    codes = ids.cast(pl.String).cast(pl.Enum(known), strict=False).to_physical()
    if codes.null_count():
        where = codes.is_null().arg_max()
        raise DataError(f"row {where}: {ids.name} {ids[where]!r} does not exist in this toy world")
    return codes.to_numpy().astype(np.int64)


def _free(key: Key, user: np.ndarray, position: np.ndarray) -> np.ndarray:
    free = np.ones((len(user), len(key.attributes)), dtype=bool)
    row, place = np.nonzero(np.arange(key.taken.shape[1]) < position[:, None])
    free[row, key.taken[user[row], place]] = False
    return free


def _counts(view: View) -> np.ndarray:
    """History interactions by phase, shape [lists, phases]."""
    before = np.arange(view.key.taken.shape[1]) < view.position[:, None]
    phase = view.key.phase[view.user]
    return np.stack([(before & (phase == n)).sum(axis=1) for n in range(view.key.parameters.phases)], axis=1)


def posterior_of_phase(
    counts: np.ndarray, begun: np.ndarray, left: np.ndarray, parameters: Parameters
) -> np.ndarray:
    """Returns the probability of each phase to be the present one, given the counts by phase, not the order.

    Every order of the phases that have begun is equally probable beforehand. If phase k is the present one,
    the other begun ones have ended, each with a length equal to its count; phase k and the phases to come
    share what is left.

    Args:
        counts: History interactions by phase, shape [lists, phases], zero for phases that have not begun.
        begun: Number of phases that have begun, the target's included, shape [lists]; the first columns.
        left: Number of interactions after the target, shape [lists].
        parameters: Give the law of the lengths.

    Returns:
        Shape [lists, phases]; rows sum to 1.
    """
    phases = parameters.phases
    law = np.zeros(2 * parameters.longest_history + 2)  # P(length = n); wide enough for every index below
    law[parameters.shortest : parameters.longest + 1] = 1 / (parameters.longest - parameters.shortest + 1)
    sums = [np.eye(1, len(law))[0]]  # sums[m][n] = P(m phases together have n)
    for _ in range(phases):
        sums.append(np.convolve(sums[-1], law)[: len(law)])
    to_come = np.array(sums)[phases - begun]
    lists = np.arange(len(begun))
    weights = np.zeros(counts.shape)
    for present in range(phases):
        others = np.where(np.arange(phases) < begun[:, None], law[counts], 1.0)
        others[:, present] = 1.0
        own = counts[:, present]
        # Where the last phase is the present one: it has one interaction more than its drawn length.
        tail = law[own + left]
        coming = np.zeros(len(begun))
        # Where phases are to come: `more` interactions of the present one follow the target, the rest
        # belongs to them, less the last one's extra.
        for more in range(parameters.longest):
            rest = left - more - 1
            coming += np.where(rest >= 0, law[own + 1 + more] * to_come[lists, np.maximum(rest, 0)], 0.0)
        tail = np.where(begun == phases, tail, coming)
        weights[:, present] = np.where(present < begun, others.prod(axis=1) * tail, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
