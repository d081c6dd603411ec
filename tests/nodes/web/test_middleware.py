"""Request scope in web servers: FastAPI on uvicorn, and aiohttp, over the loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import anyio
import anyio.to_thread
import pytest
import uvicorn
from aiohttp import web
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware

from forebay.nodes import request_scope as scope
from forebay.nodes.cache.core import Hit
from forebay.nodes.request_scope import current, request_scope
from forebay.nodes.web.aiohttp_middleware import request_scope_middleware
from forebay.nodes.web.asgi import RequestScopeMiddleware
from support.eventually import until

PATIENCE_S = 20.0  #: for whatever has to come; not what is promised


class Readings:
    """The value that the handlers read: it rises with each read. Some handlers wait here."""

    def __init__(self) -> None:
        self.reads = 0
        self.waiting = 0
        self.go_on = anyio.Event()
        self.afterwards: list[bool] = []
        self.cancelled = anyio.Event()

    async def number(self) -> int:
        found = current()
        return (
            await self._read() if found is None else await found.read(self, "k", self._read)
        ).value

    async def _read(self) -> Hit[int]:
        self.reads += 1
        return Hit(value=self.reads, tier="near", version=1, age_ms=0)

    async def twice(self) -> list[int]:
        first = await self.number()
        self.waiting += 1
        await self.go_on.wait()
        return [first, await self.number()]

    async def until_waiting(self, count: int) -> None:
        await until(lambda: self.waiting >= count)


class Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they belong to pytest


@asynccontextmanager
async def on_uvicorn(app: Any) -> AsyncIterator[str]:
    server = Uvicorn(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve)
        await until(lambda: server.started)
        try:
            _, port = server.servers[0].sockets[0].getsockname()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True


@asynccontextmanager
async def on_aiohttp(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def fastapi_app(readings: Readings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        readings.afterwards.append(current() is not None)
        yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(RequestScopeMiddleware)

    @app.get("/twice")
    async def twice() -> list[int]:
        return await readings.twice()

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError(f"read {await readings.number()}")

    @app.get("/depends")
    async def depends(checked: int = Depends(readings.number)) -> list[int]:  # noqa: FAST002 - readings is local
        return [checked, await readings.number()]

    @app.get("/thread")
    def thread() -> bool:
        return current() is not None

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> int:
        async def work() -> None:
            readings.afterwards.append(current() is not None)

        tasks.add_task(work)
        return await readings.number()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for _ in range(3):
                yield f"{await readings.number()}\n"

        return StreamingResponse(lines())

    return app


def aiohttp_app(readings: Readings) -> web.Application:
    async def twice(request: web.Request) -> web.Response:
        try:
            return web.json_response(await readings.twice())
        except BaseException:
            readings.cancelled.set()
            raise

    async def broken(request: web.Request) -> web.Response:
        raise RuntimeError(f"read {await readings.number()}")

    async def missing(request: web.Request) -> web.Response:
        raise web.HTTPNotFound(text=f"{await readings.number()}")

    async def socket(request: web.Request) -> web.WebSocketResponse:
        answered = web.WebSocketResponse()
        await answered.prepare(request)
        await answered.send_json([await readings.number(), await readings.number()])
        await answered.close()
        return answered

    app = web.Application(middlewares=[request_scope_middleware])
    for handler in (twice, broken, missing, socket):
        app.router.add_get(f"/{handler.__name__}", handler)
    return app


@pytest.fixture
def readings() -> Readings:
    return Readings()


@pytest.fixture(autouse=True)
def none_is_left_open() -> Iterator[None]:
    """After each test all scopes are closed."""
    yield
    assert scope.opened == 0


@pytest.fixture
async def asgi(readings: Readings) -> AsyncIterator[aiohttp.ClientSession]:
    async with on_uvicorn(fastapi_app(readings)) as url, aiohttp.ClientSession(url) as client:
        yield client


@pytest.fixture(params=["asgi", "aiohttp"])
async def client(
    request: pytest.FixtureRequest, readings: Readings
) -> AsyncIterator[aiohttp.ClientSession]:
    serving: AbstractAsyncContextManager[str] = (
        on_uvicorn(fastapi_app(readings))
        if request.param == "asgi"
        else on_aiohttp(aiohttp_app(readings))
    )
    async with serving as url, aiohttp.ClientSession(url) as client:
        yield client


async def body_of(client: aiohttp.ClientSession, path: str) -> Any:
    async with client.get(path) as response:
        assert response.status == 200
        return await response.json()


async def test_each_request_has_a_scope_of_its_own(
    client: aiohttp.ClientSession, readings: Readings
) -> None:
    """M1: twenty concurrent requests read twice, and each sees its first value again."""
    answers: list[list[int]] = []

    async def ask() -> None:
        answers.append(await body_of(client, "/twice"))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(ask)
        await readings.until_waiting(20)
        assert scope.opened == 20
        readings.go_on.set()

    assert sorted(answers) == [[number, number] for number in range(1, 21)]


async def test_request_that_fails_leaves_no_scope_open(
    client: aiohttp.ClientSession, readings: Readings
) -> None:
    """M3: the error passes unchanged, and the next request on the connection reads a new value."""
    for number in (1, 2):
        async with client.get("/broken") as response:
            assert response.status == 500
        assert readings.reads == number
    await until(lambda: scope.opened == 0)


async def test_request_whose_client_has_gone_leaves_no_scope_open(
    client: aiohttp.ClientSession, readings: Readings
) -> None:
    """M3: after a disconnect the scope is closed, also if the handler finishes."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body_of, client, "/twice")
        await readings.until_waiting(1)
        assert scope.opened == 1
        tasks.cancel_scope.cancel()
    readings.go_on.set()
    await until(lambda: scope.opened == 0)


