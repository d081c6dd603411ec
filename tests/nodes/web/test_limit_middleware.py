"""Rate limits in web servers: FastAPI on uvicorn, and aiohttp, asked over the loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import anyio
import pytest
import uvicorn
from aiohttp import web
from fastapi import FastAPI, Response
from hypothesis import given
from hypothesis import strategies as st

import forebay
from forebay import RateLimitMiddleware, rate_limit_middleware
from forebay.nodes.limits import RateLimit
from forebay.nodes.web.limit_answers import fields_of, subject_of
from forebay.schemas.keys import check_key
from forebay.schemas.limits import Limit, Verdict
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from support.eventually import until
from support.valkey_server import ValkeyServer


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
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def who(path: str, given: str | None) -> str | None:
    return None if path == "/free" else given


def fastapi_app(limit: RateLimit) -> FastAPI:
    app = FastAPI()

    def subject(scope: Any) -> str | None:
        headers = dict(scope["headers"])
        return who(scope["path"], headers.get(b"x-user", b"-").decode("latin-1"))

    app.add_middleware(RateLimitMiddleware, limit=limit, subject=subject)

    @app.get("/")
    async def index() -> str:
        return "hello"

    @app.get("/own")
    async def own(response: Response) -> str:
        response.headers["RateLimit"] = "mine"
        return "hello"

    @app.get("/free")
    async def free() -> str:
        return "hello"

    return app


def aiohttp_app(limit: RateLimit) -> web.Application:
    def subject(request: web.Request) -> str | None:
        return who(request.path, request.headers.get("X-User", "-"))

    app = web.Application(middlewares=[rate_limit_middleware(limit, subject=subject)])

    async def index(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def own(_: web.Request) -> web.Response:
        return web.Response(text="hello", headers={"RateLimit": "mine"})

    app.router.add_get("/", index)
    app.router.add_get("/own", own)
    app.router.add_get("/free", index)
    return app


@pytest.fixture
async def limit(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[RateLimit]:
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=4),
        valkey=Valkey(url=valkey_server.socket_url),
    )
    node = forebay.Node(settings=settings)
    made = node.limit("api", rate=1, per=60, burst=2)
    async with node:
        yield made


@pytest.fixture(params=["uvicorn", "aiohttp"])
async def client(
    request: pytest.FixtureRequest, limit: RateLimit
) -> AsyncIterator[aiohttp.ClientSession]:
    @asynccontextmanager
    async def served() -> AsyncIterator[str]:
        if request.param == "uvicorn":
            async with on_uvicorn(fastapi_app(limit)) as url:
                yield url
        else:
            async with on_aiohttp(aiohttp_app(limit)) as url:
                yield url

    async with served() as url, aiohttp.ClientSession(url) as session:
        yield session


async def test_answers_tell_what_is_left(client: aiohttp.ClientSession) -> None:
    """A1: policy and state on every answer, also on one that the application refused."""
    async with client.get("/") as answer:
        assert answer.status == 200
        assert answer.headers["RateLimit-Policy"] == '"api";q=2;w=120'
        assert answer.headers["RateLimit"] == '"api";r=1;t=60'
        assert "Retry-After" not in answer.headers
    async with client.get("/nowhere") as answer:
        assert answer.status == 404
        assert answer.headers["RateLimit"].startswith('"api";r=0')


async def test_a_refusal_says_why_and_when(client: aiohttp.ClientSession) -> None:
    """M1: 429, Retry-After and a problem document; another subject is not concerned."""
    for _ in range(2):
        async with client.get("/") as answer:
            assert answer.status == 200
    async with client.get("/") as answer:
        assert answer.status == 429
        assert 50 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.headers["RateLimit"].startswith('"api";r=0;t=')
        assert answer.content_type == "application/problem+json"
        problem = await answer.json(content_type=None)
        assert problem["status"] == 429
        assert problem["type"].endswith("#quota-exceeded")
        assert problem["violated-policies"] == ["api"]
    async with client.get("/", headers={"X-User": "ann {}*"}) as answer:
        assert answer.status == 200


async def test_fields_of_the_application_stay(client: aiohttp.ClientSession) -> None:
    """M2: what it said itself is not said twice."""
    async with client.get("/own") as answer:
        assert answer.headers.getall("RateLimit") == ["mine"]
        assert "RateLimit-Policy" in answer.headers


async def test_some_pass_unlimited(client: aiohttp.ClientSession) -> None:
    """M3."""
    for _ in range(4):
        async with client.get("/free") as answer:
            assert answer.status == 200
            assert "RateLimit" not in answer.headers


@given(st.text(max_size=600), st.text(max_size=600))
def test_any_text_is_a_subject_of_its_own(one: str, other: str) -> None:
    """A2: never refused, never another's."""
    first, second = subject_of(one), subject_of(other)
    assert check_key(first) == first
    plain = all(text not in ("", "-") and text.isprintable() for text in (one, other))
    assert not plain or (first == second) == (one == other)


def test_fields_of_several_limits() -> None:
    """A1: all policies, the state of the one that binds; shadows are not told of."""
    limits = [
        Limit(name="a", rate=100, burst=50),
        Limit(name="b", rate=1, per=3, burst=2),
        Limit(name="dark", rate=1, burst=1, shadow=True),
    ]
    fields = fields_of(limits, Verdict(False, 0, "b", 1, 1_001, 5_000, "server"))
    assert fields == {
        "RateLimit-Policy": '"a";q=50;w=1, "b";q=2;w=6',
        "RateLimit": '"b";r=0;t=2',
        "Retry-After": "2",
    }


def test_a_shadow_alone_sends_no_fields() -> None:
    """A1: an empty policy would be no valid field."""
    dark = Limit(name="dark", rate=1, burst=1, shadow=True)
    assert fields_of([dark], Verdict(True, 1, "dark", 0, 0, 1_000, "server")) == {}
