"""Under load: the queue is bounded, who goes away costs nothing, time is limited, and a failure harms nobody else."""

from __future__ import annotations

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from serving import ask, need_serve, serving

need_serve()

openai = pytest.importorskip("openai", reason="the openai client is not installed")


@pytest.fixture
def start(models):
    """A function that starts a server of its own with these limits, and gives it with a client."""
    from contextlib import ExitStack

    from rode.serving.app import Server
    from rode.serving.limits import Limits

    with ExitStack() as stack:

        def begin(key=None, **limits):
            server = Server(models, Limits(**{"max_new_tokens": 400, "timeout": 60} | limits))
            address = stack.enter_context(serving(server, key=key))
            made = openai.OpenAI(base_url=f"{address}/v1", api_key=key or "none", max_retries=0, timeout=60)
            return server, made, address

        yield begin


class Gate:
    """Holds the model's thread at each token until it is opened; `allow` lets so many through."""

    def __init__(self):
        self.tokens = threading.Semaphore(0)
        self.reached = threading.Event()
        self.open = False
        self.seen = 0

    def wait(self):
        self.seen += 1
        self.reached.set()
        while not self.open and not self.tokens.acquire(timeout=0.01):
            pass

    def allow(self, count):
        for _ in range(count):
            self.tokens.release()


@pytest.fixture
def gate(monkeypatch):
    from rode.serving import batch

    found = Gate()
    take = batch._Answers.__call__

    def held(self, *args, **kwargs):
        found.wait()
        return take(self, *args, **kwargs)

    monkeypatch.setattr(batch._Answers, "__call__", held)
    yield found
    found.open = True


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def create(client, question="What is it?", **options):
    options = {"model": "rode", "messages": ask(question), "max_tokens": 300} | options
    return client.chat.completions.create(**options)


def raw(address, **options):
    """A connection with a request that is sent and not read."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    body = {"model": "rode", "messages": ask("What is it?"), "max_tokens": 300} | options
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_generation(start, gate, stream):
    server, client, address = start()
    connection = raw(address, stream=stream)
    assert gate.reached.wait(20)
    gate.allow(5)
    until(lambda: gate.seen == 6)
    connection.close()
    until(lambda: not server.engine._slots)
    gate.open = True
    until(lambda: server.metrics.running._value.get() == 0)
    assert gate.seen < 20  # of 300
    assert server.metrics.requests.labels("499")._value.get() == 1
    assert create(client, max_tokens=3).choices  # and the server goes on


def test_who_leaves_the_queue_is_not_answered(start, gate):
    server, _, address = start(batch_size=1)
    running = raw(address, max_tokens=2)
    assert gate.reached.wait(20)
    waiting = [raw(address) for _ in range(3)]
    until(lambda: len(server.engine._waiting) == 3)
    for connection in waiting:
        connection.close()
    until(lambda: not server.engine._waiting and len(server.engine._slots) == 1)
    gate.open = True
    assert json.loads(running.getresponse().read())["choices"]
    running.close()
    assert server.metrics.batches._sum.get() == 1


def test_others_of_the_batch_go_on(start, gate):
    """One of two goes away in the middle; the other's answer is what it is alone."""
    server, client, address = start()
    gate.open = True
    alone = create(client, "Is it hot?", max_tokens=30).choices[0].message.content
    gate.open = False
    gate.reached.clear()
    first = raw(address, max_tokens=1)
    assert gate.reached.wait(20)
    with ThreadPoolExecutor(1) as pool:
        leaving = raw(address)
        staying = pool.submit(create, client, "Is it hot?", max_tokens=30)
        until(lambda: len(server.engine._waiting) == 2)
        before = gate.seen
        gate.allow(6)
        until(lambda: gate.seen == before + 6)
        leaving.close()
        until(lambda: len(server.engine._slots) == 1)
        gate.open = True
        assert staying.result().choices[0].message.content == alone
    first.close()


def test_a_full_queue_says_when_to_ask_again(start, gate):
    server, client, address = start(batch_size=1, queue=2)
    held = [raw(address, max_tokens=2) for _ in range(3)]
    until(lambda: len(server.engine._slots) == 3)
    with pytest.raises(openai.RateLimitError, match="has 3 requests already") as caught:
        create(client)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.code == "queue_full"
    assert caught.value.type == "rate_limit_error"
    gate.open = True
    answers = [json.loads(connection.getresponse().read()) for connection in held]
    assert all(found["choices"][0]["finish_reason"] for found in answers)
    for connection in held:
        connection.close()
    assert create(client, max_tokens=2).choices


def test_time_is_limited(start, gate):
    server, client, _ = start(timeout=1.0, batch_size=1)
    with pytest.raises(openai.InternalServerError, match="took longer than 1 s") as caught:
        create(client)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    gate.open = True
    until(lambda: server.metrics.running._value.get() == 0)
    gate.open = False
    gate.allow(10)
    stream = create(client, stream=True)  # an answer that has begun ends with an error event
    with pytest.raises(openai.APIError, match="took longer than 1 s"):
        list(stream)
    gate.open = True
    until(lambda: not server.engine._slots)


def test_a_client_that_does_not_read_holds_no_slot(monkeypatch):
    import asyncio
    from types import SimpleNamespace

    from rode.serving import app

    closed = []
    exchange = SimpleNamespace(left=lambda: 0.05, close=lambda: closed.append(True), status=200)
    monkeypatch.setattr(app, "_GRACE", 0.05)

    async def pieces():
        yield b"data: a"

    async def never(*_):
        await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(app._Events(exchange, pieces())(scope, never, never))
    assert (closed, exchange.status) == ([True], 499)


def test_a_failure_is_told_and_harms_nobody_else(start, gate, monkeypatch):
    from rode.serving.models import ServedModel

    server, client, address = start()
    join = ServedModel.batch

    def failing(self, prepared, rows):
        if any("poison" in each.question for each in prepared):
            raise RuntimeError("secret details")
        return join(self, prepared, rows)

    monkeypatch.setattr(ServedModel, "batch", failing)
    first = raw(address, max_tokens=1)
    assert gate.reached.wait(20)
    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(create, client, question, max_tokens=5) for question in ("Hot?", "Cold?")]
        bad = pool.submit(create, client, "poison", max_tokens=5)
        until(lambda: len(server.engine._waiting) == 3)
        gate.open = True
        assert all(one.result().choices for one in good)
        with pytest.raises(openai.InternalServerError, match="RuntimeError") as caught:
            bad.result()
    assert "secret" not in str(caught.value)
    first.close()
    assert server.engine.alive


def test_a_key(start):
    _, client, address = start(key="key-7")
    assert create(client, max_tokens=2).choices
    for key in ("wrong", "key-", "key-77"):
        with pytest.raises(openai.AuthenticationError, match="expected the server's key"):
            create(client.with_options(api_key=key))
    for path, status in (("/health", 200), ("/metrics", 401), ("/v1/models", 401), ("/gone", 401)):
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
        connection.request("GET", path)
        assert connection.getresponse().status == status
        connection.close()


def test_metrics(start):
    _, client, address = start()
    create(client, max_tokens=4)
    with pytest.raises(openai.BadRequestError):
        create(client, max_tokens=0)
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert 'rode_requests_total{status="200"} 1.0' in text
    assert 'rode_requests_total{status="400"} 1.0' in text
    assert 'rode_tokens_total{kind="answer",model="rode"} 4.0' in text
    assert "rode_batch_size_count 1.0" in text
    assert "rode_time_to_first_token_seconds_count 1.0" in text
    assert "rode_waiting_requests 0.0" in text
