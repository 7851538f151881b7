"""The plain English of the toy world: titles, descriptions, profiles and reviews.

Titles, descriptions and profiles are written from the category, the maker and the user alone. No word of
`ATTRIBUTE_WORDS` may stand in them (a test looks at each word); reviews are where the words appear.
"""

from __future__ import annotations

CATEGORIES: tuple[str, ...] = ("mug", "cushion", "scarf", "poster", "notebook")
PLURALS: dict[str, str] = {
    "mug": "mugs",
    "cushion": "cushions",
    "scarf": "scarves",
    "poster": "posters",
    "notebook": "notebooks",
}
MAKERS: tuple[str, ...] = ("Arbor", "Fenwick", "Juniper", "Lumen", "Marlow", "Tarn")

ATTRIBUTE_WORDS: frozenset[str] = frozenset(
    (
        *("color", "colors", "colored", "dark", "bright", "red", "reddish", "yellow", "yellowish", "green"),
        *("greenish", "blue", "bluish", "purple", "violet", "black", "pattern", "patterns", "patterned"),
        *("plain", "solid", "stripe", "stripes", "striped", "dot", "dots", "dotted", "spotted", "check"),
        *("checks", "checked", "checkered", "shape", "shapes", "shaped", "circle", "circles", "circular"),
        *("round", "square", "squares", "triangle", "triangles", "triangular", "star", "stars", "starry"),
    )
)
"""Every word that names an attribute of a picture, or comes near it. Lower case."""

_DESCRIPTIONS: dict[str, str] = {
    "mug": "A stoneware mug for tea or coffee that holds 350 ml and may go into the dishwasher.",
    "cushion": "A soft cushion with a removable cotton cover, 45 cm wide, made for sofas and reading chairs.",
    "scarf": "A light woolen scarf, 180 cm long, warm enough for windy mornings.",
    "poster": "A printed poster on heavy matte paper, 30 by 40 cm, delivered rolled in a tube.",
    "notebook": "A bound notebook with 120 numbered pages and paper that takes ink well.",
}
_MAKER_LINES: dict[str, str] = {
    "Arbor": "Arbor works in small batches and signs each piece.",
    "Fenwick": "Fenwick is a family workshop by the sea.",
    "Juniper": "Juniper prints by hand and ships within two days.",
    "Lumen": "Lumen repairs what it sells for ten years.",
    "Marlow": "Marlow uses recycled material wherever it can.",
    "Tarn": "Tarn makes things that are meant to be used daily.",
}

_INTRODUCTIONS: tuple[str, ...] = (
    "Teaches at a village school.",
    "Moved to a new flat last spring.",
    "Works nights at the hospital.",
    "Runs a small bakery with a friend.",
    "Studies history and shares a kitchen with four people.",
    "Retired, with plenty of time for the garden.",
    "Travels a lot for work.",
    "Writes software from home.",
)
_WISHES: tuple[str, ...] = (
    "Looks for {plural} above all.",
    "Can never have enough {plural}.",
    "Usually comes to the shop for {plural}.",
    "Friends know that a {category} is always a welcome gift.",
    "Has collected {plural} for years.",
)
PROFILE_KINDS = len(_INTRODUCTIONS) * len(_WISHES)

_LOVED: tuple[str, ...] = (
    "Love it. The {pattern} {color} {shape} is just what I wanted.",
    "A {category} with a {color} {shape}, {pattern} all over. Perfect!",
    "That {shape}! {Color} and {pattern}, it makes me smile every day.",
    "I was looking for something {pattern} in {color}, and the {shape} on this {category} is lovely.",
    "Exactly my style right now: {pattern}, with a big {color} {shape}.",
    "The {category} is well made and the {color} {shape} looks great {pattern}.",
    "My third {category} from {maker}; this {pattern} {shape} in {color} is the best so far.",
    "Beautiful {color} tone, and a {pattern} {shape} suits the room. Would buy again.",
)
_FAIR: tuple[str, ...] = (
    "Decent {category}. The {shape} is nice, but {pattern} in {color} is not quite for me.",
    "It is fine. A {pattern} {color} {shape}, as in the photo.",
    "Good quality by {maker}; I am undecided about the {color} {shape}, which is {pattern}.",
    "Okay for the price. I expected to like the {pattern} {shape} more; the {color} is all right.",
)
_DISLIKED: tuple[str, ...] = (
    "Not for me. A {pattern} {shape} in {color} is not what I would pick again.",
    "Bought it on a whim and regret it: the {color} {shape} looks wrong, and {pattern} does not help.",
    "The {category} is sturdy, but I do not like the {pattern} {color} {shape} at all.",
    "Gave it away. {Color}, {pattern}, and a {shape} on top of it.",
)
REVIEW_KINDS = 8  # every list of templates divides it, so that one number in 0..7 picks evenly from each


def title_of(maker: str, category: str) -> str:
    """Returns an item's title: maker and category noun. Several items share it."""
    return f"{maker} {category}"


def text_of(maker: str, category: str) -> str:
    """Returns an item's description, which tells no more than its title does."""
    return f"{_DESCRIPTIONS[category]} {_MAKER_LINES[maker]}"


def profile_of(category: str, kind: int) -> str:
    """Returns a profile that tells the liked category; `kind` in 0..PROFILE_KINDS-1 picks the wording."""
    introduction, wish = divmod(kind, len(_WISHES))
    return (
        f"{_INTRODUCTIONS[introduction]} {_WISHES[wish].format(category=category, plural=PLURALS[category])}"
    )


def review_of(
    rating: int, kind: int, *, color: str, pattern: str, shape: str, category: str, maker: str
) -> str:
    """Returns a review that names the item's color, pattern and shape; `kind` in 0..REVIEW_KINDS-1."""
    templates = _LOVED if rating >= 4 else _FAIR if rating == 3 else _DISLIKED
    return templates[kind % len(templates)].format(
        color=color,
        Color=color.capitalize(),
        pattern=pattern,
        shape=shape,
        category=category,
        maker=maker,
    )
