"""That the contract was kept by the servers that it is meant for, and not by fewer."""

from __future__ import annotations

import pytest

from conftest import require
from forebay.coordinator.valkey.backend import Backend, UseFake, UseUrl
from support.scripts import Desk
from support.valkey_server import Flavour

FLAVOURS: tuple[Flavour, ...] = ("valkey", "redis7")


async def test_each_flavour_is_what_it_is_called(backend: Backend, backend_flavour: str) -> None:
    """A contract that ran three times on one server would prove a third of what it says."""
    expected = {"valkey": "valkey", "fake": "fakeredis", "redis7": "redis"}
    assert backend.facts.kind == expected[backend_flavour]
    assert isinstance(backend.choice, UseFake if backend_flavour == "fake" else UseUrl)
    if backend_flavour == "redis7":
        assert backend.facts.version.startswith("7.0.")


async def test_desks_do_not_see_each_other(desk: Desk, backend: Backend) -> None:
    """Each test has a namespace of its own, though they share a server."""
    await desk.put()
    assert await desk.everything()
    assert not await Desk(backend.link, desk.names.namespace[::-1]).everything()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("ci", ["true", "1", "True"])
def test_ci_fails_where_a_server_is_missing(
    monkeypatch: pytest.MonkeyPatch, flavour: Flavour, ci: str
) -> None:
    """There, a skipped test would look like one that passed."""
    monkeypatch.setitem(require.__globals__, "program", lambda flavour: None)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(pytest.fail.Exception, match=flavour):
        require(flavour)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_elsewhere_the_test_is_skipped_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, flavour: Flavour
) -> None:
    """Whoever lacks one server can still test on the others."""
    monkeypatch.setitem(require.__globals__, "program", lambda flavour: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="install"):
        require(flavour)
