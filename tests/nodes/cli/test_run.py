"""`forebay run` as a process: how it ends, and what it says when it cannot begin."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import MakeServer
from forebay.nodes.cli.run import load_app
from forebay.schemas.errors import ConfigError
from support.eventually import wait_until
from support.node_process import NodeProcess, Shop
from support.valkey_server import ValkeyServer, free_port

APPS = {
    "wrong_name.py": "import nowhere",
    "wrong_syntax.py": "node = (",
    "wrong_code.py": "node = 1 / 0",
    "wrong_kind.py": "node = 42",
    "wrong_factory.py": "def node():\n    raise RuntimeError('no\\nconfig')",
    "wrong_ttl.py": (
        "import forebay\nnode = forebay.Node()\n"
        "@node.cached('a:{b}', ttl=-1)\nasync def a(b: int) -> int: ..."
    ),
    "well.py": (
        "import forebay\n"
        "class app:\n    node = forebay.Node('well')\n"
        "def make():\n    return forebay.Node('made')"
    ),
}


@pytest.fixture
def shop(valkey_server: ValkeyServer, tmp_path: Path, namespace: str) -> Iterator[Shop]:
    quick = {"workers__ownership_ttl_ms": 1_000, "workers__beat_ms": 200}
    with Shop(tmp_path, namespace, valkey__url=valkey_server.url, **quick) as shop:
        yield shop


def only_error(node: NodeProcess) -> str:
    """The one line for people, of a process that has ended without a traceback."""
    said = node.said()
    errors = re.findall(r"^Error: (.*)$", said, re.MULTILINE)
    assert len(errors) == 1, said
    assert said.rstrip().endswith(errors[0])
    assert "Traceback" not in said
    return str(errors[0])


def refused(directory: Path, **options: object) -> tuple[int, str]:
    """The exit code and the line of a node that cannot start."""
    node = NodeProcess(directory, **options)  # type: ignore[arg-type]
    try:
        code = node.spawn().wait()
    finally:
        node.close()
    return code, only_error(node)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_one_signal_drains_and_exits_0(shop: Shop, number: signal.Signals) -> None:
    """P1: after a drain that was finished the exit code is 0, and the log tells its stages."""
    node = shop.node().start()
    node.signal(number)

    assert node.wait() == 0
    assert node.event("node.draining")["signal"] == number.name
    assert node.event("node.stopped")["drained"] is True
    assert "Traceback" not in node.said()


def test_drain_that_takes_too_long_exits_4(shop: Shop) -> None:
    """P1: what a hanging sink did not take is left to others, and the exit code says so."""
    node = shop.node(sink="hang", workers__drain_ms=200).start()
    node.post({"type": "write", "key": "product:1", "value": {"id": 1, "price": 5}})
    wait_until(lambda: shop.sink_reached, what="the write in the sink")

    assert node.stop() == 4
    assert node.event("node.stopped")["drained"] is False

    successor = shop.node("successor").start()
    wait_until(lambda: shop.stored() == {"product:1": 5}, what="the write in the successor's sink")
    assert successor.stop() == 0


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"http__prot": 1}, ("http.prot", "flag --set http.prot", "did you mean http.port?")),
        ({"http__port": 70_000}, ("http.port = 70000", "from 0 to 65535")),
        ({"node__namespace": "a b"}, ("node.namespace = a b", "letters, digits")),
        ({"valkey__url": "http://x"}, ("valkey.url = http://x", "use one of valkey, valkeys")),
    ],
)
def test_settings_that_cannot_be_used_exit_2(
    tmp_path: Path, settings: dict[str, object], words: tuple[str, ...]
) -> None:
    """P4: the line names the setting, its value, where it came from, and the fix."""
    code, line = refused(tmp_path, **settings)

    assert code == 2
    assert [word for word in words if word not in line] == []


def test_unknown_key_in_the_file_exits_2(tmp_path: Path) -> None:
    """P4: the same for forebay.toml, which is named."""
    (tmp_path / "forebay.toml").write_text("[workers]\ndrain = 5\n")
    code, line = refused(tmp_path)

    assert code == 2
    assert "workers.drain" in line
    assert "file forebay.toml" in line
    assert "did you mean workers.drain_ms?" in line


def test_port_in_use_exits_2(shop: Shop) -> None:
    """P4: another process has the port: exit 2, and what to set instead."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        node = shop.node(http__port=port).spawn()

        assert node.wait() == 2
    line = only_error(node)
    assert line.startswith(f"http.port = {port} (from flag --set http.port): another process")
    assert "set a free port" in line


