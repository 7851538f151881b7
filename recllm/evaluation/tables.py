"""Tables of results: printed for people, written as JSON, CSV and LaTeX."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recllm.errors import DataError
from recllm.files import write_file, write_json


@dataclass(frozen=True)
class Table:
    """One result table: a grid of text for reading, and the same figures in full precision for programs."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    records: list[dict[str, Any]]
    """One flat dictionary per figure: the rows of the CSV."""
    facts: dict[str, Any]
    """What holds for the whole table: protocol, seed, ...; the head of the JSON."""
    bold: set[tuple[int, int]] = field(default_factory=set)
    """(row, column) of the cells to stress."""
    notes: list[str] = field(default_factory=list)


def show(table: Table) -> None:
    """Prints the table, by rich on a terminal and as plain aligned text otherwise."""
    if not sys.stdout.isatty():
        print(plain(table))
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(title=Text(printable(table.title)))
    for position, name in enumerate(table.columns):
        grid.add_column(Text(printable(name)), justify="left" if position == 0 else "right")
    for r, row in enumerate(table.rows):
        grid.add_row(*(Text(printable(cell), "bold" * ((r, c) in table.bold)) for c, cell in enumerate(row)))
    console = Console()
    console.print(grid)
    for note in table.notes:
        console.print(Text(printable(note), "dim"))


def plain(table: Table) -> str:
    """Lays the table out in columns of equal width."""
    rows = [[printable(cell) for cell in row] for row in [table.columns, *table.rows]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(line)
        )
        for line in (zip(row, widths, strict=True) for row in rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([printable(table.title), "", *lines, "", *map(printable, table.notes)])


def latex(table: Table) -> str:
    """Writes a `tabular` for the booktabs package, its title in the first row; every name is escaped."""
    width = len(table.columns)
    lines = [rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule"]
    lines += [rf"\multicolumn{{{width}}}{{l}}{{{escape_latex(table.title)}}} \\", r"\midrule"]
    lines += [" & ".join(map(escape_latex, table.columns)) + r" \\", r"\midrule"]
    for r, row in enumerate(table.rows):
        cells = [escape_latex(cell) for cell in row]
        cells = [rf"\textbf{{{cell}}}" if (r, c) in table.bold else cell for c, cell in enumerate(cells)]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = [f"% {printable(note)}" for note in table.notes]
    return "\n".join([*notes, *lines]) + "\n"


def write(table: Table, folder: Path, stem: str) -> list[Path]:
    """Writes `<stem>.json`, `.csv` and `.tex` into `folder`, each atomically.

    Names are written as they are; a spreadsheet may take one that begins with `=` for a formula.
    """
    paths = [Path(folder) / f"{stem}.{kind}" for kind in ("json", "csv", "tex")]
    records = [{key: _finite(value) for key, value in record.items()} for record in table.records]
    write_json(paths[0], {"title": table.title, **table.facts, "notes": table.notes, "figures": records})
    write_file(paths[1], lambda temporary: _write_csv(temporary, records))
    write_file(paths[2], lambda temporary: temporary.write_text(latex(table), encoding="utf-8"))
    return paths


def printable(text: str) -> str:
    """Replaces control characters and line breaks, which could move the cursor or forge a line, by U+FFFD."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


_LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # a row that begins with [ would be read as the argument of the \\ before it
    "]": "{]}",
    "†": r"\textsuperscript{\dag}",
}


def escape_latex(text: str) -> str:
    """Makes any text an ordinary LaTeX cell."""
    return "".join(_LATEX.get(character, character) for character in printable(text))


def number(value: float, digits: int = 4) -> str:
    """Formats a figure for reading; `-` where it is undefined."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def p_value(value: float) -> str:
    """Formats a p-value for reading."""
    return "-" if math.isnan(value) else "<.0001" if value < 1e-4 else f"{value:.4f}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, and text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    if not records:
        raise DataError("a table without figures cannot be written")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
