"""Limits on a running node: nodes/limits.py, and what a node says of them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay.nodes.cli.sources import load
from forebay.schemas.errors import ConfigError, InvalidKey
from forebay.schemas.errors_limits import InvalidLimit
from forebay.schemas.limits import Limit
from forebay.schemas.settings import Limiter
from support.eventually import until, wait_until
from support.node_process import Shop
from support.valkey_server import ValkeyServer

MakeNode = Callable[..., forebay.Node]


async def test_a_limit_is_declared_and_asked(make_node: MakeNode) -> None:
    """The whole surface, once."""
    node = make_node()
    api = node.limit("api", rate=1, per=60, burst=10, concurrency=1)
    async with node:
        assert (await api.take("ann", 4)).remaining == 6
        assert (await api.take("ann", 9, partial=True)).granted == 6
        assert (await api.refund("ann", 3)).remaining == 3
        assert (await api.peek("ann", 4)).allowed is False
        assert (await api.force("ann", 4)).allowed
        assert (await api.take("bob", within="team")).allowed
        held = await api.reserve("cid", 2)
        await held.settle(5)
        with pytest.raises(forebay.UnknownReservation):
            await api.settle("cid", held.id, 5)
        assert (await api.peek("cid")).remaining == 5
        async with api.slot("ann"):
            with pytest.raises(forebay.RateLimited):
                async with api.slot("ann"):
                    pass
        both = node.limits("api", "default")
        with pytest.raises(InvalidLimit, match="slot of each"):
            both.slot("ann")
        assert (await both.take("dan", {"api": 2, "default": 100})).allowed
        assert (await both.take("dan")).limit == "default"
        assert node.limit("api") is api


async def test_two_nodes_share_a_limit_and_hear_of_refunds(make_node: MakeNode) -> None:
    """F3: by the pubsub, what one gives back the other may grant."""
    one, other = make_node(), make_node()
    here, there = (each.limit("api", rate=0.01, burst=5) for each in (one, other))
    async with one, other:
        await until(lambda: one._parts.limiter.state.hears and other._parts.limiter.state.hears)
        assert (await here.take("x", 5)).allowed
        assert not (await there.take("x")).allowed
        assert (await there.take("x")).source == "deny_cache"
        await here.refund("x", 2)

        async def granted() -> bool:
            return (await there.take("x")).allowed

        await until(granted)


async def test_outside_a_running_node_nobody_is_asked(make_node: MakeNode) -> None:
    """H3: before, and after."""
    node = make_node()
    api = node.limit("api", rate=1)
    for _ in range(2):
        with pytest.raises(forebay.ForebayError, match="not running"):
            await api.take("x")
        async with node:
            assert (await api.peek("x")).allowed


async def test_bad_limits_are_refused_where_they_are_declared(make_node: MakeNode) -> None:
    """And one that nobody defined, when the node starts; a set of twins, too."""
    node = make_node()
    with pytest.raises(InvalidLimit):
        node.limit("api", rate=-1)
    with pytest.raises(InvalidKey):
        node.limit("a:b", rate=1)
    async with node:
        for names in (("nobody",), (), ("default", "default")):
            with pytest.raises(InvalidLimit):
                node.limits(*names)
        assert node.limit("late", rate=3).limits[0].burst == 3
    node = make_node()
    node.limit("nobody")
    with pytest.raises(InvalidLimit, match="nobody"):
        async with node:
            pytest.fail("it must not start")


async def test_settings_go_before_the_code(make_node: MakeNode) -> None:
    """H1."""
    named = (Limit(name="api", rate=2), Limit(name="more", rate=3))
    node = make_node(limiter=Limiter(max_tokens=4, named=named))
    api = node.limit("api", rate=100)
    async with node:
        assert [each.rate for each in api.limits] == [2]
        assert node.limit("more").limits[0].rate == 3
        assert node.limit().limits[0].burst == 4
        node.limit("api", rate=50)
        assert [each.rate for each in api.limits] == [2]


def configured(path: Path, server: ValkeyServer, namespace: str) -> tuple[forebay.Node, Any]:
    def again() -> Any:
        environ = {"FOREBAY_URL": server.socket_url, "FOREBAY_NAMESPACE": namespace}
        return load(str(path), {}, environ=environ)

    node = forebay.Node()
    node._configure(again(), again)
    return node, again


async def test_limits_are_reloaded_and_keep_their_debts(
    tmp_path: Path, valkey_server: ValkeyServer, namespace: str
) -> None:
    """H2: live; a file that cannot be used changes nothing."""
    path = tmp_path / "forebay.toml"
    path.write_text("[limits.api]\nrate = 1\nper = 3600\nburst = 10\n")
    node, _ = configured(path, valkey_server, namespace)
    api = node.limit("api", rate=99)
    async with node:
        assert (await api.take("x", 10)).allowed
        assert not (await api.take("x")).allowed
        path.write_text("[limits.api]\nrate = 1\nper = 3600\nburst = 15\n")
        assert node.reload_limits() == ["api"]
        assert node.reload_limits() == []
        assert (await api.take("x", 5)).allowed
        assert not (await api.take("x")).allowed
        path.write_text("[limits.api]\nrate = 0\n")
        with pytest.raises(ConfigError, match=r"limits\.api\.rate"):
            node.reload_limits()
        assert api.limits[0].burst == 15
        path.write_text("")
        assert node.reload_limits() == ["api"]
        assert api.limits[0].rate == 99
    with pytest.raises(forebay.ForebayError):
        node.reload_limits()


async def test_metrics_tell_who_decided(make_node: MakeNode) -> None:
    """By limit, source and result; shadows, and tokens in hand."""
    node = make_node()
    api = node.limit("api", rate=0.01, burst=3)
    shadow = node.limit("dark", rate=0.01, burst=1, shadow=True)
    leased = node.limit("fast", rate=1_000, burst=1_000, lease=True)
    async with node:
        await until(lambda: node._parts.limiter.state.hears)
        for _ in range(5):
            await api.take("x")
            assert (await shadow.take("x")).allowed
        await leased.take("x")
        await until(lambda: node.registry.get_sample_value("forebay_limiter_leased_tokens",
                                                          {"limit": "fast"}) > 0)  # fmt: skip

        def decided(limit: str, source: str, result: str) -> float | None:
            labels = {"limit": limit, "source": source, "result": result}
            return node.registry.get_sample_value("forebay_limiter_decisions_total", labels)

        assert decided("api", "server", "allowed") == 3
        assert decided("api", "server", "refused") == 1
        assert decided("api", "deny_cache", "refused") == 1
        assert decided("dark", "server", "allowed") == 5
        assert node.registry.get_sample_value(
            "forebay_limiter_shadow_refused_total", {"limit": "dark"}
        ) == 4  # fmt: skip


def test_a_hangup_reloads(tmp_path: Path, valkey_server: ValkeyServer, namespace: str) -> None:
    """`forebay run` reads its limits anew on SIGHUP, also if they cannot be used."""
    config = tmp_path / "forebay.toml"
    config.write_text("[limits.api]\nrate = 1\n")
    with Shop(tmp_path, namespace, valkey__url=valkey_server.url) as shop:
        node = shop.node().start()
        config.write_text("[limits.api]\nrate = 2\n")
        node.signal(signal.SIGHUP)
        assert wait_until(lambda: node.event("limits.reloaded"))["changed"] == ["api"]
        config.write_text("[limits.api]\nrate = -2\n")
        node.signal(signal.SIGHUP)
        assert "rate" in wait_until(lambda: node.event("limits.not_reloaded"))["reason"]
        wait_until(lambda: node.get("/readyz").status == 200, what="readiness")
        assert node.stop() == 0


def test_a_changed_file_is_read(
    tmp_path: Path, valkey_server: ValkeyServer, namespace: str
) -> None:
    """`forebay run` sees that it is another, without a signal; also if it is replaced."""
    config = tmp_path / "forebay.toml"
    config.write_text("[limits.api]\nrate = 1\n")
    with Shop(tmp_path, namespace, valkey__url=valkey_server.url) as shop:
        node = shop.node().start()
        config.write_text("[limits.api]\nrate = -2\n")
        assert "rate" in wait_until(lambda: node.event("limits.not_reloaded"))["reason"]
        aside = tmp_path / "new"
        aside.write_text("[limits.api]\nrate = 2\n")
        aside.rename(config)
        assert wait_until(lambda: node.event("limits.reloaded"))["changed"] == ["api"]
        assert node.stop() == 0


async def test_nodes_that_do_no_work_share_limits_too(make_node: MakeNode) -> None:
    """MemberCount N1: whoever listens for refunds is a member, also without workers."""
    one, other = make_node(), make_node()
    async with one, other:
        assert one._parts.crew is None

        async def both() -> bool:
            await one._parts.member_count.look()
            return one._parts.members() == 2

        await until(both)
