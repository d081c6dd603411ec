"""The examples for FastAPI and aiohttp, as their docstrings say to start them, and as a client
sees them: two processes each, with one Valkey and one database."""

from __future__ import annotations

import http.client
import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from forebay.coordinator.valkey.embedded import bound_to_owner
from support.eventually import wait_until
from support.node_process import PATIENCE_S, environ
from support.valkey_server import ValkeyServer

Example = Literal["fastapi", "aiohttp"]
MakeService = Callable[[], "Service"]

COMMANDS: dict[Example, list[str]] = {
    "fastapi": ["uvicorn", "--port", "0", "forebay.nodes.demo.fastapi_app:app"],
    "aiohttp": [
        "aiohttp.web",
        "-H",
        "127.0.0.1",
        "-P",
        "0",
        "forebay.nodes.demo.aiohttp_app:make_app",
    ],
}
KETTLE = {"name": "kettle", "price": 1900}


class Answer(NamedTuple):
    status: int
    json: Any


class Service:
    """One process of an example, on a free port."""

    def __init__(self, example: Example, directory: Path, name: str, **settings: str) -> None:
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                bound_to_owner([sys.executable, "-m", *COMMANDS[example]], signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env=environ(PYTHONUNBUFFERED="1", **settings),
                process_group=0,
            )

    def until_ready(self) -> None:
        wait_until(lambda: self.port, what="a port")
        wait_until(lambda: self.get("/readyz").status == 200, what="readiness")

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def port(self) -> int:
        assert self._process.poll() is None, self.said
        found = re.search(r"[Rr]unning on http://127\.0\.0\.1:(\d+)", self.said)
        return int(found[1]) if found else 0

    def request(self, method: str, path: str, body: object = None) -> Answer:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text, kind = response.read(), response.getheader("Content-Type", "")
        return Answer(response.status, json.loads(text) if kind == "application/json" else None)

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def put(self, path: str, body: object) -> Answer:
        return self.request("PUT", path, body)

    def stop(self) -> int:
        """Ask it to end, as an orchestrator does; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE_S)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(params=["fastapi", "aiohttp"])
def example(request: pytest.FixtureRequest) -> Example:
    return request.param


@pytest.fixture
def make_service(
    example: Example, valkey_server: ValkeyServer, namespace: str, tmp_path: Path
) -> Iterator[MakeService]:
    settings = {"FOREBAY_URL": valkey_server.url, "FOREBAY_NAMESPACE": namespace}
    names = iter(("one", "two", "three"))
    with ExitStack() as services:

        def make() -> Service:
            service = Service(example, tmp_path, next(names), **settings)
            services.callback(service.close)
            return service

        yield make


@pytest.fixture
def two(make_service: MakeService) -> tuple[Service, Service]:
    one, other = make_service(), make_service()
    one.until_ready()
    other.until_ready()
    return one, other


def stored(directory: Path) -> dict[int, int]:
    """The prices in the database."""
    with closing(sqlite3.connect(directory / "shop.db")) as database:
        return dict(database.execute("SELECT id, price FROM products"))


def names_in(answer: Answer) -> list[str]:
    return [each["name"] for each in answer.json]


def test_what_is_put_through_one_process_is_read_from_the_other(
    two: tuple[Service, Service],
) -> None:
    """A new product, a new price, a deletion: at once here, soon there, absence included."""
    one, other = two
    assert other.get("/products/1").status == 404
    assert other.get("/catalog").json == []

    put = one.put("/products/1", KETTLE)
    assert put.status in (200, 202)
    assert put.json == one.get("/products/1").json == {**KETTLE, "id": 1}
    wait_until(lambda: other.get("/products/1") == (200, {**KETTLE, "id": 1}), what="the product")
    wait_until(lambda: names_in(other.get("/catalog")) == ["kettle"], what="the new catalog")

    other.put("/products/1", {"name": "teapot", "price": 2500})
    assert other.get("/products/1").json["price"] == 2500
    wait_until(lambda: one.get("/products/1").json["price"] == 2500, what="the new price")
    wait_until(lambda: names_in(one.get("/catalog")) == ["teapot"], what="the new name")

    assert one.request("DELETE", "/products/1").status in (202, 204)
    assert one.get("/products/1").status == 404
    wait_until(lambda: other.get("/products/1").status == 404, what="the deletion")
    wait_until(lambda: other.get("/catalog").json == [], what="the empty catalog")


def test_what_is_no_offer_is_refused_and_stored_nowhere(
    make_service: MakeService, tmp_path: Path
) -> None:
    """The client is told; the service goes on."""
    service = make_service()
    service.until_ready()

    for body in ({"name": "x"}, {"name": "", "price": 1}, {"name": "x", "price": -1}, 7, "x", None):
        assert service.put("/products/1", body).status in (400, 422)
    assert service.get("/products/1").status == 404
    assert service.get(f"/products/{10**30}").status in (404, 422)
    assert service.get("/products/x").status in (404, 422)
    assert stored(tmp_path) == {}


def test_service_that_is_stopped_has_stored_what_it_accepted(
    make_service: MakeService, tmp_path: Path
) -> None:
    """SIGTERM ends it in order: accepted writes are in the database, nothing failed aloud."""
    service = make_service()
    service.until_ready()
    for number in range(1, 21):
        offer = {"name": "kettle", "price": number}
        assert service.put(f"/products/{number}", offer).status in (200, 202)

    assert service.stop() in (0, -signal.SIGTERM)

    assert stored(tmp_path) == {number: number for number in range(1, 21)}
    assert "Traceback" not in service.said
    assert "node.stopped" in service.said
