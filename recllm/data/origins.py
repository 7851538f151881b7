"""What a file was made from, and the one check that two things which meet were made from the same.

Whatever recllm writes states hashes of what it was made from. Wherever two such things meet (a run and the
rows that it scores, candidates and scores, texts and a dataset), `check_same_origin` compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from recllm.errors import DataError
from recllm.runs.provenance import describe_run

_NAMES = {
    "dataset": "state of the dataset",
    "split": "split",
    "candidates": "set of candidate lists",
    "top_k": "file of top-K lists",
}
MADE = "recllm.made"
"""The metadata key of score, rank and top-K files under which `made_metadata` stores JSON."""


@dataclass(frozen=True)
class Origin:
    """The hashes of what something was made from.

    Attributes:
        what: How messages call it, usually its path.
        hashes: The hash of each kind (dataset, split, candidates, top_k); None or empty where it is unknown.
        verb: How it relates to them, as messages say it.
    """

    what: str
    hashes: Mapping[str, str | None] = field(default_factory=dict)
    verb: str = "was made from"

    @classmethod
    def of_manifest(
        cls, what: object, manifest: Mapping[str, Any], verb: str = "was made from", **more: str | None
    ) -> Origin:
        """Reads the hashes of dataset and split that a manifest, or a file's metadata, states.

        Args:
            what: How messages call it.
            manifest: With `data_hash` and `split_hash`.
            verb: As the attribute.
            **more: Further hashes: `candidates`, `top_k`.
        """
        hashes = {"dataset": manifest.get("data_hash"), "split": manifest.get("split_hash"), **more}
        return cls(str(what), hashes, verb)


def check_same_origin(one: Origin, other: Origin, *, remedy: str, required: tuple[str, ...] = ()) -> None:
    """Raises a `DataError` unless both were made from the same, of every kind that both state.

    Args:
        one: What is to fit.
        other: What it is to fit to.
        remedy: What the user can do about it, the end of the message.
        required: Kinds that both have to state.
    """
    for kind in dict.fromkeys((*required, *one.hashes)):
        ours, theirs = one.hashes.get(kind), other.hashes.get(kind)
        if ours and theirs and ours != theirs:
            raise DataError(
                f"{one.what} {one.verb} another {_NAMES[kind]} than {other.what} (hash {ours[:12]}, not "
                f"{theirs[:12]}); {remedy}"
            )
        if kind in required and not (ours and theirs):
            silent = one if not ours else other
            raise DataError(
                f"{silent.what} does not state the hash of the {kind} that it {silent.verb}, so {one.what} "
                f"cannot be checked against {other.what}; {remedy}"
            )


def made(**facts: Any) -> dict[str, Any]:
    """Returns what a score, rank or top-K file says of how it was made: `facts`, the command and versions.

    Args:
        **facts: JSON types, for example `data_hash` and `split_hash`; None is left out.
    """
    return {**{name: fact for name, fact in facts.items() if fact is not None}, "run": describe_run()}


def made_metadata(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns the parquet metadata that stores what `made` returned."""
    return {MADE: orjson.dumps(content).decode()} if content else {}


def read_made(metadata: Mapping[str, str], where: object) -> dict[str, Any]:
    """Returns what a file says of how it was made; empty for files that recllm did not write.

    Raises:
        DataError: It is not a JSON object.
    """
    try:
        content = orjson.loads(metadata.get(MADE, "{}"))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: metadata `{MADE}` is not JSON ({error}); write the file again") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: metadata `{MADE}` is not a JSON object; write the file again")
    return content
