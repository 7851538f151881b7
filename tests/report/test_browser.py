"""The page in a real browser: nothing fetched, nothing logged, every image there, no sideways scrolling."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.browser import look


@pytest.mark.parametrize("which", ["full", "hostile"])
@pytest.mark.parametrize(("width", "media"), [(1200, "screen"), (360, "screen"), (700, "print")])
def test_a_browser_shows_it_without_a_request_or_a_complaint(
    which: str, width: int, media: str, request: pytest.FixtureRequest
) -> None:
    page: Path = request.getfixturevalue(which)
    visit = look(page, width=width, media=media)
    assert visit.requests == [] and visit.complaints == []
    facts = visit.facts
    assert facts["images"] > 10 and facts["broken"] == 0 and facts["unnamed"] == 0 and facts["largest"] <= 96
    assert facts["scrollWidth"] <= width and facts["wide"] == []
    assert facts["scripts"] == 0 and facts["twice"] == [] and facts["dead"] == []
    assert "Examples" in facts["text"] and "rank" in facts["text"]


def test_the_browser_would_tell(tmp_path: Path) -> None:
    """A page with every fault that the test above looks for: the instruments are not blind."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width">'
        '<img src="http://127.0.0.1:9/x.png"><img src="data:image/png;base64,AAAA" alt="x">'
        '<p id="a"><p id="a"><a href="#b">b</a><div style="width:900px">wide</div>'
        '<script>console.error("oops"); nothing()</script>'
    )
    visit = look(page, width=360)
    assert visit.requests == ["http://127.0.0.1:9/x.png"]
    assert any("oops" in one for one in visit.complaints) and any(
        "nothing" in one for one in visit.complaints
    )
    facts = visit.facts
    assert facts["broken"] == 2 and facts["unnamed"] == 1 and facts["scrollWidth"] > 360 and facts["wide"]
    assert facts["twice"] == ["a"] and facts["dead"] == ["#b"] and facts["scripts"] == 1
