"""Dialling: what is refused, and in which words."""

from __future__ import annotations

import asyncio
import gc
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from forebay.schemas.errors import Disconnected, ForebayError, ServerRefused, TimedOut, Unavailable
from support.links import dialer_to, link_to, running
from support.valkey_server import ValkeyServer, free_port

MakeServer = Callable[..., ValkeyServer]


async def failure_of(url: str, **options: object) -> ForebayError:
    with pytest.raises(ForebayError) as caught:
        await dialer_to(url, **options).dial()
    return caught.value


async def test_a_closed_port_is_told_from_an_unknown_name() -> None:
    """The reason names the address, and what is the matter with it."""
    port = free_port()
    refused = await failure_of(f"valkey://127.0.0.1:{port}")
    assert isinstance(refused, Disconnected)
    assert refused.reason == f"127.0.0.1:{port} refused the connection"
    unknown = await failure_of("valkey://no-such-host.invalid:6379", connect_timeout_ms=20_000)
    assert isinstance(unknown, Disconnected)
    assert unknown.reason.startswith("host name of no-such-host.invalid:6379 is unknown")


async def test_several_addresses_that_refuse_are_a_refusal() -> None:
    """localhost may have two addresses; that both refused is said in one sentence."""
    refused = await failure_of(f"valkey://localhost:{free_port()}")
    assert isinstance(refused, Disconnected)
    assert refused.reason.endswith("refused the connection")


async def test_a_missing_socket_is_named(tmp_path: Path) -> None:
    """Nobody made that socket."""
    error = await failure_of(f"unix://{tmp_path}/none")
    assert isinstance(error, Disconnected)
    assert error.reason == f"there is no socket at {tmp_path}/none"


async def test_a_server_that_says_nothing_times_out(make_server: MakeServer) -> None:
    """The time limit covers the handshake, not only the connecting."""
    server = make_server()
    server.sigstop()
    error = await failure_of(server.url, connect_timeout_ms=50)
    server.sigcont()
    assert isinstance(error, TimedOut)
    assert not error.outcome_unknown


@asynccontextmanager
async def saying(words: bytes) -> AsyncIterator[str]:
    """A listener that says so to everybody, and hangs up."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"valkey://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_whoever_hangs_up_may_want_tls() -> None:
    """A TLS port closes a plain connection without a word; the reason gives a hint."""
    async with saying(b"") as url:
        error = await failure_of(url)
    assert isinstance(error, Disconnected)


async def test_what_is_no_valkey_is_an_error_of_ours() -> None:
    """Whatever somebody else's protocol says, it becomes Disconnected."""
    async with saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        assert isinstance(await failure_of(url), Disconnected)


async def test_a_full_or_loading_server_may_be_tried_again() -> None:
    """These heal by waiting, so they are no refusals."""
    for words in (b"-ERR max number of clients reached\r\n", b"-LOADING in memory\r\n"):
        async with saying(words) as url:
            error = await failure_of(url)
        assert isinstance(error, Unavailable)
        assert not isinstance(error, Disconnected)


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_refusals_have_the_servers_code(make_server: MakeServer, unix: bool) -> None:
    """WRONGPASS, NOAUTH, NOPERM and ERR are told apart over either kind of socket."""
    acl = ("user default on >right ~* &* +@all", "user mute on >pw ~* &* +@all -client")
    server = make_server(acl=acl)
    url = server.socket_url if unix else server.url
    codes = [
        (await failure_of(url, password="secret-but-wrong")).code,
        (await failure_of(url)).code,
        (await failure_of(url, username="mute", password="pw")).code,
        (await failure_of(f"{url}?db=99" if unix else f"{url}0099", password="right")).code,
    ]
    assert codes == ["WRONGPASS", "NOAUTH", "NOPERM", "ERR"]
    error = await failure_of(url, password="secret-but-wrong")
    assert isinstance(error, ServerRefused)
    assert "secret-but-wrong" not in str(error)


async def test_the_transport_outlives_what_made_it(valkey_server: ValkeyServer) -> None:
    """valkey-py's objects close their transport when collected; ours must not be among them."""
    link = link_to(valkey_server.url)
    async with running(link):
        gc.collect()
        await asyncio.sleep(0)
        gc.collect()
        assert await link.call("PING") == b"PONG"
        assert link.connects == 1


async def test_an_undialled_hand_over_can_be_closed(valkey_server: ValkeyServer) -> None:
    """Whoever does not want the connection gets rid of it."""
    dialed = await dialer_to(valkey_server.url).dial()
    dialed.close()
    with pytest.raises(Disconnected, match="hung up"):
        dialed.attach(asyncio.Protocol())


class Authority:
    """A certificate for one host name, signed by itself."""

    def __init__(self, directory: Path, host: str) -> None:
        self.cert, self.key = str(directory / "cert.pem"), str(directory / "key.pem")
        subprocess.run(
            [
                *"openssl req -x509 -nodes -days 2 -newkey ec".split(),
                *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", f"/CN={host}"),
                *("-addext", f"subjectAltName=DNS:{host}"),
                *("-keyout", self.key, "-out", self.cert),
            ],
            check=True,
            capture_output=True,
        )


@asynccontextmanager
async def tls_before(server: ValkeyServer, authority: Authority) -> AsyncIterator[int]:
    """The server behind TLS; the wheel's server has none of its own."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.cert, authority.key)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.socket_path)
        await asyncio.gather(
            pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True
        )

    front = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with front:
        yield front.sockets[0].getsockname()[1]


async def test_tls_works_with_the_right_authority(
    valkey_server: ValkeyServer, tmp_path: Path, namespace: str
) -> None:
    """A checked certificate for the right name: commands and large values pass."""
    authority = Authority(tmp_path, "localhost")
    async with tls_before(valkey_server, authority) as port:
        link = link_to(f"valkeys://localhost:{port}", tls_ca_file=authority.cert)
        async with running(link):
            blob = bytes(range(256)) * 8_192
            await link.call("SET", namespace, blob)
            assert await link.call("GET", namespace) == blob
            assert await link.call("DEL", namespace) == 1


async def test_tls_refuses_other_names_and_authorities(
    valkey_server: ValkeyServer, tmp_path: Path
) -> None:
    """The name in the certificate counts unless the checks are switched off."""
    authority = Authority(tmp_path, "elsewhere.example")
    async with tls_before(valkey_server, authority) as port:
        url = f"valkeys://localhost:{port}"
        mismatch = await failure_of(url, tls_ca_file=authority.cert)
        assert isinstance(mismatch, Disconnected)
        assert "TLS: certificate of localhost" in mismatch.reason
        assert "TLS: certificate" in str(await failure_of(url))
        link = link_to(url, tls_insecure=True)
        async with running(link):
            assert await link.call("PING") == b"PONG"


async def test_tls_to_a_plain_port_says_so(valkey_server: ValkeyServer) -> None:
    """A plain port answers no TLS hello."""
    error = await failure_of(valkey_server.url.replace("valkey://", "valkeys://"))
    assert isinstance(error, Disconnected | TimedOut)


async def test_an_unreadable_certificate_file_is_named(tmp_path: Path) -> None:
    """The setting, the path and the reason, which the ssl module keeps to itself."""
    error = await failure_of("valkeys://localhost:1", tls_ca_file=f"{tmp_path}/none.pem")
    assert isinstance(error, Disconnected)
    problem = "cannot be read: No such file or directory"
    assert error.reason == f"TLS: tls_ca_file {tmp_path}/none.pem {problem}"
