"""What the report shows and which files each piece came from, with their hashes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recllm.files import sha256
from recllm.report import page
from recllm.report.text import escape


class Ledger:
    """Numbers tables and figures, keeps the figures, and knows the sources of each.

    Attributes:
        figures: SVG by name, for the folder of figures.
        entries: One for each numbered piece, in the order of the page.
    """

    def __init__(self) -> None:
        self.figures: dict[str, str] = {}
        self.entries: list[dict[str, Any]] = []
        self._hashes: dict[Path, str] = {}

    def table(self, anchor: str, title: str, files: Iterable[Path]) -> str:
        """Registers a table; returns its number, as `Table 1`."""
        return self._add("Table", anchor, title, files)

    def passage(self, anchor: str, title: str, files: Iterable[Path]) -> None:
        """Registers what is neither table nor figure."""
        self._add("Passage", anchor, title, files)

    def figure(self, anchor: str, title: str, files: Iterable[Path], svg: str, caption: str = "") -> str:
        """Registers a figure; returns it as HTML.

        Args:
            anchor: Its id, also the name of its file.
            title: Plain text.
            files: What it was made from.
            svg: As `recllm.report.svg.to_svg` returns it.
            caption: HTML that stands after the title.
        """
        number = self._add("Figure", anchor, title, files)
        self.figures[anchor] = svg
        return (
            f'<figure id="{anchor}"><figcaption><b>{number}.</b> {escape(title)}. {caption}</figcaption>\n'
            f"{svg}\n</figure>"
        )

    def html(self) -> str:
        """Returns the pieces with the numbers of their files, and the files with their hashes."""
        number = {str(path): place for place, path in enumerate(self._hashes, 1)}
        pieces = [
            [
                f'<a href="#{entry["id"]}">{entry["piece"]}</a>',
                escape(entry["title"]),
                ", ".join(str(number[source["file"]]) for source in entry["sources"]),
            ]
            for entry in self.entries
        ]
        files = [
            [f"{number[str(path)]}", f"<code>{escape(path)}</code>", f"<code>{digest}</code>"]
            for path, digest in self._hashes.items()
        ]
        return page.table(
            ["piece", "shows", "files"],
            pieces,
            caption="Every piece, and the files it was made from",
            kind="text",
        ) + page.table(["", "file", "SHA-256"], files, caption="The files", kind="text")

    def _add(self, kind: str, anchor: str, title: str, files: Iterable[Path]) -> str:
        number = 1 + sum(entry["kind"] == kind for entry in self.entries)
        piece = f"{kind} {number}"
        self.entries.append(
            {
                "piece": piece,
                "kind": kind,
                "id": anchor,
                "title": title,
                "sources": [
                    {"file": str(path), "sha256": self._hash(path)}
                    for path in dict.fromkeys(map(Path, files))
                ],
            }
        )
        return piece

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = sha256(path)
        return self._hashes[path]
