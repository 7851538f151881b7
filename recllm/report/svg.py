"""Matplotlib figures as SVG that can stand in a page beside others: text as text, ids of their own."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")

COLORS = ("#0072b2", "#c04f00", "#00795a", "#a8447f", "#7a5c00", "#2b2f36", "#2a8fd0", "#8c8c8c")
"""After Okabe and Ito's palette for the color-blind, darkened to 3:1 or more on white (ours)."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1.4)), (0, (6, 1.4, 1.4, 1.4)))
SOFT, LINE, INK = "#515a66", "#d9dde2", "#1b1f24"

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a title is a dollar
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#9aa3ad",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
}


@contextmanager
def drawing(width: float = 4.6, height: float = 3.2, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """Yields a figure of `width` x `height` inches and its axes, in the report's style; closes it after."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts of its own
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(**subplots)


def to_svg(figure: Any, name: str, description: str) -> str:
    """Returns a figure as an `<svg>` element, for a page or, as it stands, for a file.

    Args:
        figure: As `drawing` yields it; called within its block.
        name: Prefix of all its ids, so that clip paths of two figures on one page do not clash.
        description: What it shows, for those who cannot see it; plain text, already cleaned.
    """
    import matplotlib

    buffer = io.BytesIO()
    matplotlib.rcParams["svg.hashsalt"] = name
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("metadata"):
                parent.remove(child)
    for element in root.iter():
        _rename(element, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    title = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    title.text = description
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _rename(element: ElementTree.Element, name: str) -> None:
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.get('id')}")
    if _LINK in element.attrib:
        element.set("href", f"#{name}-{element.attrib.pop(_LINK).removeprefix('#')}")
    for key, value in element.attrib.items():
        if "url(#" in value:
            element.set(key, _REFERENCE.sub(lambda found: f"url(#{name}-{found[1]})", value))
