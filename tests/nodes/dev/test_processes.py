"""Child processes and clusters of `forebay dev`, with a small program in place of a node."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import anyio
import pytest

from forebay.nodes.dev.processes import Cluster, free_ports
from forebay.nodes.dev.scene import Backlog
from forebay.schemas.errors import ProcessFailed

STAND_IN = """
import http.server, os, signal, subprocess, sys, time
mode, port = sys.argv[1], int(sys.argv[3])
if mode == "dies":
    print("there is no such server", file=sys.stderr)
    sys.exit(3)
if mode == "has-child":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if mode == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "never-ready" else 200)
        self.end_headers()
        self.wfile.write(b'{"backlog": {"events": 3, "writes": 4}, "more": 1}')
    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""


def cluster_of(directory: Path, mode: str, *, nodes: int = 2, ready_limit_s: float = 20) -> Cluster:
    program = directory / "stand_in.py"
    program.write_text(STAND_IN)
    return Cluster(
        [sys.executable, str(program), mode],
        ports=free_ports(0, nodes),
        environ=dict(os.environ),
        directory=directory,
        ready_limit_s=ready_limit_s,
        drain_limit_s=10 if mode != "hangs" else 0.2,
    )


def assert_nothing_left(cluster: Cluster) -> None:
    for node in cluster.nodes:
        assert node.child.groups_alive() == []
        assert node.child.pid == 0


def test_ports_are_the_wanted_ones_or_others_where_taken() -> None:
    """A port in use is replaced; the other ports are not."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        ports = free_ports(first, 1)
        free = free_ports(0, 3)

    assert ports != [first]
    assert free_ports(first, 1) == [first]
    assert len(set(free)) == 3


async def test_nodes_are_ready_inside_and_gone_afterwards(tmp_path: Path) -> None:
    """I5, I7: every node responds inside the block, then gets SIGTERM and exits with 0."""
    async with cluster_of(tmp_path, "obeys") as cluster:
        await cluster.observe()
        scenes = [node.scene for node in cluster.nodes]
        assert [scene.up for scene in scenes] == [True, True]
        assert [scene.backlog for scene in scenes] == [Backlog(events=3, writes=4)] * 2

    assert [node.child.exits for node in cluster.nodes] == [[0], [0]]
    assert_nothing_left(cluster)


async def test_a_node_that_exits_at_start_is_reported_with_its_log(tmp_path: Path) -> None:
    """I6: the error contains the end of the log and the exit code for a missing backend."""
    cluster = cluster_of(tmp_path, "dies")
    with pytest.raises(ProcessFailed, match="node-1 exited with 3") as failed:
        async with cluster:
            pytest.fail("the block was entered")

    assert failed.value.said == "there is no such server"
    assert failed.value.exit_code == 3
    assert_nothing_left(cluster)


async def test_a_node_that_is_never_ready_is_reported_in_time(tmp_path: Path) -> None:
    """I6: the wait for readiness is bounded, and the nodes are stopped afterwards."""
    cluster = cluster_of(tmp_path, "never-ready", ready_limit_s=0.5)
    with pytest.raises(ProcessFailed, match="not ready within") as failed:
        async with cluster:
            pytest.fail("the block was entered")

    assert failed.value.exit_code == 1
    assert_nothing_left(cluster)


async def test_a_killed_node_comes_back_at_its_port(tmp_path: Path) -> None:
    """I4: after SIGKILL and a restart both exit codes are recorded, and the address is the same."""
    async with cluster_of(tmp_path, "obeys") as cluster:
        first, _ = cluster.nodes
        before = first.child.pid
        await cluster.kill_and_restart(first, after_s=0)
        response = await cluster.get(first, "/readyz")
        assert first.child.pid != before
        assert response is not None
        assert response.status == 200

    assert [node.child.exits for node in cluster.nodes] == [[-9, 0], [0]]


async def test_a_node_that_hangs_is_killed(tmp_path: Path) -> None:
    """I2, I7: a node that ignores SIGTERM for the drain limit gets SIGKILL."""
    async with cluster_of(tmp_path, "hangs", nodes=1) as cluster:
        pass

    assert cluster.nodes[0].child.exits == [-9]
    assert_nothing_left(cluster)


async def test_the_children_of_a_node_are_killed_with_it(tmp_path: Path) -> None:
    """I2: the whole process group of a node is killed."""
    async with cluster_of(tmp_path, "has-child", nodes=1) as cluster:
        pass

    with anyio.fail_after(5):
        while cluster.nodes[0].child.groups_alive():
            await anyio.sleep(0.01)
    assert cluster.nodes[0].child.exits == [0]


async def test_cancelled_while_starting_nothing_is_left(tmp_path: Path) -> None:
    """A cancellation before the nodes are ready stops all started nodes."""
    cluster = cluster_of(tmp_path, "never-ready")
    with anyio.move_on_after(0.4):
        async with cluster:
            pytest.fail("the block was entered")

    # SIGTERM ends the program before it has installed its handler.
    assert all(node.child.exits in ([0], [-15]) for node in cluster.nodes)
    assert_nothing_left(cluster)
