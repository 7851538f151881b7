"""Protocol strings in words."""

from __future__ import annotations

import re

_SPLITS = {
    "loo": "Leave-one-out: the last interaction of each user is the test target, the one before it the "
    "validation target, and everything earlier is known",
    "ratio-time": "Of each user's interactions, in order of time, the last shares are held out",
    "ratio": "Of each user's interactions a random share is held out",
    "random": "A random share of all interactions is held out, whatever their time",
    "users": "A share of the users is held out as a whole; the last interaction of each is the target",
    "temporal": "Everything after one point in time, the same for all users, is held out",
    "cold-items": "A share of the items is held out, with all interactions with them: training knows none of "
    "the targets",
    "given": "The parts are those that the source of the data came with",
}
_MASKS = {
    "mask-seen": "without the items that the user is known to have touched",
    "mask-train": "without the user's training items",
    "no-mask": "those that the user has touched included",
}


def explain(protocol: str) -> str:
    """Returns what a protocol string means in one or two sentences, as plain text."""
    first, _, rest = protocol.removesuffix("/valid").partition("/")
    rest, covered, _ = rest.partition("/covered-")
    rest, cold, _ = rest.partition("/cold-")
    known = sorted((name for name in _SPLITS if re.match(rf"{name}(-|$)", first)), key=len)
    if not known:
        return "The candidate file names no protocol of recllm; the lists were ranked as the file has them."
    sentences = [_SPLITS[known[-1]] + _details(first.removeprefix(known[-1]))]
    if like := re.search(r"-like([\d.]+)", first):
        sentences.append(
            f"Ratings of {like[1]} and more are likes: targets and training positives are likes alone, lower "
            "ratings are dislikes"
        )
    if "-cover" in first:
        sentences.append("Users and items stand in training and in test, as far as that can be")
    if first.endswith("-warm"):
        sentences.append("Targets whose user or item training does not know are left out")
    drawn = re.fullmatch(r"1\+(\d+)-(uniform|popularity)-seed(\d+)", rest)
    if drawn:
        how = "uniformly" if drawn[2] == "uniform" else "in proportion to their popularity"
        sentences.append(
            f"Each target is ranked among {drawn[1]} items that the user never touched, drawn {how} once "
            f"(seed {drawn[3]}) and the same for every system; figures of such samples are higher than those "
            "of the whole catalog"
        )
    elif rest.startswith("full/"):
        sentences.append(f"Each target is ranked among the whole catalog, {_MASKS.get(rest[5:], rest[5:])}")
    if covered:
        sentences.append(
            "Candidates and targets are only the items that the systems have content for, so that figures do "
            "not compare with those of all items"
        )
    if cold:
        sentences.append(
            "Candidates and targets are only items without a training interaction, so that figures do not "
            "compare with those of all items"
        )
    if protocol.endswith("/valid"):
        sentences.append(
            "These are the validation targets, on which models and settings were chosen: not for publishing"
        )
    return ". ".join(sentences) + "."


def _details(rest: str) -> str:
    parts = [part for part in rest.removesuffix("-warm").strip("-").split("-") if part]
    said = [
        f"training, validation and test {part}" if ":" in part else part.replace("seed", "seed ")
        for part in parts
        if ":" in part or part.startswith("seed")
    ]
    return f" ({', '.join(said)})" if said else ""