async def test_cancelled_handler_is_cancelled_through_the_scope(readings: Readings) -> None:
    """M3: aiohttp cancels the handler of a disconnected client, and the scope is closed."""
    async with on_aiohttp(aiohttp_app(readings)) as url, aiohttp.ClientSession(url) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(body_of, client, "/twice")
            await readings.until_waiting(1)
            tasks.cancel_scope.cancel()
        with anyio.fail_after(PATIENCE_S):
            await readings.cancelled.wait()
        await until(lambda: scope.opened == 0)


async def test_http_error_of_aiohttp_passes(readings: Readings) -> None:
    """M3: a response that is raised is the answer."""
    async with (
        on_aiohttp(aiohttp_app(readings)) as url,
        aiohttp.ClientSession(url) as client,
        client.get("/missing") as response,
    ):
        assert (response.status, await response.text()) == (404, "1")


async def test_websocket_of_aiohttp_has_no_scope(readings: Readings) -> None:
    """M2: a WebSocket may stay open for days, so each of its reads is current."""
    async with (
        on_aiohttp(aiohttp_app(readings)) as url,
        aiohttp.ClientSession(url) as client,
        client.ws_connect("/socket") as socket,
    ):
        assert await socket.receive_json() == [1, 2]


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_what_is_no_request_is_passed_on_as_it_is(readings: Readings, kind: str) -> None:
    """M2: the application gets the same three arguments, and no scope."""
    got: list[object] = []

    async def app(*given: object) -> None:
        got.extend([*given, current()])

    async def receive() -> Any: ...

    async def send(_message: Any) -> None: ...

    arriving = {"type": kind}
    await RequestScopeMiddleware(app)(arriving, receive, send)

    assert got == [arriving, receive, send, None]


async def test_lifespan_has_no_scope(asgi: aiohttp.ClientSession, readings: Readings) -> None:
    """M2: the lifespan has no scope: tasks started in it would keep the scope forever."""
    assert readings.afterwards == [False]


async def test_dependency_and_endpoint_are_one_request(asgi: aiohttp.ClientSession) -> None:
    """M1: a dependency and the endpoint read the same value."""
    assert await body_of(asgi, "/depends") == [1, 1]


async def test_endpoint_in_a_thread_is_in_the_scope(asgi: aiohttp.ClientSession) -> None:
    """M1: FastAPI runs plain functions in threads, with the context of the request."""
    assert await body_of(asgi, "/thread") is True


async def test_stream_is_one_request(asgi: aiohttp.ClientSession) -> None:
    """M1: the scope lasts until the last byte of the answer."""
    async with asgi.get("/stream") as response:
        assert await response.text() == "1\n1\n1\n"


async def test_background_task_after_the_answer_has_no_scope(
    asgi: aiohttp.ClientSession, readings: Readings
) -> None:
    """M1: a background task has no scope: its reads are current."""
    await body_of(asgi, "/background")
    await until(lambda: len(readings.afterwards) == 2)

    assert readings.afterwards == [False, False]


async def test_scope_reaches_through_a_middleware_with_a_task_of_its_own(
    readings: Readings,
) -> None:
    """M1: Starlette's BaseHTTPMiddleware runs the application in another task."""

    async def reading(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["X-Number"] = f"{await readings.number()}"
        return response

    app = fastapi_app(readings)
    app.add_middleware(BaseHTTPMiddleware, dispatch=reading)
    app.add_middleware(RequestScopeMiddleware)
    readings.go_on.set()
    async with (
        on_uvicorn(app) as url,
        aiohttp.ClientSession(url) as client,
        client.get("/twice") as response,
    ):
        assert (await response.json(), response.headers["X-Number"]) == ([1, 1], "1")


async def test_scope_around_is_not_ended_by_the_answer(readings: Readings) -> None:
    """A test, or a gateway, that calls an application in its own scope keeps it."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any: ...

    async def send(_message: Any) -> None: ...

    async with request_scope() as around:
        await RequestScopeMiddleware(app)({"type": "http"}, receive, send)
        assert current() is around
