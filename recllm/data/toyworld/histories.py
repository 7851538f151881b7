"""The lives of the toy world's users: tastes, phases, picks, times and opinions, as arrays of codes.

Every random number is drawn from an array whose first axis is the user, so that a world with more users
begins with the same users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recllm.data.toyworld import words
from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES
from recllm.data.toyworld.parameters import LOOKS, SIZES, Parameters, Stream, stream

START, SPAN = 1_640_995_200, 730 * 86_400  # from 2022-01-01 00:00 UTC, two years, in seconds


@dataclass(frozen=True)
class Histories:
    """Everything that happened to the users, as codes."""

    favorite: np.ndarray  # [users]
    tastes: np.ndarray  # [users, phases, 3]; the code `SIZES[axis]` where the attribute is not looked at
    lengths: np.ndarray  # [users, phases], the last phase with its extra interaction
    phase: np.ndarray  # [users, longest history], of each interaction
    items: np.ndarray  # [users, longest history]; -1 after the last interaction
    noise: np.ndarray  # [users, longest history]


def attribute_weights(attributes: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each attribute, exp(strength * match) of each value with each item.

    Args:
        attributes: Codes of the items' color, pattern and shape, shape [items, 3].
        strength: Log-odds of a match.

    Returns:
        Three arrays of shape [values + 1, items]; the last row is all ones, for an attribute that is not
        looked at.
    """
    tables = []
    for axis, size in enumerate(SIZES):
        match = np.arange(size + 1)[:, None] == attributes[None, :, axis]
        tables.append(np.exp(strength * match))
    return tables[0], tables[1], tables[2]


def _draw_tastes(parameters: Parameters) -> np.ndarray:
    """Codes of the tastes, [users, phases, 3]."""
    users, phases = parameters.users, parameters.phases
    look = (stream(parameters.seed, Stream.LOOKS).random(users) * len(LOOKS)).astype(int)
    keys = stream(parameters.seed, Stream.TASTES).random((users, max(SIZES[a] * SIZES[b] for a, b in LOOKS)))
    tastes = np.broadcast_to(np.array(SIZES), (users, phases, 3)).copy()
    for number, (first, second) in enumerate(LOOKS):
        own = look == number
        pairs = np.argsort(keys[own, : SIZES[first] * SIZES[second]], axis=1)[:, :phases]
        tastes[own, :, first], tastes[own, :, second] = np.divmod(pairs, SIZES[second])
    return tastes


def live(parameters: Parameters, attributes: np.ndarray, category: np.ndarray) -> Histories:
    """Draws tastes and lengths, then lets users pick item after item; blocks of users bound the memory."""
    seed, users, steps = parameters.seed, parameters.users, parameters.longest_history
    favorite = (stream(seed, Stream.FAVORITES).random(users) * len(words.CATEGORIES)).astype(int)
    tastes = _draw_tastes(parameters)
    spread = parameters.longest - parameters.shortest + 1
    lengths = parameters.shortest + (
        stream(seed, Stream.LENGTHS).random((users, parameters.phases)) * spread
    ).astype(int)
    lengths[:, -1] += 1
    total = lengths.sum(axis=1)
    phase = np.full((users, steps), parameters.phases - 1)
    for number in range(parameters.phases - 1, 0, -1):
        phase[np.arange(steps) < lengths[:, :number].sum(axis=1)[:, None]] = number - 1
    draws = stream(seed, Stream.CHOICES).random((users, steps))
    noise = stream(seed, Stream.NOISE).random((users, steps)) < parameters.noise
    taken = np.full((users, steps), -1)
    by_color, by_pattern, by_shape = attribute_weights(attributes, parameters.taste)
    by_category = np.exp(parameters.category * (np.arange(len(words.CATEGORIES))[:, None] == category))
    block = max(1, 500_000 // parameters.items)
    for first in range(0, users, block):
        rows = np.arange(first, min(first + block, users))
        free = np.ones((len(rows), parameters.items))
        liked = by_category[favorite[rows]]
        for step in range(int(total[rows].max())):
            color, pattern, shape = tastes[rows, phase[rows, step]].T
            weights = by_color[color] * by_pattern[pattern] * by_shape[shape] * liked
            weights[noise[rows, step]] = 1.0
            weights *= free
            cumulative = np.cumsum(weights, axis=1, out=weights)
            mass = cumulative[:, -1]
            threshold = np.minimum(draws[rows, step] * mass, np.nextafter(mass, 0))
            pick = (cumulative > threshold[:, None]).argmax(axis=1)
            active = step < total[rows]
            taken[rows[active], step] = pick[active]
            free[active, pick[active]] = 0.0
    return Histories(favorite, tastes, lengths, phase, taken, noise)


def draw_times(parameters: Parameters, lengths: np.ndarray) -> np.ndarray:
    """UTC seconds [users, longest history]: each user is active for a part of the two years, irregularly."""
    users, steps = parameters.users, parameters.longest_history
    first, share = stream(parameters.seed, Stream.SPANS).random((users, 2)).T
    start = first * 0.6 * SPAN
    active = (0.3 + 0.7 * share) * (SPAN - start) - 60 * steps
    gaps = -np.log1p(-stream(parameters.seed, Stream.GAPS).random((users, steps)))
    gaps[np.arange(steps) >= lengths.sum(axis=1)[:, None]] = 0.0
    passed = np.cumsum(gaps, axis=1)
    passed *= (active / passed[:, -1])[:, None]
    # a minute between two interactions at least, so that times increase strictly
    return START + (start[:, None] + passed).astype(np.int64) + 60 * np.arange(steps)


def draw_opinions(
    parameters: Parameters,
    history: Histories,
    attributes: np.ndarray,
    category: np.ndarray,
    maker: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Ratings [users, longest history], and the reviews of the interactions that exist, user by user."""
    users, steps = history.items.shape
    owner, position = np.nonzero(history.items >= 0)
    item = history.items[owner, position]
    taste = history.tastes[owner, history.phase[owner, position]]
    score = 1.5 + 1.25 * (taste == attributes[item]).sum(axis=1)
    score += 0.4 * (category[item] == history.favorite[owner])
    score += 0.5 * stream(parameters.seed, Stream.RATINGS).standard_normal((users, steps))[owner, position]
    ratings = np.zeros((users, steps), dtype=int)
    ratings[owner, position] = np.clip(np.rint(score), 1, 5)
    kinds = (stream(parameters.seed, Stream.WORDINGS).random((users, steps)) * words.REVIEW_KINDS).astype(int)
    facts = [
        {
            "color": COLORS[color],
            "pattern": PATTERNS[pattern],
            "shape": SHAPES[shape],
            "category": words.CATEGORIES[category[number]],
            "maker": words.MAKERS[maker[number]],
        }
        for number, (color, pattern, shape) in enumerate(attributes)
    ]
    told = zip(ratings[owner, position].tolist(), kinds[owner, position].tolist(), item.tolist(), strict=True)
    reviews = [words.review_of(rating, kind, **facts[number]) for rating, kind, number in told]
    return ratings, np.array(reviews, dtype=object)
