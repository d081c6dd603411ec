"""The display of `forebay dev`."""

from __future__ import annotations

import io
import socket
from typing import Any, cast

import pytest

from forebay.nodes.dev import view
from forebay.nodes.dev.processes import free_ports
from forebay.nodes.dev.scene import NodeScene, Scene
from forebay.nodes.dev.session import Session


def test_the_table_shows_states_without_markup() -> None:
    """The console prints notes, and the table with them, without interpreting markup."""
    console_module = pytest.importorskip("rich.console")
    live_module = pytest.importorskip("rich.live")
    nodes = [NodeScene(name="node-1", url="u", up=True), NodeScene(name="node-2", url="u")]
    written = io.StringIO()
    console = console_module.Console(
        file=written, force_terminal=True, no_color=True, highlight=False, width=100
    )
    with live_module.Live(console=console, auto_refresh=False) as live:
        live.update(view._table(Scene(nodes=nodes)), refresh=True)
        console.print("a [note]", markup=False)
    assert "ready" in written.getvalue()
    assert "down" in written.getvalue()
    assert "[green]" not in written.getvalue()
    assert "a [note]" in written.getvalue()


def test_a_port_in_use_is_reported_with_its_replacement() -> None:
    """A note names the port in use and the port that replaces it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        session = cast(Any, Session.__new__(Session))
        session.scene = Scene()
        session._plan = cast(Any, type("Plan", (), {"port": first, "nodes": 1}))
        (got,) = session._ports()
    assert list(session.scene.notes) == [f"port {first} is in use: node-1 listens on {got} instead"]
    session._plan.port = 0
    assert len(session._ports()) == 1
    assert len(session.scene.notes) == 1
    assert len(free_ports(0, 2)) == 2
