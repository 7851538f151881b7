"""Measured figures in, Markdown tables out: what the scripts that write the README's tables share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def results(name: str) -> dict[str, Any]:
    """Reads one file of figures."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
