"""The page's parts as HTML: sections, tables, notes, and the document that holds them."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from recllm.report.style import STYLE
from recllm.report.text import escape

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Nothing is fetched, run or sent, whatever a text from data may try."""


@dataclass(frozen=True)
class Section:
    """One section of the report; `body` is finished HTML."""

    anchor: str
    title: str
    body: str


def document(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Returns the whole page.

    Args:
        title: Plain text.
        lead: HTML that stands above the list of sections.
        sections: In order.
    """
    links = "\n".join(
        f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in sections
    )
    bodies = "\n".join(
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">\n'
        f'<h2 id="{section.anchor}-title">{escape(section.title)}</h2>\n{section.body}\n</section>'
        for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<header>
<p class="kicker">recllm report</p>
<h1>{escape(title, 160)}</h1>
{lead}
</header>
<nav aria-label="Sections"><ol>
{links}
</ol></nav>
<main>
{bodies}
</main>
</body>
</html>
"""


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    kind: str = "",
    anchor: str = "",
    marked: Collection[int] = (),
) -> str:
    """Returns a table in a box that scrolls by itself; the first cell of each row is its header.

    Args:
        head: Cells of the head, as HTML.
        rows: Rows of cells, as HTML.
        caption: As HTML; its text also names the table to a screen reader.
        kind: CSS class of the table.
        anchor: Its id, by which the list of sources refers to it.
        marked: Rows that stand for positives.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr{_class("positive" if place in marked else "")}><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for place, row in enumerate(rows)
    )
    identity = f' id="{anchor}"' if anchor else ""
    name = _plain(caption)
    return (
        f'<div class="table"{identity}><p class="caption">{caption}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table{_class(kind)} aria-label="{name}">\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></div>"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns a list of terms (plain text) and what they are (HTML)."""
    rows = "\n".join(f"<div><dt>{escape(term)}</dt><dd>{value}</dd></div>" for term, value in pairs)
    return f'<dl class="facts">\n{rows}\n</dl>'


def note(content: str) -> str:
    """Returns a paragraph in small print; `content` is HTML."""
    return f'<p class="note">{content}</p>'


def missing(content: str) -> str:
    """Returns the line that stands in place of what cannot be shown; `content` is HTML."""
    return f'<p class="missing">{content}</p>'


def figures(drawings: Sequence[str]) -> str:
    """Returns figures side by side where there is room."""
    return '<div class="figures">\n' + "\n".join(drawings) + "\n</div>"


def fold(summary: str, content: str) -> str:
    """Returns content that opens at a click; both are HTML."""
    return f"<details><summary>{summary}</summary>\n{content}\n</details>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _plain(markup: str) -> str:
    """The text of HTML for an attribute, bounded; it stays escaped."""
    text = html.unescape(re.sub(r"<[^>]*>", "", markup))
    return html.escape(textwrap.shorten(text, 120, placeholder="…"), quote=True)
