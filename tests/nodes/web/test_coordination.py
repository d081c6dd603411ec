"""Locks and limits over HTTP, on a node with a real server: /v1/locks, /v1/limits."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import anyio
import pytest
from yarl import URL

import forebay
from forebay.coordinator.clock import SystemClock
from forebay.nodes.coordinating import coordination_of
from forebay.nodes.web import lock_service as lock_desk
from forebay.nodes.web.server import serve
from forebay.schemas.errors import ConfigError
from forebay.schemas.errors_locks import LockNotAcquired
from forebay.schemas.settings import Http, Valkey
from support.valkey_server import ValkeyServer

MakeNode = Callable[..., forebay.Node]
NONCE, OTHER = "a" * 16, "b" * 16
JSON = {"Content-Type": "application/json"}
TOKEN = "0123456789abcdef"


@asynccontextmanager
async def endpoint(node: forebay.Node, **http: Any) -> AsyncIterator[aiohttp.ClientSession]:
    settings = Http(port=0, **http)
    async with (
        serve(
            node,
            settings,
            instruments=node._instruments,
            coordination=coordination_of(node._parts),
            event_bytes_max=65_536,
            clock=SystemClock(),
            random=Random(7),
        ) as address,
        aiohttp.ClientSession(address.url) as session,
    ):
        yield session


@pytest.fixture
async def node(make_node: MakeNode) -> AsyncIterator[forebay.Node]:
    made = make_node(http=Http(coordinator=True))
    made.limit("api", rate=1, per=3600, burst=5)
    async with made:
        yield made


@pytest.fixture
async def client(node: forebay.Node) -> AsyncIterator[aiohttp.ClientSession]:
    async with endpoint(node) as session:
        yield session


async def ask(
    client: aiohttp.ClientSession, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any]:
    async with client.request(method, path, json=body, headers=headers) as response:
        return response.status, await response.json()


async def take(client: aiohttp.ClientSession, body: Any, name: str = "l") -> tuple[int, Any]:
    return await ask(client, "POST", f"/v1/locks/{name}", body)


async def test_a_lock_is_had_renewed_shown_and_given_back(
    client: aiohttp.ClientSession, node: forebay.Node
) -> None:
    """What others see of it has no nonce: with that it could be released."""
    status, lease = await take(client, {"lease": 2, "meta": {"why": "report"}})
    assert (status, lease["name"], lease["lease_ms"]) == (200, "l", 2000)
    assert 0 < lease["left_ms"] <= 2000

    assert await node.try_lock("l") is None
    _, shown = await ask(client, "GET", "/v1/locks/l")
    (held,) = shown["holders"]
    assert (held["meta"], held["token"], "nonce" in held) == (
        {"why": "report"},
        lease["token"],
        False,
    )
    assert (await ask(client, "GET", "/v1/locks"))[1]["locks"][0]["name"] == "l"

    renewal = {"nonce": lease["nonce"], "lease": 30}
    status, renewed = await ask(client, "POST", "/v1/locks/l/renew", renewal)
    assert (status, renewed["token"], renewed["left_ms"]) == (200, lease["token"], 30_000)
    assert (await node.locks.show("l")).holders[0].left_ms > 20_000

    for _ in range(2):  # a release may be repeated
        path = f"/v1/locks/l?nonce={lease['nonce']}"
        assert await ask(client, "DELETE", path) == (200, {"name": "l", "released": True})
    assert (await ask(client, "POST", "/v1/locks/l/renew", renewal))[0] == 409
    assert (await node.locks.show("l")).holders == ()


async def test_the_same_nonce_has_the_same_lease(
    client: aiohttp.ClientSession, node: forebay.Node
) -> None:
    """D2: also at another endpoint; another nonce does not get it, and learns when to ask again."""
    first = await take(client, {"nonce": NONCE})
    async with endpoint(node) as other:
        again = await take(other, {"nonce": NONCE})
    assert (first[1]["token"], first[1]["nonce"]) == (again[1]["token"], NONCE)

    async with client.post("/v1/locks/l", json={"nonce": OTHER}) as response:
        refused = await response.json()
        assert (response.status, refused["error"]["code"]) == (423, "held")
        assert int(response.headers["Retry-After"]) > 0
        assert refused["holder"] == node._parts.node_id
    status, gone = await ask(client, "DELETE", "/v1/locks/l", {"nonce": OTHER})
    assert (status, gone["error"]["code"]) == (409, "not_held")
    assert len((await node.locks.show("l")).holders) == 1


async def test_a_name_is_one_segment(client: aiohttp.ClientSession, node: forebay.Node) -> None:
    """What is in percent-encoding is part of the name, a slash too; it is decoded once."""
    for path, name in (("a%2Frenew", "a/renew"), ("a%253A", "a%3A"), ("a:b", "a:b")):
        async with client.post(URL(f"/v1/locks/{path}", encoded=True), json={}) as response:
            assert (response.status, (await response.json())["name"]) == (200, name)
        assert (await node.locks.show(name)).holders


async def test_who_waits_is_woken(client: aiohttp.ClientSession, node: forebay.Node) -> None:
    """From a holder in Python to one by HTTP, and between two of these; tokens grow."""
    tokens: list[int] = []

    async def wait() -> None:
        status, lease = await take(client, {"timeout": 20})
        assert status == 200
        tokens.append(lease["token"])
        assert (await ask(client, "DELETE", f"/v1/locks/l?nonce={lease['nonce']}"))[0] == 200

    async with anyio.create_task_group() as tasks, node.lock("l") as lease:
        tokens.append(lease.token)
        for _ in range(5):
            tasks.start_soon(wait)
        while (await node.locks.show("l")).waiting < 5:
            await anyio.sleep(0.01)
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 6


@pytest.mark.parametrize("database", [0, 3])
async def test_the_ring_comes_through(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, valkey_server: ValkeyServer, database: int
) -> None:
    """D4: from each node to each, also where the script takes the two for one process; nobody
    asks by itself here.
    """
    monkeypatch.setattr(lock_desk, "BEAT_S", 1_000.0)
    nonces = [f"{number:016}" for number in range(1_000)]
    first = nonces[0]
    bucket = lock_desk._bucket_of(first)
    same = next(x for x in nonces[1:] if lock_desk._bucket_of(x) == bucket)
    other = next(x for x in nonces if lock_desk._bucket_of(x) != bucket)
    http = Http(coordinator=True)
    valkey = Valkey(url=f"{valkey_server.socket_url}?db={database}")
    async with (
        make_node(http=http, valkey=valkey) as one,
        make_node(http=http, valkey=valkey) as two,
        endpoint(one) as here,
        endpoint(two) as there,
    ):
        for waiter, asks in itertools.product((same, other), (here, there)):
            await take(here, {"nonce": first, "lease": 30})
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_take_and_give_back, asks, waiter)
                    while not (await one.locks.show("l")).waiting:
                        await anyio.sleep(0.01)
                    assert (await ask(here, "DELETE", f"/v1/locks/l?nonce={first}"))[0] == 200


async def _take_and_give_back(client: aiohttp.ClientSession, nonce: str) -> None:
    status, lease = await take(client, {"nonce": nonce, "timeout": 60, "lease": 30})
    assert (status, lease["nonce"]) == (200, nonce)
    assert (await ask(client, "DELETE", f"/v1/locks/l?nonce={nonce}"))[0] == 200


async def test_a_nonce_of_the_client_keeps_its_place(
    client: aiohttp.ClientSession, node: forebay.Node
) -> None:
    """D2: it may ask again after its wait, before those who came later."""
    async with node.lock("l"):
        assert (await take(client, {"nonce": NONCE, "timeout": 0.05}))[0] == 423
        assert (await node.locks.show("l")).waiting == 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take, client, {"nonce": OTHER, "timeout": 0.2})
            while (await node.locks.show("l")).waiting < 2:
                await anyio.sleep(0.01)
    assert (await take(client, {"nonce": NONCE, "timeout": 20}))[0] == 200
    assert (await ask(client, "DELETE", f"/v1/locks/l?nonce={OTHER}"))[0] in (200, 409)


async def test_an_endpoint_that_stops_leaves_no_place(node: forebay.Node) -> None:
    """D3: also where the node has no time left for those who wait."""
    async with node.lock("l"), anyio.create_task_group() as tasks:
        async with endpoint(node) as client:

            async def wait() -> None:
                with contextlib.suppress(aiohttp.ClientError):
                    await take(client, {"timeout": 60})

            tasks.start_soon(wait)
            while not (await node.locks.show("l")).waiting:
                await anyio.sleep(0.01)
        assert (await node.locks.show("l")).waiting == 0


async def test_cancelled_at_any_time_nothing_is_left(node: forebay.Node) -> None:
    """D3: hundreds that ask for one lock, cancelled while asking, waiting or having it."""
    coordination, rng, had = coordination_of(node._parts), Random(11), 0
    assert coordination is not None
    desk = coordination.locks

    async def one() -> None:
        nonlocal had
        wish = desk.wish("l", lease=30, timeout=60, meta=None, nonce=None)
        with anyio.move_on_after(rng.uniform(0, 0.1)):
            try:
                await desk.acquire(wish)
                had += 1
                await anyio.sleep(rng.uniform(0, 0.005))
            finally:
                await desk.give_up(wish)

    with desk.listening():
        for _ in range(3):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(one)
    assert 0 < had < 300
    view = await node.locks.show("l")
    assert (view.holders, view.waiting) == ((), 0)


async def test_too_many_waiters_are_turned_away(node: forebay.Node) -> None:
    """429 and a place to come back to later; who does not wait is served all the same."""
    async with node.lock("l"), endpoint(node) as client, anyio.create_task_group() as tasks:
        coordination = coordination_of(node._parts)
        assert coordination is not None
        desk = coordination.locks
        options: dict[str, Any] = {"timeout": 60.0, "lease": 10.0, "meta": None, "nonce": None}
        desk._waiters_max = 1
        tasks.start_soon(desk.acquire, desk.wish("l", **options))
        while not (await node.locks.show("l")).waiting:
            await anyio.sleep(0.01)
        with pytest.raises(LockNotAcquired, match="queue_full"):
            await desk.acquire(desk.wish("l", **options))
        assert (await take(client, {}, "free"))[0] == 200
        tasks.cancel_scope.cancel()
    assert (await node.locks.show("l")).waiting == 0


async def test_a_wait_ends_in_time(client: aiohttp.ClientSession, node: forebay.Node) -> None:
    """423 then; and no place is left of a nonce that nobody can ask for again."""
    async with node.lock("l"):
        status, refused = await take(client, {"timeout": 0.05})
        assert (status, refused["error"]["code"]) == (423, "timed_out")
        assert refused["waited_ms"] >= 50
        assert (await node.locks.show("l")).waiting == 0


async def test_a_client_that_goes_waits_no_more(
    client: aiohttp.ClientSession, node: forebay.Node
) -> None:
    """W1, D3: its place goes at once, and who comes next gets the lock."""
    async with node.lock("l"):
        with anyio.move_on_after(10) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, client, {"timeout": 60})
                while not (await node.locks.show("l")).waiting:
                    await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
        assert not scope.cancelled_caught
        with anyio.fail_after(10):
            while (await node.locks.show("l")).waiting:
                await anyio.sleep(0.01)
    assert (await take(client, {}))[0] == 200


async def test_limits_are_asked(client: aiohttp.ClientSession) -> None:
    """A refusal is a 429 with the fields of the draft; what is reserved is settled once."""
    status, verdict = await ask(client, "POST", "/v1/limits/api/take", {"subject": "u", "cost": 3})
    assert (status, verdict["granted"], verdict["remaining"]) == (200, 3, 2)
    async with client.post("/v1/limits/api/take", json={"subject": "u", "cost": 3}) as response:
        refused = await response.json()
        assert (response.status, refused["error"]["code"]) == (429, "rate_limited")
        assert refused["verdict"]["allowed"] is False
        assert int(response.headers["Retry-After"]) > 3000
        assert response.headers["RateLimit-Policy"] == '"api";q=5;w=18000'
        assert response.headers["RateLimit"].startswith('"api";r=0;t=')
    some = {"subject": "u", "cost": 5, "partial": True}
    assert (await ask(client, "POST", "/v1/limits/api/take", some))[1]["granted"] == 2

    status, held = await ask(client, "POST", "/v1/limits/api/reserve", {"subject": "w", "cost": 5})
    assert (status, held["verdict"]["remaining"]) == (200, 0)
    assert (await ask(client, "POST", "/v1/limits/api/reserve", {"subject": "w"}))[0] == 429
    settling = {"subject": "w", "id": held["id"], "actual": 1}
    assert await ask(client, "POST", "/v1/limits/api/settle", settling) == (200, {"settled": True})
    assert (await ask(client, "POST", "/v1/limits/api/settle", settling))[0] == 404
    _, left = await ask(client, "POST", "/v1/limits/api/take", {"subject": "w"})
    assert left["remaining"] == 3

    _, listed = await ask(client, "GET", "/v1/limits")
    assert [each["name"] for each in listed["limits"]] == ["api", "default"]


BAD: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/v1/locks/", {}, 404, "not_found"),
    ("POST", "/v1/locks/" + "x" * 513, {}, 400, "invalid_key"),
    ("POST", "/v1/locks/a%7Bb%7D", {}, 400, "invalid_key"),
    ("POST", "/v1/locks/a%00", {}, 400, "invalid_key"),
    ("POST", "/v1/locks/%ff", {}, 400, "invalid_key"),
    ("POST", "/v1/locks/free", {"lease": 1.9}, 400, "invalid_lock"),
    ("POST", "/v1/locks/free", {"lease": 30.1}, 400, "invalid_lock"),
    ("POST", "/v1/locks/free", {"timeout": -1}, 400, "invalid_lock"),
    ("POST", "/v1/locks/free", {"timeout": 61}, 400, "invalid_lock"),
    ("POST", "/v1/locks/free", {"nonce": "short"}, 400, "invalid_lock"),
    ("POST", "/v1/locks/free", {"meta": {"m": "x" * 1024}}, 400, "invalid_lock"),
    ("POST", "/v1/locks/free", {"leese": 3}, 400, "wrong_field"),
    ("POST", "/v1/locks/free", {"lease": "3"}, 400, "wrong_field"),
    ("POST", "/v1/locks/free", [], 400, "wrong_field"),
    ("POST", "/v1/locks/held/renew", {"nonce": OTHER}, 409, "not_held"),
    ("POST", "/v1/locks/held/renew", {"nonce": NONCE, "lease": 1}, 400, "invalid_lock"),
    ("POST", "/v1/locks/held/renew", {}, 400, "wrong_field"),
    ("DELETE", f"/v1/locks/held?nonce={OTHER}", None, 409, "not_held"),
    ("DELETE", "/v1/locks/held?nonce=", None, 400, "invalid_lock"),
    ("DELETE", "/v1/locks/held", None, 415, "media_type"),
    ("PATCH", "/v1/locks/held", {}, 405, "method_not_allowed"),
    ("GET", "/v1/locks/a%7B", None, 400, "invalid_key"),
    ("POST", "/v1/limits/nothing/take", {"subject": "u"}, 404, "no_limit"),
    ("POST", "/v1/limits/api/take", {"subject": "u", "cost": 0}, 400, "invalid_limit"),
    ("POST", "/v1/limits/api/take", {"subject": "u", "cost": -1}, 400, "invalid_limit"),
    ("POST", "/v1/limits/api/take", {"subject": "u", "cost": 6}, 400, "invalid_limit"),
    ("POST", "/v1/limits/api/take", {"subject": "u", "cost": 1.5}, 400, "wrong_field"),
    ("POST", "/v1/limits/api/take", {"subject": ""}, 400, "invalid_key"),
    ("POST", "/v1/limits/api/take", {"subject": "a{b"}, 400, "invalid_key"),
    ("POST", "/v1/limits/api/take", {}, 400, "wrong_field"),
    ("POST", "/v1/limits/api/reserve", {"subject": "u", "ttl": 0}, 400, "invalid_limit"),
    ("POST", "/v1/limits/api/reserve", {"subject": "u", "cost": 0}, 400, "invalid_limit"),
    (
        "POST",
        "/v1/limits/api/settle",
        {"subject": "u", "id": "0" * 32, "actual": 1},
        404,
        "unknown_reservation",
    ),
    (
        "POST",
        "/v1/limits/api/settle",
        {"subject": "u", "id": "forged", "actual": 1},
        404,
        "unknown_reservation",
    ),
]


async def test_bad_input_is_refused_and_changes_nothing(
    client: aiohttp.ClientSession, node: forebay.Node
) -> None:
    """Each has a status, a code and a reason; the locks and the limit are as they were."""
    await take(client, {"nonce": NONCE, "lease": 30}, "held")
    for method, path, body, status, code in BAD:
        told = await ask(client, method, path, body)
        assert (told[0], told[1]["error"]["code"]) == (status, code), (path, body, told)
        assert told[1]["error"]["problem"]
    async with client.post("/v1/locks/free", data=b"{}") as response:
        assert response.status == 415
    async with client.post("/v1/locks/free", data=b'{"lease"', headers=JSON) as response:
        assert response.status == 400
    async with client.post(
        "/v1/locks/free", data=io.BytesIO(bytes(10_000_000)), headers=JSON
    ) as response:
        assert response.status == 413

    (held,) = await node.locks.list()
    assert (held.name, len(held.holders), held.waiting) == ("held", 1, 0)
    assert (await node.limit("api").peek("u")).remaining == 5


async def test_a_token_guards_whatever_changes_anything(
    node: forebay.Node, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B1, B2: without it nothing is read, not even 10 MB; to look is free."""
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    async with endpoint(node, token_file=str(path)) as client:
        for headers in (
            {},
            {"Authorization": "Bearer " + TOKEN[:-1] + "0"},
            {"Authorization": "Bearer " + TOKEN + "0"},
            {"Authorization": "Basic " + TOKEN},
            {"Authorization": "Bearer é"},
            {"Authorization": "Bearer"},
        ):
            for method, where in (
                ("POST", "/v1/locks/l"),
                ("DELETE", "/v1/locks/l?nonce=x"),
                ("POST", "/v1/events"),
                ("POST", "/%761/locks/l"),
                ("POST", "/v1/limits/api/take"),
                ("POST", "/v1/not/there/yet"),
                ("GET", "/v1/locks"),
                ("GET", "/v1/cache/a"),
            ):
                async with client.request(method, where, json={}, headers=headers) as response:
                    assert (response.status, where) == (401, where)
                    assert response.headers["WWW-Authenticate"].startswith('Bearer realm="forebay"')
                    assert (await response.json())["error"]["code"] == "unauthorized"
        async with client.post(
            "/v1/locks/l", data=io.BytesIO(bytes(10_000_000)), headers=JSON
        ) as response:
            assert response.status == 401
        right = {"Authorization": f"bearer {TOKEN}"}
        assert (await ask(client, "GET", "/v1/locks", **right))[1] == {"locks": []}
        async with client.get("/livez") as response:
            assert response.status == 200
        assert (await ask(client, "POST", "/v1/locks/l", {}, **right))[0] == 200
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err


async def test_a_token_file_without_a_token_is_refused(node: forebay.Node, tmp_path: Path) -> None:
    """At the start: nothing listens then without the token that was meant."""
    spoilt = tmp_path / "token"
    spoilt.write_text("short\n")
    for path in (spoilt, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"http\.token_file"):
            async with endpoint(node, token_file=str(path)):
                pass


async def test_a_node_without_the_role_has_no_such_routes(make_node: MakeNode) -> None:
    """Unset, a node that does no work of the cluster has not the role."""
    async with make_node() as node, endpoint(node) as client:
        assert (await take(client, {}))[0] == 404
        assert "/v1/locks" not in await (await client.get("/")).text()
