"""The server's routes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from rode.serving.answers import DONE, JSON_TASKS, Completion, as_json, event
from rode.serving.batch import Event, Failed, Finished, Job, Piece
from rode.serving.engine import Engine, Slot
from rode.serving.errors import ApiError
from rode.serving.guard import Guard
from rode.serving.limits import Limits
from rode.serving.messages import Question, parse
from rode.serving.metrics import Metrics
from rode.serving.models import ServedModel
from rode.serving.pictures import decode

logger = logging.getLogger(__name__)

_BODY_SECONDS = 30.0  # for a body to arrive
_GRACE = 5.0  # seconds beyond a request's time for what was written to be read
_READERS = 2  # threads that decode pictures


class _Gone(Exception):
    """The client went away."""


class Server:
    """The models, the engine and what requests need of them.

    Args:
        models: by name. limits: of the server.
    """

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits) -> None:
        self.models, self.limits, self.metrics = dict(models), limits, Metrics()
        self.engine = Engine(limits, self.metrics)
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="rode-serve-pictures")

    def close(self) -> None:
        self.engine.close()
        self.readers.shutdown()

    def find(self, name: str) -> ServedModel:
        if name not in self.models:
            raise ApiError(
                404,
                f"model: expected one of {', '.join(self.models)}, got {name[:80]!r}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]


class Exchange:
    """One request and its answer, from admission to the last byte.

    Args:
        server: whose it is. request: of the client. slot: what the server admitted it to.
    """

    def __init__(self, server: Server, request: Request, slot: Slot) -> None:
        self.server, self.request, self.slot = server, request, slot
        self.arrived = time.monotonic()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.job: Job | None = None
        self.status = 200
        self._gone: asyncio.Task[None] | None = None
        self._began = self._ended = False

    def close(self) -> None:
        """Whatever happened: what nobody waits for is not computed, and the next request gets the slot."""
        if self._ended:
            return
        self._ended = True
        if self.job is not None:
            self.server.engine.cancel(self.job)
        self.slot.release()
        if self._gone is not None:
            self._gone.cancel()
        metrics = self.server.metrics
        metrics.requests.labels(str(self.status)).inc()
        metrics.duration.observe(time.monotonic() - self.arrived)

    async def ask(self) -> Question:
        """Read the request and put it into the queue."""
        limits, engine = self.server.limits, self.server.engine
        question = parse(await _body(self.request, limits.max_bytes), limits)
        served = self.server.find(question.model)
        loop = asyncio.get_running_loop()
        self.job = await loop.run_in_executor(self.server.readers, self._job, question, served, loop)
        engine.submit(self.job, self.slot)
        self._gone = asyncio.create_task(_disconnected(self.request))
        return replace(question, pictures=())  # megabytes, which are read by now

    def _job(self, question: Question, served: ServedModel, loop: asyncio.AbstractEventLoop) -> Job:
        images = [decode(data, where) for where, data in question.pictures]
        prepared = served.prepare(question.text, question.task, images)
        if prepared.row is not None:
            served.check_length(prepared.row, question.max_tokens)
        matcher = None
        if question.schema is not None:
            matcher = served.grammars.matcher(question.schema, "response_format.json_schema.schema")
            if question.task in JSON_TASKS:
                matcher = None  # the trained answer is read into JSON afterwards

        def emit(happened: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server was stopped hard
                loop.call_soon_threadsafe(self.events.put_nowait, happened)

        return Job(served, prepared, question.max_tokens, emit, question.stops, question.sampling, matcher)

    async def next(self) -> Piece | Finished:
        """What happens next.

        Raises:
            ApiError: the answer failed, or its time is over. _Gone: the client went away.
        """
        assert self._gone is not None, "asked before"
        coming = asyncio.ensure_future(self.events.get())
        try:
            await asyncio.wait((coming, self._gone), timeout=self.left(), return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                happened = coming.result()
            elif self._gone.done():
                raise _Gone
            else:
                raise ApiError(
                    504,
                    f"the answer took longer than {self.server.limits.timeout:g} s, the time in the queue included",
                    code="timeout",
                )
        finally:
            coming.cancel()
        if isinstance(happened, Failed):
            raise happened.error
        if not self._began:
            self._began = True
            self.server.metrics.first_token.observe(time.monotonic() - self.arrived)
        if isinstance(happened, Finished):
            assert self.job is not None, "it has answered"
            tokens, name = self.server.metrics.tokens, self.job.model.name
            tokens.labels(name, "prompt").inc(happened.prompt_tokens)
            tokens.labels(name, "answer").inc(happened.tokens)
        return happened

    def left(self) -> float:
        """Seconds until the request's time is over."""
        return max(0.0, self.arrived + self.server.limits.timeout - time.monotonic())

    async def text(self) -> tuple[str, Finished]:
        """The whole answer."""
        pieces: list[str] = []
        while isinstance(happened := await self.next(), Piece):
            pieces.append(happened.text)
        return "".join(pieces), happened


