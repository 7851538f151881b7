"""The toy world: a seeded catalog and users, in which it is known what sight, memory and reading are worth.

**Items** have a color, a pattern and a shape, balanced and independent of each other and of category and
maker. Only the picture (and reviews) tell them; titles and descriptions tell category and maker, which
several items share.

**Users** like one category for good; their profile tells which. Each user looks at two of the three
attributes, also for good. *What* a user likes in these two drifts: life falls into `phases`, and each phase
has its own pair of values ("striped squares"). The pairs of a user are drawn without repetition, in random
order. In each phase the user takes items that she does not have yet, one by one, with probability

    p(item) = (1 - noise) exp(taste * m + category * l) / Z + noise / (number of items not yet taken),

where m in {0, 1, 2} counts the looked-at attributes that match the taste of the phase, l in {0, 1} says
whether the category is the liked one, and Z sums over the items not yet taken. Ratings (1 to 5) follow m and
l with some spread.

**Order matters, and only order does**: every phase but the last has `shortest` to `longest` interactions
(uniform, independent), the last phase one more than such a number. Take the last interaction as the target:
the counts by phase in the history are then exchangeable, so that who forgets the order cannot tell the last
phase from the others by its length (in mid-history, for instance at a validation target, it can; the
observers account for that). At least `shortest` history items show the present taste. There are so many
phases because the gap between knowing the taste (share f of the catalog fits) and knowing all tastes
without their order (share phases * f fits) is about (phases - 1) * f / 2 in AUC: with few phases a model that
forgets order would be nearly as good as one that does not. This design, and the default numbers (found by
simulation), are ours.

Everything follows from `seed` through `numpy.random.SeedSequence`; a user depends on the seed, the catalog
and her number only, so a world with more users begins with the same users, and has the same items.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data.dataset import Dataset, write_dataset
from recllm.data.toyworld import words
from recllm.data.toyworld.histories import draw_opinions, draw_times, live
from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES, render
from recllm.data.toyworld.parameters import SIZES, Parameters, Stream, stream
from recllm.errors import DataError
from recllm.files import read_json, write_json


@dataclass(frozen=True)
class ToyWorld:
    """A toy world in memory: the three tables of a dataset, and the answer key.

    Attributes:
        parameters: What it was made from.
        items: Table of the dataset, with `maker` as an extra column.
        interactions: Table of the dataset, in the order of time.
        users: Table of the dataset, with `profile` (text) and `favorite` (the category that it tells).
        item_answers: `item, color, pattern, shape, category`, in the order of `items`.
        interaction_answers: `user, item, position, phase, color, pattern, shape, noise`, in the order of
            `interactions`: the interaction's number within its user, the phase (both from 0), the taste at
            that time (null for the attribute that is not looked at), and whether it was a noise pick.
    """

    parameters: Parameters
    items: pl.DataFrame
    interactions: pl.DataFrame
    users: pl.DataFrame
    item_answers: pl.DataFrame
    interaction_answers: pl.DataFrame

    def write(self, out: Path | str, *, overwrite: bool = False, discard_derived: bool = False) -> Dataset:
        """Writes a dataset folder, with the pictures in `images/` and the answer key in `truth/`.

        `truth/items.parquet`, `truth/interactions.parquet` and `truth/parameters.json` are for `observers`
        and for tests. No reader, builder, recipe or model may open them: they hold what a model is to find
        out.

        Raises:
            DataError: `out` exists, or the disk is full.
        """
        source = {
            "kind": "toyworld",
            "parameters": dataclasses.asdict(self.parameters),
            "truth": "the folder truth/ is the answer key: no builder, recipe or model may read it",
        }
        return write_dataset(
            out,
            items=self.items,
            interactions=self.interactions,
            users=self.users,
            source=source,
            stage=self._stage,
            overwrite=overwrite,
            discard_derived=discard_derived,
        )

    def _stage(self, folder: Path) -> None:
        (folder / "images").mkdir()
        (folder / "truth").mkdir()
        looks = self.item_answers.select("item", "color", "pattern", "shape").iter_rows()
        for number, (item, color, pattern, shape) in enumerate(looks):
            rng = stream(self.parameters.seed, Stream.IMAGES, number)
            render(color, pattern, shape, rng).save(folder / "images" / f"{item}.png")
        self.item_answers.write_parquet(folder / "truth" / "items.parquet")
        self.interaction_answers.write_parquet(folder / "truth" / "interactions.parquet")
        write_json(folder / "truth" / "parameters.json", dataclasses.asdict(self.parameters))

    @classmethod
    def open(cls, folder: Path | str) -> ToyWorld:
        """Reads a toy world back from its dataset folder, answer key included.

        Raises:
            DataError: The folder is not a dataset, or not one of a toy world.
        """
        dataset = Dataset.open(folder)
        truth = Path(folder) / "truth"
        values = read_json(truth / "parameters.json", "the answer key of a toy world")
        try:
            parameters = Parameters(**values)
            items = pl.read_parquet(truth / "items.parquet", glob=False)
            interactions = pl.read_parquet(truth / "interactions.parquet", glob=False)
        except (TypeError, FileNotFoundError, pl.exceptions.ComputeError) as error:
            raise DataError(
                f"{truth} is not the answer key of this toy world ({error}); make it again"
            ) from None
        return cls(parameters, dataset.items, dataset.interactions, dataset.users, items, interactions)


def generate(users: int = 500, items: int = 200, seed: int = 0, **others: float) -> ToyWorld:
    """Makes a toy world in memory.

    Args:
        users: How many users.
        items: How many items.
        seed: 0 or more.
        others: Other fields of `Parameters`.

    Raises:
        DataError: The sizes cannot work, for example too few items for a history without repetition.
    """
    parameters = Parameters(users=users, items=items, seed=seed, **others)  # type: ignore[arg-type]
    attributes, category, maker = _draw_items(parameters)
    item_ids = [f"i{number:05d}" for number in range(parameters.items)]
    history = live(parameters, attributes, category)
    user_ids = np.array([f"u{number:06d}" for number in range(parameters.users)])
    item_frame, item_answers = _item_frames(item_ids, attributes, category, maker)
    profile_kind = (stream(seed, Stream.PROFILES).random(parameters.users) * words.PROFILE_KINDS).astype(int)
    favorites = [words.CATEGORIES[code] for code in history.favorite]
    user_frame = pl.DataFrame(
        {
            "user": user_ids,
            "profile": [words.profile_of(f, k) for f, k in zip(favorites, profile_kind, strict=True)],
            "favorite": favorites,
        }
    )
    timestamps = draw_times(parameters, history.lengths)
    rating, reviews = draw_opinions(parameters, history, attributes, category, maker)
    owner, position = np.nonzero(history.items >= 0)
    order = np.lexsort((owner, timestamps[owner, position]))
    owner, position = owner[order], position[order]
    item = history.items[owner, position]
    keys = {"user": user_ids[owner], "item": np.array(item_ids)[item]}
    interactions = pl.DataFrame(
        {
            **keys,
            "timestamp": timestamps[owner, position],
            "rating": rating[owner, position].astype(np.float32),
            "review": reviews[order],
        },
        schema_overrides={"review": pl.String},
    )
    phase = history.phase[owner, position]
    taste = history.tastes[owner, phase]
    answers = pl.DataFrame(
        {
            **keys,
            "position": position.astype(np.int32),
            "phase": phase.astype(np.int32),
            **{
                name: _named(taste[:, axis], vocabulary)
                for axis, (name, vocabulary) in enumerate(
                    (("color", COLORS), ("pattern", PATTERNS), ("shape", SHAPES))
                )
            },
            "noise": history.noise[owner, position],
        }
    )
    return ToyWorld(parameters, item_frame, interactions, user_frame, item_answers, answers)


def _draw_items(parameters: Parameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attribute codes [items, 3], category [items], maker [items]; each balanced, all independent."""
    rng, count = stream(parameters.seed, Stream.ITEMS), parameters.items
    combinations = np.array(list(np.ndindex(*SIZES)))
    rounds = -(-count // len(combinations))
    attributes = np.concatenate([rng.permutation(combinations) for _ in range(rounds)])[:count]
    category = rng.permutation(np.arange(count) % len(words.CATEGORIES))
    maker = rng.permutation(np.arange(count) % len(words.MAKERS))
    return attributes, category, maker


def _item_frames(
    ids: list[str], attributes: np.ndarray, category: np.ndarray, maker: np.ndarray
) -> tuple[pl.DataFrame, pl.DataFrame]:
    categories = [words.CATEGORIES[code] for code in category]
    makers = [words.MAKERS[code] for code in maker]
    named = list(zip(makers, categories, strict=True))
    items = pl.DataFrame(
        {
            "item": ids,
            "title": [words.title_of(*pair) for pair in named],
            "text": [words.text_of(*pair) for pair in named],
            "categories": [[words.PLURALS[name]] for name in categories],
            "images": [[f"images/{item}.png"] for item in ids],
            "maker": makers,
        }
    )
    answers = pl.DataFrame(
        {
            "item": ids,
            "color": _named(attributes[:, 0], COLORS),
            "pattern": _named(attributes[:, 1], PATTERNS),
            "shape": _named(attributes[:, 2], SHAPES),
            "category": categories,
        }
    )
    return items, answers


def _named(codes: np.ndarray, vocabulary: tuple[str, ...]) -> pl.Series:
    """Words for codes; null for the code one past the vocabulary."""
    return pl.Series([*vocabulary, None], dtype=pl.String).gather(codes)
