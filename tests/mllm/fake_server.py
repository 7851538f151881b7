"""A real HTTP server on loopback that speaks chat completions, fails as told, and counts what it sees."""

from __future__ import annotations

import base64
import json
import re
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Literal

from recllm.mllm.chat import IMAGE_PART, Backend, Decoding, Request, text_part

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes a chat completion from a request's body."""


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of an answer."""

    kind: Literal["status", "body", "hang", "drop", "cut", "trickle"]
    """`status` answers so, `body` answers 200 with `content`, `hang` says nothing for `seconds`, `drop`
    closes before the answer, `cut` in the middle of it, `trickle` sends a byte every `seconds`."""
    status: int = 500
    content: bytes = b'{"error": {"message": "as the script says"}}'
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


Script = Callable[[str, int], Fault | None]
"""Says what happens to the n-th try (from 1) of the request of a name, its last text; None: an answer."""


def completion(text: Any, *, finish: Any = "stop", usage: Any = (7, 3)) -> dict[str, Any]:
    """Returns a chat completion; `usage` is (prompt, completion) tokens, or what stands in its place."""
    content: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
    }
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return content if usage is None else {**content, "usage": usage}


def name_of(body: dict[str, Any]) -> str:
    """Returns the last text of a request."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return next(part["text"] for part in reversed(content) if part["type"] == "text")


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Answers with the request's own text."""
    return completion(f"answer to {name_of(body)}")


class FakeServer:
    """Serves from a thread each while the `with` block lasts.

    Attributes:
        base_url: Where the API starts.
        bodies: Every request's body, in order of arrival.
        headers: Every request's headers.
        tries: Requests by name.
        times: When the requests of a name came, in seconds.
        most_at_once: The most requests that were under way together.
    """

    def __init__(self, answer: Answer = echo, script: Script = lambda name, tries: None, delay: float = 0.0):
        self.answer, self.script, self.delay = answer, script, delay
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.tries: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> FakeServer:
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        fake = self.fake
        if fake.closing.is_set():  # a connection that was kept open
            return self._drop()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = name_of(body)
        with fake.lock:
            fake.bodies.append(body)
            fake.headers.append(dict(self.headers.items()))
            fake.tries[name] += 1
            fake.times.setdefault(name, []).append(time.monotonic())
            tries = fake.tries[name]
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            time.sleep(fake.delay)
            if self.path != "/v1/chat/completions":
                self._send(404, b'{"detail": "Not Found"}', {})
            elif (fault := fake.script(name, tries)) is None:
                self._send(200, json.dumps(fake.answer(body)).encode(), {}, before_last=self._leave)
            else:
                self._fail(fault)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Counts the request as done before the client can know, or its next one would count as one more."""
        with self.fake.lock:
            if not getattr(self, "_left", False):
                self.fake.at_once -= 1
            self._left = True

    def parse_request(self) -> bool:
        self._left = False
        return super().parse_request()

    def _fail(self, fault: Fault) -> None:
        if fault.kind == "status":
            self._send(fault.status, fault.content, fault.headers, before_last=self._leave)
        elif fault.kind == "body":
            self._send(200, fault.content, fault.headers, before_last=self._leave)
        elif fault.kind == "hang":
            self.fake.closing.wait(fault.seconds)
            self._drop()
        elif fault.kind == "drop":
            self._drop()
        elif fault.kind == "cut":
            self._head(200, len(fault.content), {})
            self.wfile.write(fault.content[: len(fault.content) // 2])
            self._drop()
        else:
            self._head(200, len(fault.content), {})
            for place in range(len(fault.content)):
                if self.fake.closing.wait(fault.seconds):
                    break
                self.wfile.write(fault.content[place : place + 1])

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        before_last: Callable[[], None] = lambda: None,
    ) -> None:
        self._head(status, len(content), headers)
        before_last()
        self.wfile.write(content)

    def _drop(self) -> None:
        """Closes so that the client sees a reset, not an end."""
        self._leave()
        self.close_connection = True
        self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def answer_from(backend: Backend) -> Answer:
    """Returns a function that has a backend answer, one request at a time, images taken from data URLs."""
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, lock:
            request = _request(body, Path(folder))
            decoding = Decoding(
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"],
                top_p=body.get("top_p", 1.0),
                seed=body.get("seed", 0),
            )
            [result] = [each for batch in backend.generate([(b"k", request)], decoding) for each in batch]
        usage = (result.prompt_tokens, result.completion_tokens)
        return completion(result.text, finish=result.finish, usage=usage)

    return answer


def _request(body: dict[str, Any], folder: Path) -> Request:
    messages, images = [], []
    for turn in body["messages"]:
        content = turn["content"]
        parts = []
        for part in [text_part(content)] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append(text_part(part["text"]))
                continue
            kind, data = re.fullmatch(
                r"data:image/(jpeg|png);base64,([A-Za-z0-9+/=]+)", part["image_url"]["url"]
            ).groups()
            images.append(folder / f"{len(images)}.{kind}")
            images[-1].write_bytes(base64.b64decode(data, validate=True))
            parts.append(dict(IMAGE_PART))
        messages.append({"role": turn["role"], "content": parts})
    return Request("served", tuple(messages), tuple(images))