def _read_into_json(question: Question, served: ServedModel, text: str, end: Finished) -> str:
    """A trained answer in the schema that the client asked for.

    Raises:
        ApiError: the answer does not say it, or the schema has another shape.
    """
    assert question.task is not None and question.schema is not None, "checked by the caller"  # noqa: PT018
    if end.reason == "length":
        raise ApiError(
            500, f"the answer was cut at max_tokens={question.max_tokens}", code="answer_not_in_schema"
        )
    properties = question.schema.get("properties")
    found = as_json(question.task, text, list(properties) if isinstance(properties, dict) else ())
    matcher = served.grammars.matcher(question.schema, "response_format.json_schema.schema")
    if found is None or not served.grammars.accepts(matcher, found):
        what = "cannot be read" if found is None else f"read as {found[:300]} does not fit the schema"
        raise ApiError(
            500,
            f"task {question.task}: the model's answer {text[:300]!r} {what}",
            param="response_format",
            code="answer_not_in_schema",
        )
    return found


def _wants_reading(question: Question) -> bool:
    return question.schema is not None and question.task in JSON_TASKS


class _Events(StreamingResponse):
    """A stream that ends its exchange however it ends, even before its first byte."""

    def __init__(self, exchange: Exchange, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            # a client that does not read what it is sent holds its slot no longer than others
            async with asyncio.timeout(self.exchange.left() + _GRACE):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            self.exchange.status = 499
            logger.warning("a client did not read its answer in time")
        finally:
            self.exchange.close()


async def _stream(
    exchange: Exchange, question: Question, completion: Completion, first: Piece | Finished
) -> AsyncIterator[bytes]:
    """The events of an answer. An error after the first of them is an event, too."""
    happened = first
    try:
        yield event(completion.chunk({"role": "assistant", "content": ""}))
        while isinstance(happened, Piece):
            if happened.text:
                yield event(completion.chunk({"content": happened.text}))
            happened = await exchange.next()
        yield event(completion.chunk({}, happened.reason))
        if question.usage:
            yield event(completion.usage_chunk(happened))
        yield DONE
    except ApiError as error:
        exchange.status = error.status
        yield event(error.body())
    except (_Gone, asyncio.CancelledError) as gone:  # the response is cancelled where it sees it first
        exchange.status = 499
        if isinstance(gone, asyncio.CancelledError):
            raise


async def _read_stream(
    completion: Completion, question: Question, text: str, end: Finished
) -> AsyncIterator[bytes]:
    """The events of an answer that was whole before any of it could be sent."""
    yield event(completion.chunk({"role": "assistant", "content": text}))
    yield event(completion.chunk({}, end.reason))
    if question.usage:
        yield event(completion.usage_chunk(end))
    yield DONE


async def _answered(exchange: Exchange) -> Response:
    question = await exchange.ask()
    completion = Completion(secrets.token_hex(12), question.model)
    served = exchange.server.find(question.model)
    if question.stream and not _wants_reading(question):
        # until something happens the status is open: an error is then one of HTTP
        first = await exchange.next()
        return _Events(exchange, _stream(exchange, question, completion, first))
    text, end = await exchange.text()
    if _wants_reading(question):
        text = _read_into_json(question, served, text, end)
        if question.stream:
            return _Events(exchange, _read_stream(completion, question, text, end))
    return JSONResponse(completion.whole(text, end))


async def _body(request: Request, most: int) -> bytes:
    """The request's body. One that is too large is read to its end, up to a point, so that the client gets to see the answer."""
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    chunks.append(chunk)
                else:
                    chunks.clear()
                if size > 10 * most:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {_BODY_SECONDS:g} s to arrive") from None
    if size > most:
        raise ApiError(413, f"the body: expected at most {most:,} bytes, got more", code="body_too_large")
    return b"".join(chunks)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(server: Server, hosts: frozenset[str], api_key: str | None = None) -> FastAPI:
    """The application.

    Args:
        server: what it serves; its engine is started and closed with the application.
        hosts: see `rode.serving.guard.host_names`. api_key: that requests must carry; None for none.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await asyncio.to_thread(server.close)

    # no pages of documentation: they load scripts from elsewhere
    app = FastAPI(title="rode serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts, api_key=api_key)

    @app.exception_handler(ApiError)
    async def _told(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        said = {404: "no such address", 405: "no such method for this address"}
        told = ApiError(error.status_code, said.get(error.status_code, str(error.detail)))
        return JSONResponse(told.body(), told.status, {**told.headers(), **(error.headers or {})})

    @app.exception_handler(Exception)
    async def _unforeseen(_: Request, error: Exception) -> Response:
        told = ApiError(500, f"the server failed ({type(error).__name__}); its log says where")
        return JSONResponse(told.body(), told.status)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a form of a foreign web page can send is something else
            raise ApiError(415, f"Content-Type: expected application/json, got {kind[:80]!r}")
        try:
            slot = server.engine.admit()
        except ApiError as error:
            server.metrics.requests.labels(str(error.status)).inc()
            raise
        exchange = Exchange(server, request, slot)
        response: Response | None = None
        try:
            response = await _answered(exchange)
            return response
        except ApiError as error:
            exchange.status = error.status
            raise
        except _Gone:
            exchange.status = 499  # nobody reads it
            return Response(status_code=499)
        except Exception:
            exchange.status = 500
            raise
        finally:
            if not isinstance(response, _Events):
                exchange.close()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served) for served in server.models.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return _model(server.find(name))

    @app.get("/health")
    async def health() -> Response:
        alive = server.engine.alive
        return JSONResponse(
            {"status": "ok" if alive else "the model's thread has ended"}, 200 if alive else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _model(served: ServedModel) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "rode"}
