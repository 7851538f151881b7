"""Answers from any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, or a hosted one."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import queue
import random
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import aiohttp

from recllm.errors import DataError
from recllm.mllm.chat import Decoding, Request, Result
from recllm.mllm.generation.server_format import (
    PassingFaultError,
    RefusedError,
    read_answer,
    request_body,
    retry_after,
)
from recllm.mllm.loading import DEFAULT_MAX_PIXELS
from recllm.mllm.vision.images import ImageError
from recllm.prompts.safe_text import safe_text

MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_COMPLAINT_BYTES = 8192
MAX_WAIT_S = 60.0
CONNECT_S = 30.0
HOPELESS_AFTER = 20
"""So many requests in a row that fail for no reason of their own end the job. Ours."""
TRIES_BEFORE_ANY_CONNECTION = 3
"""Tries of a request while the server has never been reached: a wrong address is told soon. Ours."""
_PASSING = {408, 409, 425, 429}
_MISADDRESSED = {404, 405, *range(300, 400)}


@dataclass(frozen=True)
class ServerOptions:
    """Which OpenAI-compatible server answers, and how it is asked."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Where the server's API starts, up to and with `/v1`; http or https."""
    model: str = ""
    """The model's name on the server; GET <base_url>/models lists them."""
    revision: str = ""
    """Your name for what the server runs (weights, quantization, version): change it when the server changes,
    so that stored answers of the old one are not taken for the new one's."""
    api_key_env: str = "OPENAI_API_KEY"
    """The NAME of the environment variable that holds the key; no key is sent where it is not set."""
    concurrency: int = 16
    """Requests under way at once."""
    timeout_s: float = 600.0
    """The longest time for one try, from connecting to the last byte, in seconds."""
    retries: int = 8
    """Further tries of a request after a fault that can pass."""
    backoff_s: float = 0.5
    """The wait before the second try, in seconds; it doubles with each further one, up to a minute."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Larger images are scaled down to this many pixels before they are sent."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the server calls the longest answer; OpenAI's own newer models want `max_completion_tokens`."""

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise DataError("base_url: expected http://HOST[:PORT]/v1 or https://...")
        if url.username or url.password or url.query or url.fragment:
            raise DataError(
                "base_url: expected no user, password, query or fragment; a key goes into the environment "
                "variable that api_key_env names"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise DataError("api_key_env: expected the NAME of an environment variable, not the key itself")
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff_s", 0), ("max_pixels", 28 * 28)):
            if not getattr(self, name) >= least:
                raise DataError(f"{name} {getattr(self, name)}: expected {least} or more")
        if not self.timeout_s > 0:
            raise DataError(f"timeout_s {self.timeout_s}: expected more than 0")


class ServerBackend:
    """A `recllm.mllm.chat.Backend` that asks an OpenAI-compatible server.

    Greedy requests have temperature 0, sampled ones a seed of their own, made from `decoding.seed` and the
    request's key. The rest is up to the server: a text may depend on what else it batches, seeds may be
    ignored, and defaults that the API does not name may apply (start vLLM with `--generation-config vllm`, or
    it takes repetition penalty and top-k from the model's files). So answers need not equal those of the
    in-process backend, and the two never share stored answers.

    Connection faults, time-outs, HTTP 408, 409, 425, 429 and 5xx, and answers that are no chat completion are
    tried again, after a wait that doubles, has jitter and honors `Retry-After`. Redirects are not followed.
    The key is read when `generate` starts and goes into the request header and nowhere else.

    Attributes:
        identity: Backend, model, revision and max_pixels; not the URL.
        special_tokens: Empty: the server's tokenizer is not known.
    """

    special_tokens: tuple[str, ...] = ()

    def __init__(self, options: ServerOptions) -> None:
        if not options.model:
            raise DataError(f"model is empty: give a name that GET {options.base_url}/models lists")
        self.options = options
        self.identity: dict[str, Any] = {
            "backend": "server",
            "model": options.model,
            "revision": options.revision,
            "max_pixels": options.max_pixels,
        }

    def generate(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> Iterator[list[Result]]:
        """Answers (key, request) pairs; yields results as they finish, in any order, one a pair.

        The requests run in a thread of their own, at most `concurrency` at once, and pause where the caller
        is slow to take results; closing the generator ends them. Token counts are 0 where the server tells
        none.

        Raises:
            DataError: The server refuses the key or cannot be reached, or `HOPELESS_AFTER` requests in a row
                failed for no reason of their own; what has no result then can be asked again.
        """
        if not requests:
            return
        exchange = _Exchange(self.options, requests, decoding)
        exchange.start()
        try:
            yield from exchange.results()
        finally:
            exchange.stop()

    def show(self, request: Request) -> str:
        """Returns the messages that are sent, as JSON; the prompt is made by the server's own template."""
        return json.dumps(list(request.messages), indent=2, ensure_ascii=False)

    def count_tokens(self, request: Request) -> None:
        """Returns None: how a server counts is not known."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: Result
    blameless: bool = False
    """The request failed, and most likely any other would have."""
    connected: bool = True


class _Exchange(threading.Thread):
    """One call of `generate`: an event loop in a thread, whose workers share the requests."""

    def __init__(
        self, options: ServerOptions, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> None:
        super().__init__(name="recllm-server-backend", daemon=True)
        self._options = options
        self._url = options.base_url.rstrip("/") + "/chat/completions"
        self._decoding = decoding
        self._count = len(requests)
        self._pairs = iter(requests)
        self._held: list[_Outcome] = []
        self._outbox: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(4 * options.concurrency)
        self._running = threading.Event()
        self._reached = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # In the caller's thread.

    def results(self) -> Iterator[list[Result]]:
        while True:
            arrived = [self._outbox.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    arrived.append(self._outbox.get_nowait())
            results = [each for each in arrived if isinstance(each, Result)]
            for _ in results:
                self._tell_loop(self._room.release)
            if results:
                yield results
            for each in arrived:
                if isinstance(each, BaseException):
                    raise each
            if arrived[-1] is None:
                return

    def stop(self) -> None:
        self._running.wait()
        self._tell_loop(lambda: self._task.cancel())
        self.join()

    def _tell_loop(self, call: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)

    # In this thread.

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as failures:
            self._outbox.put(failures.exceptions[0])
        except BaseException as failure:
            self._outbox.put(failure)
        finally:
            self._running.set()
            self._outbox.put(None)

    async def _serve(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._running.set()
        self._proxy = proxy_for(self._options.base_url)
        session = aiohttp.ClientSession(
            headers=_headers(self._options.api_key_env),
            timeout=aiohttp.ClientTimeout(total=self._options.timeout_s, sock_connect=CONNECT_S),
            connector=aiohttp.TCPConnector(limit=self._options.concurrency),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small compressed body could become a large one
        )
        async with session, asyncio.TaskGroup() as workers:
            for _ in range(min(self._options.concurrency, self._count)):
                workers.create_task(self._work(session))
        for outcome in self._held:
            self._outbox.put(outcome.result)

    async def _work(self, session: aiohttp.ClientSession) -> None:
        for key, request in self._pairs:
            for outcome in self._deliverable(await self._answer(session, key, request)):
                await self._room.acquire()
                self._outbox.put(outcome.result)

    def _deliverable(self, outcome: _Outcome) -> list[_Outcome]:
        """Holds back failures that are no fault of their request, until another shows that the server works.

        Raises:
            DataError: It does not work.
        """
        if not outcome.blameless:
            spared, self._held = self._held, []
            return [*spared, outcome]
        self._held.append(outcome)
        unreachable = not any(held.connected for held in self._held)
        if len(self._held) >= (min(HOPELESS_AFTER, self._count) if unreachable else HOPELESS_AFTER):
            raise DataError(
                f"the server {'cannot be reached' if unreachable else 'gives no answers'} at {self._url}: "
                f"{len(self._held)} requests in a row failed, the last with {outcome.result.error!r}. Check "
                "that it runs and that base_url and model are right, then run the same command again."
            )
        return []

    async def _answer(self, session: aiohttp.ClientSession, key: bytes, request: Request) -> _Outcome:
        try:
            body = await asyncio.to_thread(
                request_body,
                key,
                request,
                self._decoding,
                model=self._options.model,
                max_pixels=self._options.max_pixels,
                length_field=self._options.length_field,
            )
        except ImageError as error:
            return _Outcome(Result.failed(key, f"image: {error}"))
        for tries in range(1, self._options.retries + 2):
            try:
                return _Outcome(await self._try(session, key, body))
            except RefusedError as refusal:
                return _Outcome(Result.failed(key, f"server: {refusal}"), blameless=refusal.misaddressed)
            except PassingFaultError as fault:
                last = fault
            if not (last.connected or self._reached) and tries >= TRIES_BEFORE_ANY_CONNECTION:
                break
            if tries <= self._options.retries:
                wait = min(MAX_WAIT_S, self._options.backoff_s * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(wait, min(last.wait_s, MAX_WAIT_S)))
        return _Outcome(Result.failed(key, f"server: {last}, {tries} tries"), True, last.connected)

    async def _try(self, session: aiohttp.ClientSession, key: bytes, body: bytes) -> Result:
        try:
            async with session.post(
                self._url, data=body, allow_redirects=False, proxy=self._proxy
            ) as response:
                self._reached = True
                if not 200 <= response.status < 300:
                    await self._raise_for(response, session)
                raw = await _read(response, MAX_ANSWER_BYTES + 1)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise PassingFaultError(f"no connection ({_name(error)})", connected=False) from None
        except TimeoutError:
            raise PassingFaultError(f"no answer within {self._options.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise PassingFaultError(f"connection lost ({_name(error)})") from None
        if len(raw) > MAX_ANSWER_BYTES:
            raise RefusedError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
        return read_answer(raw, key, self._decoding.max_new_tokens)

    async def _raise_for(self, response: aiohttp.ClientResponse, session: aiohttp.ClientSession) -> NoReturn:
        status = response.status
        if status in (401, 403):
            name = self._options.api_key_env
            found = "the key that it holds was refused" if os.environ.get(name) else "it is not set"
            raise DataError(
                f"the server at {self._url} wants a key (HTTP {status}): put a valid one into the "
                f"environment variable {name}; {found}"
            )
        complaint = _complaint(await _read(response, MAX_COMPLAINT_BYTES), session)
        said = f"HTTP {status}" + (f": {complaint}" if complaint else "")
        if status in _PASSING or status >= 500:
            raise PassingFaultError(said, wait_s=retry_after(response.headers.get("Retry-After", "")))
        raise RefusedError(said, misaddressed=status in _MISADDRESSED)


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    content = bytearray()
    while len(content) < most and (piece := await response.content.read(most - len(content))):
        content += piece
    return bytes(content)


def _complaint(raw: bytes, session: aiohttp.ClientSession) -> str:
    """Returns what the server says is wrong, bounded, as harmless text, without the key should it echo it."""
    text = raw.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(raw)
        for name in ("error", "message", "detail"):
            if isinstance(content, dict) and content.get(name):
                content = content[name]
        text = content if isinstance(content, str) else json.dumps(content)
    key = session.headers.get("Authorization", "").removeprefix("Bearer ")
    return safe_text(text.replace(key, "[key]") if key else text, limit=300)


def _headers(api_key_env: str) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
    }
    if key := os.environ.get(api_key_env, "").strip():
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise DataError(
                f"the environment variable {api_key_env} holds no usable key: expected printable ASCII "
                "characters without spaces"
            )
        headers["Authorization"] = f"Bearer {key}"
    return headers


def proxy_for(url: str) -> str | None:
    """Returns the proxy that the environment names for a URL; None for this machine itself.

    Raises:
        DataError: It is of a kind that cannot be used.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_loopback or address.is_unspecified:
            return None
    if host == "localhost" or host.endswith(".localhost") or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy.startswith(("http://", "https://")):
        raise DataError(
            f"the proxy that the environment names for {parts.scheme} is of another kind than http://; "
            f"exempt {host} by NO_PROXY, or name another"
        )
    return proxy


def _name(error: Exception) -> str:
    """An exception's kind; its text may hold addresses of proxies with passwords."""
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or type(error).__name__
