"""A headless Chromium over the DevTools protocol: what a page asks for, logs, and measures."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--hide-scrollbars",
)
_FACTS = """(() => {
  const images = [...document.images];
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .strip, svg') &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  return {
    images: images.length,
    broken: images.filter(i => !i.complete || i.naturalWidth === 0).length,
    largest: Math.max(0, ...images.map(i => Math.max(i.naturalWidth, i.naturalHeight))),
    unnamed: images.filter(i => !i.alt).length,
    scrollWidth: document.documentElement.scrollWidth,
    wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    scripts: document.scripts.length,
    twice: [...document.querySelectorAll('[id]')].map(e => e.id)
      .filter((id, i, all) => all.indexOf(id) !== i),
    dead: [...document.querySelectorAll('a[href^="#"]')]
      .filter(a => !document.getElementById(a.hash.slice(1))).map(a => a.hash),
    clipped: [...document.querySelectorAll('figure svg text')].filter(t => {
      const box = t.getBoundingClientRect(), svg = t.ownerSVGElement.getBoundingClientRect();
      return box.right > svg.right + 2 || box.left < svg.left - 2;
    }).map(t => t.textContent),
    text: document.body.innerText,
  };
})()"""


@dataclass
class Visit:
    """What a page did when it was opened."""

    requests: list[str] = field(default_factory=list)
    """Addresses asked for, the page's own and `data:` left out."""
    complaints: list[str] = field(default_factory=list)
    """Console messages, exceptions and log entries of any level."""
    facts: dict[str, Any] = field(default_factory=dict)


def chromium() -> str:
    """Returns the browser, or skips the test; fails where RECLLM_REQUIRE_BROWSER is set."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("RECLLM_REQUIRE_BROWSER") == "1":
            pytest.fail("RECLLM_REQUIRE_BROWSER=1, but there is no chromium")
        pytest.skip("no chromium on this machine: the page is not looked at in a browser")
    return found


@contextmanager
def _running(executable: str):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        log = Path(profile) / "stderr"
        with log.open("wb") as errors:
            command = [executable, *_FLAGS, f"--user-data-dir={profile}/data", "about:blank"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            try:
                yield process, log
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


async def _visit(
    log: Path, process: subprocess.Popen, page: Path, width: int, picture: Path | None, media: str
) -> Visit:
    visit = Visit()
    port = await _port(log, process)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = json.loads(await answer.text())
        target = next(one for one in targets if one["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            call = _Calls(socket, visit, page.as_uri())
            for domain in ("Network", "Page", "Runtime", "Log"):
                await call(f"{domain}.enable")
            phone = width < 600
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": phone}
            await call("Emulation.setDeviceMetricsOverride", **size)
            await call("Emulation.setEmulatedMedia", media=media)
            await call("Page.navigate", url=page.as_uri())
            await call.until("Page.loadEventFired")
            await asyncio.sleep(0.3)  # what a page asks for after it was loaded
            answer = await call("Runtime.evaluate", expression=_FACTS, returnByValue=True)
            visit.facts = answer["result"]["value"]
            if picture is not None:
                await _draw(call, width, picture)
    return visit


async def _draw(call: _Calls, width: int, picture: Path) -> None:
    size = (await call("Page.getLayoutMetrics"))["cssContentSize"]
    if picture.suffix == ".pdf":
        answer = await call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
    else:
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        answer = await call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    picture.write_bytes(base64.b64decode(answer["data"]))


class _Calls:
    """Commands and events of one page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, visit: Visit, own: str) -> None:
        self._socket, self._visit, self._own, self._number = socket, visit, own, 0

    async def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def until(self, event: str) -> None:
        while (await self._next()).get("method") != event:
            pass

    async def _next(self) -> dict[str, Any]:
        message = json.loads((await asyncio.wait_for(self._socket.receive(), 60)).data)
        method, told = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if address != self._own and not address.startswith("data:"):
                self._visit.requests.append(address)
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self._visit.complaints.append(json.dumps(told)[:5000])
        elif method == "Page.javascriptDialogOpening":
            self._visit.complaints.append(f"dialog: {told['message']}")
        return message


async def _port(log: Path, process: subprocess.Popen) -> int:
    for _ in range(600):
        text = log.read_text(errors="replace")
        if "DevTools listening on ws://" in text:
            return int(text.split("DevTools listening on ws://")[1].split("/")[0].rsplit(":", 1)[1])
        assert process.poll() is None, f"chromium ended: {text[-500:]}"
        await asyncio.sleep(0.1)
    raise AssertionError(f"chromium did not open its port: {log.read_text(errors='replace')[-500:]}")


def look(page: Path, *, width: int = 1200, picture: Path | None = None, media: str = "screen") -> Visit:
    """Opens a page in a fresh browser.

    Args:
        page: The HTML file.
        width: Of the window in CSS pixels; below 600 it is a phone's.
        picture: Where to put the whole page, as .png or .pdf.
        media: `screen` or `print`.
    """
    with _running(chromium()) as (process, log):
        return asyncio.run(_visit(log, process, page.absolute(), width, picture, media))
