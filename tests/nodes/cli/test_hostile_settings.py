"""Hostile configuration and command lines: each is refused with its setting, or has no effect.

Where an event loop is involved, on asyncio's and on uvloop's.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec
import pytest
import uvloop
from click.testing import CliRunner, Result

import forebay
from forebay.nodes.cli.main import COMMANDS, Invocation, main, root
from forebay.nodes.cli.reloads import watch
from forebay.nodes.cli.sources import load
from forebay.nodes.logs import configure_logs
from forebay.nodes.sinks.sql import SqlSink
from forebay.schemas.settings import Http, Log, NodeSettings, Settings, Valkey, Workers
from forebay.schemas.settings_names import FIELDS
from support.eventually import wait_until
from support.node_process import environ
from support.valkey_server import ValkeyServer

Run = Callable[[Coroutine[Any, Any, None]], None]
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\nError: forged"
WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; "
PROGRAM = "from forebay.nodes.cli.main import main; main(sys.argv[1:])"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def on_loop(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end in a loop of this kind."""

    def run(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main)

    return run


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no settings in the environment."""
    for name in set(os.environ) - set(environ()):
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def forebay_(alone: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The command, as from a shell."""

    def run(*words: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(words)
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


def command(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(root, words, env=environment, obj=Invocation())


def check(*words: str, **environment: str) -> Result:
    return command("config", "check", *words, **environment)


def refused(said: str, *words: str, file: str = "", **environment: str) -> str:
    """The error: exit 2 and one line with these words, from flags, file or environment."""
    if file:
        Path("forebay.toml").write_text(file)
    ended = check(*words, **environment)
    assert (ended.exit_code, ended.stdout) == (2, ""), ended.output
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1 or ended.stderr.startswith("Usage: ")
    return ended.stderr


def settings(server: ValkeyServer, **sections: Any) -> Settings:
    return Settings(valkey=Valkey(url=server.socket_url), **sections)


@pytest.mark.usefixtures("alone")
def test_64_an_unknown_key() -> None:
    """In flag, environment and file, with the nearest that exists."""
    assert refused("did you mean http.port?", "--set", "http.prot=1")
    assert refused("did you mean FOREBAY_HTTP__PORT?", FOREBAY_HTTP__PROT="1")
    assert refused("did you mean http.port?", file="[http]\nprot = 1")
    assert refused("valkey.url = (a table)", file="[valkey.url]\nx = 1")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "file",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nhttp: *c\n",
        "!!python/object/apply:os.system ['touch owned']",
        "a = " + "[" * 200_000,
        "a = " + "{a=" * 100_000,
        "[" + "a." * 200_000 + "a]",
        "a = 1" + "0" * 100_000,
        'node = "x"\n' * 40_000,
        "\ufeff\x00",
    ],
    ids=["yaml alias", "yaml tag", "arrays", "tables", "dotted", "digits", "twice", "nul"],
)
def test_65_a_file_that_is_a_bomb(file: str) -> None:
    """No YAML is read, and what is not TOML costs no memory, and no time worth telling."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path("bomb.toml").write_text(file)
    ended = check("--config", "bomb.toml")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("Error: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert not Path("owned").exists()


@pytest.mark.usefixtures("alone")
def test_66_ports() -> None:
    """Out of range, or text in a file, which is no number there; a flag is text anyway."""
    for port in ("70000", "-1", "80.5", "0x50", "٨٠", "7e4", "nan", ""):
        refused("http.port", "--set", f"http.port={port}")
    refused('http.port = "80"', file='[http]\nport = "80"')
    Path("forebay.toml").unlink()
    refused("valkey.url", "--url", "valkey://h:0")
    refused("valkey.url", "--url", "valkey://h:70000")
    assert check("--set", "http.port=80").exit_code == 0


def test_66_port_0_is_any_free_one(
    on_loop: Run, valkey_server: ValkeyServer, namespace: str
) -> None:
    """Two nodes on one machine get two; a port that is taken is named."""

    async def serve() -> None:
        given = settings(valkey_server, http=Http(port=0))
        one = forebay.Node(namespace, settings=given)
        async with one, one.serving() as url, one.serving() as other:
            assert url != other
            port = int(url.rpartition(":")[2])
            taken = forebay.Node(namespace, settings=settings(valkey_server, http=Http(port=port)))
            async with taken:
                with pytest.raises(forebay.ConfigError, match=r"another process listens there"):
                    async with taken.serving():
                        pass

    on_loop(serve())


@pytest.mark.usefixtures("alone")
def test_67_sizes_that_are_negative_or_absurd(tmp_path: Path) -> None:
    """Of pools, bounds and times, in settings and in arguments of a sink."""
    for name, field in FIELDS.items():
        if type(field.default) in (int, float):
            refused(name, "--set", f"{name}=-1")
            refused(name, "--set", f"{name}={10**30}")
    for wrong in (-1, 0, 10**9, True, "5", 1.5, None):
        for name in ("pool_size", "statement_timeout_ms", "lock_timeout_ms"):
            with pytest.raises(forebay.ConfigError, match=rf"{name} = .* must be a whole number"):
                SqlSink(f"sqlite:///{tmp_path}/x.db", table="t", **{name: wrong})  # type: ignore[arg-type]


@pytest.mark.usefixtures("alone")
def test_68_a_lease_of_less_than_three_beats() -> None:
    """One lost beat and a late one would lose the shards."""
    for lease_ms, beat_ms in ((1_000, 334), (2_999, 1_000), (60_000, 20_001)):
        words = [f"workers.ownership_ttl_ms={lease_ms}", f"workers.beat_ms={beat_ms}"]
        refused("workers.", "--set", words[0], "--set", words[1])
    assert check("--set", "workers.beat_ms=1333").exit_code == 0


@pytest.mark.usefixtures("alone")
def test_69_a_password_in_a_url_is_not_printed(forebay_: Callable[..., Ended]) -> None:
    """Neither by ``config show``, nor by an error that repeats what was typed."""
    url = "valkey://app:hunter2hunter2@h:1/0"
    shown = forebay_("config", "show", "--url", url)
    assert shown.code == 0
    assert "hunter2" not in shown.out + shown.err
    for words in (
        ["config", "show", url],
        [url],
        ["run", "--port", url],
        ["health", "--check", url],
        ["run", "--app", url.replace("valkey", "nowhere")],
        ["config", "check", "--url", url + "/1"],
        ["config", "check", "--set", f"valkey.reader_url={url}"],
    ):
        ended = forebay_(*words)
        assert ended.code == 2, words
        assert "hunter2" not in ended.out + ended.err, words


@pytest.mark.usefixtures("alone")
def test_70_a_secret_that_others_may_read() -> None:
    """A warning and no error, since container engines mount secrets so."""
    path = Path("secret")
    path.write_text("a-token-of-some-length")
    path.chmod(0o644)
    ended = check("--set", "http.token_file=secret")
    assert ended.exit_code == 0
    assert ended.stderr.startswith("Warning: http.token_file = secret (from flag --set")
    path.chmod(0o600)
    assert check("--set", "http.token_file=secret").stderr == ""


def test_71_a_lifetime_that_is_shorter_than_its_refresh() -> None:
    """A refresh is a fraction of the lifetime; anything else is refused, and so is no lifetime."""
    wrong: list[dict[str, Any]] = [
        {"ttl": 1, "refresh_ahead": 1.5},
        {"ttl": 1, "refresh_ahead": 1},
        {"ttl": 1, "refresh_ahead": float("nan")},
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": float("nan")},
        {"ttl": 1e18},
    ]
    for how in wrong:
        with pytest.raises(forebay.ConfigError, match="between"):
            forebay.Node("shop").cached("a:{id}", **how)


def test_72_a_sink_that_points_to_the_cache(
    on_loop: Run, valkey_server: ValkeyServer, namespace: str
) -> None:
    """By its own scheme it is refused; as PostgreSQL, which it does not speak, the sink is paused
    and named, and nothing else waits.
    """
    for url in (valkey_server.url, "redis://:hunter2@h"):
        with pytest.raises(forebay.ConfigError, match="is not supported") as caught:
            SqlSink(url, table="t")
        assert "hunter2" not in str(caught.value)

    async def store() -> None:
        given = settings(valkey_server, workers=Workers(flush_delay_ms=0, drain_ms=100))
        node = forebay.Node(namespace, settings=given)
        url = f"postgresql://u:hunter2@127.0.0.1:{valkey_server.port}/x"
        node.sink("a:{id}", SqlSink(url, table="t", statement_timeout_ms=200))
        async with node:
            await node.publish([{"type": "write", "key": "a:1", "value": {"id": 1}}])
            with anyio.fail_after(40):
                while (found := sink_of(node)).state != "warn":
                    await node.invalidate(["b:1"])
            assert "the sink is paused" in found.detail
            assert "hunter2" not in found.detail

    def sink_of(node: forebay.Node) -> Any:
        return next(each for each in node.checks() if each.name == "sink sql:t")

    on_loop(store())


@pytest.mark.usefixtures("alone")
def test_73_a_name_that_reaches_into_objects() -> None:
    """It is looked up in the catalogue, and nowhere else."""
    for name in ("a.__class__", "__class__", "http.__class__", "http.port.real", "http", "", "."):
        ended = check("--set", f"{name}=x")
        assert ended.exit_code == 2, name
    refused("is no setting", "--set", "http.__class__=x")


def test_74_escapes_in_names_that_a_command_shows(
    on_loop: Run, valkey_server: ValkeyServer, namespace: str, forebay_: Callable[..., Ended]
) -> None:
    """What others have stored moves no cursor and forges no line: of locks, keys and errors."""
    where = ["--url", valkey_server.url, "--namespace", namespace]
    given = settings(valkey_server, node=NodeSettings(shards=4))
    shown: list[Ended] = []

    async def hold() -> None:
        node = forebay.Node(namespace, settings=given)
        async with node, node.lock("job", lease=30):
            for key in valkey_server.execute("KEYS", f"*{namespace}*"):
                if valkey_server.execute("TYPE", key) != b"hash":
                    continue
                for field in valkey_server.execute("HKEYS", key):
                    if field.startswith(b"a:"):
                        about = msgspec.json.encode({"by": ESCAPE, "meta": {ESCAPE: ESCAPE}})
                        valkey_server.execute("HSET", key, field, about)
            for words in (["ls"], ["show", "job"]):
                shown.append(await asyncio.to_thread(forebay_, "locks", *words, *where))

    on_loop(hold())
    assert [each.code for each in shown] == [0, 0]
    shown += [forebay_("locks", "show", ESCAPE, *where), forebay_("explain", ESCAPE, *where)]
    shown += [forebay_(ESCAPE), forebay_("config", "show", ESCAPE)]
    shown += [forebay_("config", "check", "--set", f"{ESCAPE}=1")]
    shown += [forebay_("run", "--app", f"x:{ESCAPE}"), forebay_("config", "show", "--url", ESCAPE)]
    for each in shown:
        text = each.out + each.err
        assert "owned" in text or "locks" in text or each.code == 2
        assert not re.search(
            "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]|^Error: forged", text, re.MULTILINE
        )


def test_75_76_no_command_replays_or_purges_without_a_bound() -> None:
    """There is none for dead letters or whole namespaces; a lock is released by its name alone."""
    assert not [name for name in COMMANDS if re.search("purge|flush|replay|drop|delete", name)]
    assert command("locks", "release").exit_code == 2
    assert FIELDS["durable.dead_letters_max"].default == 10_000


def test_77_two_nodes_of_one_id(on_loop: Run, valkey_server: ValkeyServer, namespace: str) -> None:
    """Each has an identity of its own: no shard, and no event, has two owners."""

    async def both() -> None:
        quick = Workers(enabled=True, beat_ms=100, ownership_ttl_ms=1_000, drain_ms=500)
        given = settings(valkey_server, node=NodeSettings(id="same", shards=4), workers=quick)
        nodes = [forebay.Node(namespace, settings=given) for _ in range(2)]
        for node in nodes:
            node.sink("a:{id}")(swallow)
        async with nodes[0], nodes[1]:
            assert nodes[0]._parts.node_id != nodes[1]._parts.node_id
            with anyio.fail_after(40):
                while not owned_once(nodes):
                    await asyncio.sleep(0.01)

    async def swallow(writes: list[Any]) -> None:
        return None

    def owned_once(nodes: list[forebay.Node]) -> bool:
        held = [node._parts.crew.ownership.tenures for node in nodes]  # type: ignore[union-attr]
        assert not [each for each in held[0] if each in held[1] and both_in_force(nodes, each)]
        return len({*held[0], *held[1]}) == 5

    def both_in_force(nodes: list[forebay.Node], resource: int) -> bool:
        return all(node._parts.crew.ownership.in_force(resource) for node in nodes)  # type: ignore[union-attr]

    on_loop(both())


@pytest.mark.usefixtures("alone")
def test_78_control_characters_in_values() -> None:
    """A line end, a NUL or an escape in a value is refused, and not shown."""
    for text in ("a\nb", "a\r", "\x1b[2J", "a\x9b2J", "a\0b"):
        found: Mapping[str, str] = {"FOREBAY_NAMESPACE": text, "FOREBAY_NODE__ID": text}
        for name, value in found.items():
            with pytest.raises(forebay.ConfigError) as caught:
                load(environ={name: value})
            assert not re.search("[\x00-\x1f\x7f-\x9f]", str(caught.value))
    for setting in ("[http]\ntoken_file", "[valkey]\ntls_ca_file", "[valkey]\npassword_file"):
        Path("forebay.toml").write_text(f'{setting} = "a\\u0000b"')
        ended = check()
        assert (ended.exit_code, ended.stdout) == (2, ""), setting


def test_79_a_configuration_file_behind_links(alone: Path, on_loop: Run) -> None:
    """Followed, as Kubernetes mounts it, also when turned; one that leads nowhere is named."""
    Path("v1.toml").write_text("[http]\nport = 1")
    Path("v2.toml").write_text("[http]\nport = 2222")
    Path("data").symlink_to("v1.toml")
    Path("forebay.toml").symlink_to("data")
    assert load(environ={}).settings.http.port == 1

    async def turn() -> None:
        changed = asyncio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: watch(Path("forebay.toml"), changed.set, look_s=0.005))
            await asyncio.sleep(0.02)
            Path("aside").symlink_to("v2.toml")
            Path("aside").rename("data")
            with anyio.fail_after(40):
                await changed.wait()
            tasks.cancel_scope.cancel()

    on_loop(turn())
    assert load(environ={}).settings.http.port == 2222
    for target in ("gone.toml", "circle"):
        Path("circle").unlink(missing_ok=True)
        Path("circle").symlink_to(target)
        ended = check("--config", "circle")
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert "cannot be read" in ended.stderr


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"], ids=["stdin", "all three"])
def test_80_a_node_runs_without_standard_streams(
    alone: Path, valkey_server: ValkeyServer, namespace: str, loop: str, closed: str
) -> None:
    """No connection takes the place of a stream that is closed; uvloop ends a process over that."""
    code = f"{WITHOUT_UVLOOP if loop == 'asyncio' else 'import sys; '}{PROGRAM}"
    (alone / "app.py").write_text(
        "import os, sys, asyncio, forebay\nnode = forebay.Node()\n@node.on_start\n"
        "async def told() -> None:\n"
        "    kinds = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]\n"
        "    module = type(asyncio.get_running_loop()).__module__\n"
        "    open('started.new', 'w').write(' '.join([module, *kinds]))\n"
        "    os.rename('started.new', 'started')\n"
    )
    words = f"run --app app:node --port 0 --url {valkey_server.socket_url} --namespace {namespace}"
    shell = f'exec "$0" -c "$1" {words} {closed}'
    process = subprocess.Popen(
        ["sh", "-c", shell, sys.executable, code],
        cwd=alone,
        env=environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until((alone / "started").exists, what="the start")
        module, *kinds = (alone / "started").read_text().split()
        assert module.startswith(loop)
        assert kinds == ["/dev/null"] * 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) in (0, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "redirected,code,said",
    [
        ("<&-", 0, ""),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "Error: the output cannot be written: [Errno 28] No space left"),
    ],
)
def test_80_streams_that_are_closed_or_full(
    alone: Path, redirected: str, code: int, said: str
) -> None:
    """An exit code, and at most one line."""
    command = f"'{sys.executable}' -m forebay.nodes.cli config show {redirected}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=alone, env=environ(), capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)


def test_80_a_reader_that_is_gone(alone: Path) -> None:
    """SIGPIPE: an exit code, and not a word."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "forebay.nodes.cli", "config", "show"]
    done = subprocess.run(
        command, cwd=alone, env=environ(), stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_80_logs_to_a_pipe_that_nobody_reads(
    on_loop: Run, valkey_server: ValkeyServer, namespace: str
) -> None:
    """A node goes on when the reader of its log is gone."""
    read, write = os.pipe()
    os.close(read)

    async def run() -> None:
        async with forebay.Node(namespace, settings=settings(valkey_server)) as node:
            await node.invalidate(["a:1"])
            assert node.state == "running"

    with io.TextIOWrapper(os.fdopen(write, "wb", buffering=0), write_through=True) as stream:
        configure_logs(Log(level="debug"), instance="t", stream=stream)
        on_loop(run())
