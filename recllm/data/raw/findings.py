"""What an import found wrong: counted by reason, the first five of each shown with file and line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recllm.errors import DataError
from recllm.printing import printable

SHOWN = 5


class Findings:
    """Counts what an import leaves out or spoils, and refuses to go on where the user asked for that.

    Attributes:
        strict: Make the first thing that would be counted an error.
        left_out: Rows left out, by reason.
        kept: Rows kept without a part that could not be read, by reason.
        examples: Up to five examples for each reason.
        notes: Changes that lose nothing (a unit converted, an id's ".0" removed), in words.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.left_out: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def malformed(self, path: Path, line: int, problem: str, content: str = "") -> None:
        """Counts one malformed line.

        Raises:
            DataError: In strict mode.
        """
        shown = f": {content[:80]!r}" if content else ""
        self.drop(f"malformed lines in {path.name}", 1, [f"{path.name}, line {line}: {problem}{shown}"])

    def drop(self, reason: str, count: int, examples: Iterable[str] = (), *, chosen: bool = False) -> None:
        """Counts rows that are left out; `chosen`: by an option or a policy, not for a fault.

        Raises:
            DataError: In strict mode, unless `chosen`.
        """
        self._count(self.left_out, reason, count, examples, self.strict and not chosen)

    def spoil(self, reason: str, count: int, examples: Iterable[str] = ()) -> None:
        """Counts rows that are kept without the part that could not be read.

        Raises:
            DataError: In strict mode.
        """
        self._count(self.kept, reason, count, examples, self.strict)

    def note(self, text: str) -> None:
        """Keeps a change that loses nothing, or a choice that the user made."""
        if text not in self.notes:
            self.notes.append(text)

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it for the manifest."""
        found = {
            kind: {
                reason: {"rows": rows, "examples": self.examples[reason]} for reason, rows in counts.items()
            }
            for kind, counts in (("left_out", self.left_out), ("kept", self.kept))
        }
        return {**found, "notes": self.notes}

    def lines(self) -> list[str]:
        """Returns all of it as lines for people."""
        printed = [f"note: {note}" for note in self.notes]
        for kind, counts in (("left out", self.left_out), ("kept", self.kept)):
            for reason, rows in counts.items():
                printed.append(f"{kind}: {rows:,} {reason}")
                printed += [f"    {example}" for example in self.examples[reason]]
                if rows > len(self.examples[reason]) > 0:
                    printed.append(f"    ... and {rows - len(self.examples[reason]):,} more")
        return [printable(line) for line in printed]

    def _count(
        self, counts: dict[str, int], reason: str, count: int, examples: Iterable[str], strict: bool
    ) -> None:
        if count == 0:
            return
        shown = self.examples.setdefault(reason, [])
        shown += itertools.islice(examples, SHOWN - len(shown))
        counts[reason] = counts.get(reason, 0) + count
        if strict:
            first = shown[0] if shown else f"{count:,} rows"
            raise DataError(
                f"{reason}: {first} (without --strict such rows are counted, and the import goes on)"
            )