def test_closed_port_exits_3(tmp_path: Path) -> None:
    """Nobody listens: exit 3, with the address, its origin and the fix."""
    url = f"valkey://127.0.0.1:{free_port()}"
    limits = {"valkey__startup_timeout_ms": 200, "valkey__connect_timeout_ms": 200}
    code, line = refused(tmp_path, valkey__url=url, **limits)

    assert code == 3
    assert line.startswith(f"valkey.url = {url}/0 (from flag --set valkey.url): not reached within")
    assert line.endswith("start the server, or correct host and port")


@pytest.mark.parametrize("password", ["", "s3cret-wrong"], ids=["none", "wrong"])
def test_wrong_password_exits_3(make_server: MakeServer, tmp_path: Path, password: str) -> None:
    """The server does not let us in: exit 3; whatever password was given is masked."""
    server = make_server(config={"requirepass": "right"})
    code, line = refused(
        tmp_path, valkey__url=server.url, environ={"VALKEY_PASSWORD": password} if password else {}
    )

    assert code == 3
    expected = "*** (from environment VALKEY_PASSWORD)" if password else "(not set) (from default)"
    assert line.startswith(f"valkey.password = {expected}: 127.0.0.1:{server.port}: ")
    assert "s3cret" not in line


def test_namespace_born_with_other_shards_exits_2(shop: Shop) -> None:
    """A node that would cut the namespace otherwise does not start."""
    assert shop.node().start().stop() == 0
    node = shop.node("other", node__shards=8).spawn()

    assert node.wait() == 2
    assert only_error(node).startswith("node.shards = 8 (from flag --set node.shards): ")
    assert "was created with 64; set node.shards = 64" in only_error(node)


def test_a_full_server_does_not_keep_a_node_from_starting(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """Its workers empty the streams; and it ends in order."""
    server = make_server(config={"maxmemory": "1"})
    node = NodeProcess(tmp_path, valkey__url=server.url).spawn()
    try:
        wait_until(lambda: node.event("node.started"), what="node.started")
        assert node.stop() == 0
    finally:
        node.close()


def test_embedded_server_that_dies_takes_the_node_with_it(tmp_path: Path) -> None:
    """P3: without its server a node of one is of no use: exit 1, and why."""
    node = NodeProcess(tmp_path, workers__drain_ms=1_000, valkey__command_timeout_ms=200)
    with node:
        os.kill(node.event("server.started")["pid"], signal.SIGKILL)

        assert node.wait() == 1
    assert only_error(node) == "the embedded valkey-server ended by itself; its log says why"


def test_app_that_is_not_there_exits_2(tmp_path: Path) -> None:
    """P4: also for --app, in a whole process."""
    code, line = refused(tmp_path, app="no.such:thing")

    assert code == 2
    assert line.startswith("--app = no.such:thing (from the command line or FOREBAY_APP): ")
    assert line.endswith("such as shop.cache:node")


@pytest.fixture
def apps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in APPS.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("apps")
@pytest.mark.parametrize(
    "target,problem",
    [
        ("nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("well:missing", "has no attribute 'missing'"),
        ("well:app.missing", "has no attribute 'missing'"),
        (":node", "Empty module name"),
        ("wrong_name", "No module named 'nowhere' (*wrong_name.py, line 1)"),
        ("wrong_syntax", "SyntaxError: '(' was never closed"),
        ("wrong_code", "ZeroDivisionError: division by zero (*wrong_code.py, line 1)"),
        ("wrong_kind", "it is a int, not a node"),
        ("wrong_factory", "RuntimeError: no config (*wrong_factory.py, line 2)"),
    ],
)
def test_app_that_gives_no_node_is_explained(target: str, problem: str) -> None:
    """P4: what is wrong, and in which line of the application, in one line."""
    with pytest.raises(ConfigError) as caught:
        load_app(target)

    pattern = ".*".join(map(re.escape, problem.split("*")))
    assert re.search(pattern, caught.value.problem), caught.value.problem
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("apps")
def test_declaration_that_cannot_work_is_told_as_it_is() -> None:
    """P4: an error of ours in the application keeps its setting and its fix."""
    with pytest.raises(ConfigError) as caught:
        load_app("wrong_ttl")

    assert (caught.value.setting, caught.value.value) == ("ttl", "-1")


@pytest.mark.usefixtures("apps")
@pytest.mark.parametrize("target,namespace", [("well:app.node", "well"), ("well:make", "made")])
def test_app_is_an_attribute_or_what_a_function_returns(target: str, namespace: str) -> None:
    """module:attribute, with dots; a callable without arguments is called."""
    assert repr(load_app(target)) == f"<Node {namespace} - not running>"
