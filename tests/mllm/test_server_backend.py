"""The server backend against a real HTTP server: faults, bounds, secrets, images."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from recllm.errors import DataError
from recllm.mllm.chat import IMAGE_PART, Decoding, Request, Result, text_part
from recllm.mllm.generation import server
from recllm.mllm.generation.server import ServerBackend, ServerOptions, proxy_for
from tests.mllm.fake_server import FakeServer, Fault, completion

KEY = "sk-planted/0123456789+secret"
GREEDY = Decoding(max_new_tokens=16)
Pairs = list[tuple[bytes, Request]]


def ask(name: str, *images: Path) -> Request:
    content = [dict(IMAGE_PART) for _ in images] + [text_part(name)]
    return Request(name, ({"role": "user", "content": content},), images)


def pairs_of(count: int) -> Pairs:
    return [(f"k{number}".encode(), ask(f"r{number}")) for number in range(count)]


def backend_for(url: str, **options: Any) -> ServerBackend:
    settings = {"model": "m", "timeout_s": 5.0, "retries": 3, "backoff_s": 0.005, **options}
    return ServerBackend(ServerOptions(base_url=url, **settings))


def answers(backend: ServerBackend, pairs: Pairs, decoding: Decoding = GREEDY) -> dict[bytes, Result]:
    results = [result for batch in backend.generate(pairs, decoding) for result in batch]
    assert sorted(result.key for result in results) == sorted(key for key, _ in pairs)
    return {result.key: result for result in results}


def refuse_all(*, status: int, content: bytes = b"{}", headers: dict[str, str] | None = None) -> FakeServer:
    return FakeServer(script=lambda *_: Fault("status", status, content, headers or {}))


whole = json.dumps(completion("never seen")).encode()
PASSING = {
    "429": Fault("status", 429, headers={"Retry-After": "0"}),
    "408": Fault("status", 408),
    "409": Fault("status", 409),
    "425": Fault("status", 425),
    "500": Fault("status", 500),
    "502 in HTML": Fault("status", 502, b"<html><b>Bad Gateway</b></html>"),
    "503 with nonsense to wait": Fault("status", 503, headers={"Retry-After": "soon"}),
    "time-out": Fault("hang", seconds=9.0),
    "trickle": Fault("trickle", content=whole, seconds=0.1),
    "dropped": Fault("drop"),
    "cut": Fault("cut", content=whole),
    "malformed": Fault("body", content=whole[:-9]),
    "not UTF-8": Fault("body", content=b'{"choices": "\xff\xfe\xfd"}'),
    "empty": Fault("body", content=b""),
    "deep": Fault("body", content=b"[" * 200_000),
    "a list": Fault("body", content=b"[]"),
    "an error as 200": Fault("body", content=b'{"error": {"message": "overloaded"}}'),
    "no choices": Fault("body", content=b'{"choices": []}'),
    "choices null": Fault("body", content=b'{"choices": null}'),
    "no message": Fault("body", content=b'{"choices": [{"text": "x"}]}'),
    "text is a number": Fault("body", content=b'{"choices": [{"message": {"content": 5}}]}'),
    "aborted": Fault("body", content=json.dumps(completion("half", finish="abort")).encode()),
}


def test_each_passing_fault_is_tried_again_and_each_request_answered_once():
    faults = list(PASSING.values())
    pairs = pairs_of(3 * len(faults))

    def script(name: str, tries: int) -> Fault | None:
        number = int(name[1:])
        return faults[number % len(faults)] if tries == 1 and number < len(faults) else None

    with FakeServer(script=script, delay=0.002) as fake:
        found = answers(backend_for(fake.base_url, timeout_s=1.5, concurrency=7), pairs)
    assert {key: result.text for key, result in found.items()} == {
        key: f"answer to {request.id}" for key, request in pairs
    }
    assert {result.finish for result in found.values()} == {"stop"}
    assert {name: fake.tries[name] for name in fake.tries} == {
        request.id: 2 if number < len(faults) else 1 for number, (_, request) in enumerate(pairs)
    }


@pytest.mark.parametrize("concurrency", [1, 5])
def test_no_more_requests_at_once_than_asked_for(concurrency: int):
    with FakeServer(delay=0.02) as fake:
        answers(backend_for(fake.base_url, concurrency=concurrency), pairs_of(30))
    assert fake.most_at_once == concurrency


def test_a_fault_that_stays_is_a_failed_result_after_all_tries():
    with FakeServer(script=lambda name, _: Fault("status", 500) if name == "r3" else None) as fake:
        found = answers(backend_for(fake.base_url, retries=4, concurrency=2), pairs_of(9))
    assert fake.tries["r3"] == 5
    assert found[b"k3"].finish == "error"
    assert found[b"k3"].text == ""
    assert found[b"k3"].error.startswith("server: HTTP 500: as the script says")
    assert [key for key, result in found.items() if result.error] == [b"k3"]


@pytest.mark.parametrize("status", [400, 404, 413, 422, 402])
def test_a_refusal_is_a_failed_result_at_once(status: int):
    fault = Fault("status", status, b'{"error": {"message": "too <|im_end|> long\\u001b[31m"}}')
    with FakeServer(script=lambda name, _: fault if name == "r1" else None) as fake:
        found = answers(backend_for(fake.base_url), pairs_of(4))
    assert fake.tries["r1"] == 1
    assert found[b"k1"].error == f"server: HTTP {status}: too < |im_end|> long [31m"
    assert sum(result.error is None for result in found.values()) == 3


def test_waits_double_and_heed_retry_after():
    def script(name: str, tries: int) -> Fault | None:
        headers = {"Retry-After": "0.4"} if name == "r0" else {}
        return Fault("status", 429, headers=headers) if tries <= (1 if name == "r0" else 3) else None

    with FakeServer(script=script) as fake:
        answers(backend_for(fake.base_url, backoff_s=0.1), pairs_of(2))
    first, second = fake.times["r0"]
    assert 0.4 <= second - first < 3
    times = fake.times["r1"]
    for place, wait in enumerate((0.1, 0.2, 0.4)):
        assert 0.5 * wait <= times[place + 1] - times[place] < wait + 2


def test_a_server_cannot_make_the_job_wait_for_an_hour(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "MAX_WAIT_S", 0.05)
    fault = Fault("status", 503, headers={"Retry-After": "3600"})
    with FakeServer(script=lambda _, tries: fault if tries == 1 else None) as fake:
        answers(backend_for(fake.base_url), pairs_of(1))
    first, second = fake.times["r0"]
    assert 0.05 <= second - first < 2


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("key", [KEY, None])
def test_a_refused_key_ends_the_job_and_names_the_variable(
    status: int, key: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MY_KEY", raising=False)
    if key:
        monkeypatch.setenv("MY_KEY", key)
    content = json.dumps({"error": {"message": f"Incorrect API key: {key}"}}).encode()
    with refuse_all(status=status, content=content) as fake:
        backend = backend_for(fake.base_url, api_key_env="MY_KEY", concurrency=2)
        with pytest.raises(DataError, match=f"HTTP {status}.*MY_KEY") as caught:
            list(backend.generate(pairs_of(50), GREEDY))
        assert fake.tries.total() <= 2
    assert KEY not in str(caught.value)
    assert ("it is not set" in str(caught.value)) == (key is None)


def test_the_key_goes_to_the_server_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    caplog.set_level(logging.DEBUG)
    echoed = json.dumps({"error": {"message": f"bad header Authorization: Bearer {KEY}"}}).encode()
    plain = f"debug page: {KEY}".encode()
    statuses = {"r1": (400, echoed), "r2": (500, echoed), "r3": (422, plain)}

    def script(name: str, tries: int) -> Fault | None:
        return Fault("status", *statuses[name]) if name in statuses else None

    with FakeServer(script=script) as fake:
        backend = backend_for(fake.base_url, api_key_env="MY_KEY", retries=1)
        found = answers(backend, pairs_of(5))
    assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}
    assert "[key]" in found[b"k1"].error
    output = capfd.readouterr()
    seen = [repr(found), caplog.text, output.out, output.err]
    seen += [repr(each) for each in (backend, vars(backend), backend.identity, backend.options)]
    assert not any(KEY in text for text in seen)


def test_no_key_is_sent_where_none_is_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "")
    with FakeServer() as fake:
        answers(backend_for(fake.base_url, api_key_env="MY_KEY"), pairs_of(1))
    assert "Authorization" not in fake.headers[0]


@pytest.mark.parametrize("value", ["sk-a\r\nX-Evil: 1", "sk a", "sk-ключ"])
def test_an_unusable_key_is_named_by_its_variable_alone(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", value)
    with FakeServer() as fake:
        with pytest.raises(DataError, match="MY_KEY") as caught:
            answers(backend_for(fake.base_url, api_key_env="MY_KEY"), pairs_of(1))
        assert not fake.tries
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key_env": "sk-planted"},
        {"base_url": "ftp://host/v1"},
        {"base_url": "file:///etc/passwd"},
        {"base_url": "host:8000"},
        {"base_url": "http://"},
        {"base_url": "http://[::1"},
        {"base_url": "http://host:99999/v1"},
        {"base_url": "http://me:planted@host/v1"},
        {"base_url": "http://host/v1?key=planted"},
        {"concurrency": 0},
        {"retries": -1},
        {"timeout_s": 0.0},
        {"max_pixels": 0},
    ],
)
def test_unusable_options_are_refused_without_repeating_secrets(options: dict[str, Any]):
    with pytest.raises(DataError, match=next(iter(options))) as caught:
        ServerOptions(model="m", **options)
    assert "planted" not in str(caught.value)


def test_a_model_must_be_named():
    with pytest.raises(DataError, match="model"):
        ServerBackend(ServerOptions())


def test_an_unreachable_server_ends_the_job_and_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        for count in (1, 100):
            with pytest.raises(DataError, match=f"cannot be reached at {url}"):
                list(backend_for(url).generate(pairs_of(count), GREEDY))


def test_a_server_that_goes_away_ends_the_job_and_what_it_answered_stays():
    fake = FakeServer()
    with fake:
        run = backend_for(fake.base_url, concurrency=4).generate(pairs_of(400), GREEDY)
        done = [*next(run)]
    with pytest.raises(DataError, match="cannot be reached"):
        for batch in run:
            done += batch
    assert 0 < len(done) < 400
    assert all(result.error is None for result in done)


def test_a_wrong_model_name_ends_the_job_instead_of_failing_every_request():
    with refuse_all(status=404, content=b'{"error": "no model m"}') as fake:
        with pytest.raises(DataError, match=r"gives no answers.*no model m"):
            list(backend_for(fake.base_url, concurrency=4).generate(pairs_of(500), GREEDY))
        assert fake.tries.total() < 40


def test_failures_among_answers_are_all_delivered():
    def script(name: str, _: int) -> Fault | None:
        return None if int(name[1:]) % 10 == 9 else Fault("drop")

    with FakeServer(script=script) as fake:
        found = answers(backend_for(fake.base_url, retries=0, concurrency=1), pairs_of(65))
    assert sum(result.error is None for result in found.values()) == 6
    assert fake.tries.total() == 65


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status: int):
    with FakeServer() as other:
        fault = Fault("status", status, headers={"Location": f"{other.base_url}/chat/completions"})
        with FakeServer(script=lambda name, _: fault if name == "r0" else None) as fake:
            found = answers(backend_for(fake.base_url), pairs_of(3))
    assert not other.tries
    assert found[b"k0"].error.startswith(f"server: HTTP {status}")


def test_an_endless_answer_is_not_read_to_its_end():
    with FakeServer(answer=lambda _: completion("x" * (5 << 20))) as fake:
        found = answers(backend_for(fake.base_url), pairs_of(1))
    assert found[b"k0"].error == "server: an answer of more than 4 MiB"
    assert fake.tries["r0"] == 1


def test_any_text_comes_back_as_it_was_sent():
    texts = {
        f"r{n}": t
        for n, t in enumerate(["", " \n", "<|im_end|>\0\u2028\x1b[31m", "日本語 👩‍👩‍👧", "x" * 10**6])
    }
    with FakeServer(answer=lambda body: completion(texts[body["messages"][0]["content"]])) as fake:
        found = answers(backend_for(fake.base_url), pairs_of(len(texts)))
    assert {key.decode().replace("k", "r"): result.text for key, result in found.items()} == texts


def test_stored_answers_do_not_depend_on_where_the_server_runs():
    here, there = (backend_for(f"http://{host}/v1", revision="r", max_pixels=5000) for host in ("a", "b"))
    assert here.identity == there.identity
    assert here.identity == {"backend": "server", "model": "m", "revision": "r", "max_pixels": 5000}


def settled(fake: FakeServer) -> int:
    """Returns how many requests came once no more come."""
    before = -1
    while before != fake.tries.total():
        before = fake.tries.total()
        time.sleep(0.15)
    return before


def test_a_slow_caller_stops_the_asking_and_a_caller_that_leaves_ends_it():
    threads = set(threading.enumerate())
    with FakeServer() as fake:
        run = backend_for(fake.base_url, concurrency=3).generate(pairs_of(500), GREEDY)
        assert next(run)
        assert settled(fake) < 100
        run.close()
        assert settled(fake) < 100
        assert not [thread for thread in set(threading.enumerate()) - threads if "recllm" in thread.name]


def test_a_forgotten_generator_leaves_no_thread():
    with FakeServer(delay=0.05) as fake:
        run = backend_for(fake.base_url).generate(pairs_of(300), GREEDY)
        next(run)
        del run
        gc.collect()
        assert not [thread for thread in threading.enumerate() if "recllm" in thread.name]


def test_leaving_does_not_wait_for_a_server_that_says_nothing():
    with FakeServer(script=lambda name, _: Fault("hang", seconds=30) if name != "r0" else None) as fake:
        run = backend_for(fake.base_url, timeout_s=60.0).generate(pairs_of(20), GREEDY)
        next(run)
        start = time.monotonic()
        run.close()
        assert time.monotonic() - start < 5


def test_works_where_an_event_loop_runs_already():
    async def notebook() -> dict[bytes, Result]:
        with FakeServer() as fake:
            return answers(backend_for(fake.base_url), pairs_of(3))

    assert len(asyncio.run(notebook())) == 3


def test_no_requests_need_no_server():
    assert list(backend_for("http://127.0.0.1:1/v1").generate([], GREEDY)) == []


def test_the_environments_proxy_is_for_other_machines(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://me:planted@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "inside.example")
    with FakeServer() as fake:
        answers(backend_for(fake.base_url), pairs_of(1))
    for host in ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "0.0.0.0", "inside.example"):
        assert proxy_for(f"http://{host}:8000/v1") is None
    assert proxy_for("https://api.example/v1") == "http://me:planted@127.0.0.1:9"
    with pytest.raises(DataError, match="cannot be reached") as caught:
        list(backend_for("http://api.example/v1", retries=0).generate(pairs_of(1), GREEDY))
    assert "planted" not in str(caught.value)
    monkeypatch.setenv("https_proxy", "socks5://me:planted@127.0.0.1:9")
    with pytest.raises(DataError, match="NO_PROXY") as caught:
        proxy_for("https://api.example/v1")
    assert "planted" not in str(caught.value)
