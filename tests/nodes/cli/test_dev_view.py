"""What `forebay dev` shows."""

from __future__ import annotations

import io
import socket
from typing import Any, cast

import pytest

from forebay.nodes.cli import dev_view
from forebay.nodes.demo.cluster import free_ports
from forebay.nodes.demo.scene import NodeScene, Scene
from forebay.nodes.demo.session import Session


def test_state_of_a_node_is_a_word_also_when_a_note_goes_by() -> None:
    """Notes are printed without markup, and the table is printed anew with them."""
    console_module = pytest.importorskip("rich.console")
    live_module = pytest.importorskip("rich.live")
    nodes = [NodeScene(name="node-1", url="u", up=True), NodeScene(name="node-2", url="u")]
    written = io.StringIO()
    console = console_module.Console(
        file=written, force_terminal=True, no_color=True, highlight=False, width=100
    )
    with live_module.Live(console=console, auto_refresh=False) as live:
        live.update(dev_view._table(Scene(nodes=nodes)), refresh=True)
        console.print("a [note]", markup=False)
    assert "ready" in written.getvalue()
    assert "down" in written.getvalue()
    assert "[green]" not in written.getvalue()
    assert "a [note]" in written.getvalue()


def test_port_that_is_taken_is_told_with_the_one_in_its_place() -> None:
    """Or one waits for an answer from somebody else."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        session = cast(Any, Session.__new__(Session))
        session.scene = Scene()
        session._plan = cast(Any, type("Plan", (), {"port": first, "nodes": 1}))
        (got,) = session._ports()
    assert list(session.scene.notes) == [f"port {first} is taken: node-1 listens on {got} instead"]
    session._plan.port = 0
    assert len(session._ports()) == 1
    assert len(session.scene.notes) == 1
    assert len(free_ports(0, 2)) == 2
