"""A batch in one row: what the prompts of neighboring rows about one target begin with stands there once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recllm.mllm.prefix.groups import Group, Prompt, contents_of, share
from recllm.mllm.prefix.inputs import packed

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel

IGNORED = -100
"""The label of a token that is not learned."""
BLANK = ""
"""What stands for the path of the blank image."""


def groups_of(
    rows: Sequence[Mapping[str, Any]], image_token: int, features: Mapping[str, int]
) -> list[Group]:
    """Returns the batch's rows with what neighbors of one `group` share, each with its completion.

    What is shared ends a token before the first completion: the state that a completion's first token is said
    from is then a row's own.

    Args:
        rows: Of `recllm.training.rows.training_rows`.
        image_token: What stands for a visual feature of an image.
        features: How many visual features each image (path) has.
    """
    numbers = {
        path: number for number, path in enumerate({path: 0 for row in rows for path in row["images"]})
    }
    places = range(len(rows))
    return [
        share(
            [_prompt(place, rows[place], numbers, image_token, features) for place in members],
            most=min(rows[place]["start"] for place in members) - 1,
        )
        for members in (list(of) for _, of in groupby(places, key=lambda place: rows[place]["group"]))
    ]


def group_alone(tokens: Sequence[int], image_token: int) -> Group:
    """Returns the blank image's tokens, which no other token attends to."""
    row = {"id": "", "input_ids": tokens, "images": [BLANK]}
    features = {BLANK: sum(token == image_token for token in tokens)}
    return Group((_prompt(-1, row, {BLANK: 0}, image_token, features),), 0)


def pack(
    loaded: LoadedModel, rows: Sequence[Mapping[str, Any]], groups: Sequence[Group], grids: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the model's arguments and labels, and the images (paths) in the order of their slots.

    Args:
        loaded: The model.
        rows: The batch.
        groups: Of its rows; others have no labels.
        grids: The (time, height, width) in patches of each image, where the model places tokens by it.
    """
    inputs = packed(loaded, groups, grids)
    labels = torch.full_like(inputs.arguments["input_ids"], IGNORED)
    prompts = (prompt for group in groups for prompt in group.prompts)
    for prompt, last in zip(prompts, inputs.last[1].tolist(), strict=True):
        if prompt.row >= 0:
            start, end = rows[prompt.row]["start"], rows[prompt.row]["end"]
            begins = last + 1 - len(prompt.tokens)  # where the row would begin if nothing were shared
            labels[0, begins + start : begins + end] = torch.from_numpy(prompt.tokens[start:end])
    return {**inputs.arguments, "labels": labels}, inputs.images


def _prompt(
    place: int,
    row: Mapping[str, Any],
    numbers: Mapping[str, int],
    image_token: int,
    features: Mapping[str, int],
) -> Prompt:
    tokens, images = np.array(row["input_ids"], np.int64), row["images"]
    contents, ends = contents_of(
        tokens, image_token, [numbers[path] for path in images], [features[path] for path in images]
    )
    return Prompt(place, row["id"], tokens, contents, tuple(row["images"]), ends)
