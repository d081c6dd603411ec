"""The server that a node uses, wherever it comes from, for as long as the node runs.

I1  Inside the block the server was reached, is fit to be used, and ``facts`` tells of it.
I2  What was started for the block ends with it: connections first, then a server of our own.
I3  Every way in which this fails is one StartupError or ConfigError.
I4  All connections lead to the primary, also those that read: ``valkey.reader_url`` is not used.
I5  When the link finds another server, or a server with another history, the other connections are
    dialed again: an address that moves leaves connections at the server that was demoted.

What happens after the start (a lost connection, a failover) is the link's to bridge. A
server of our own that dies is reported by ``server.died`` and not started again.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

import anyio
import structlog

from ...schemas.settings import Valkey
from ...schemas.urls import Endpoint
from ..background import background_tasks
from ..clock import Clock, SystemClock
from ..modules import load
from .binary import FoundBinary, find_binary
from .breaker import Breaker
from .choice import Choice, UseEmbedded, UseFake, UseUrl, choose, needs_binary
from .dialer import Dialer
from .embedded import EmbeddedServer
from .fake import FakeLink, fake_run_id, shared_server, used_server, users_of
from .fake_pubsub import FakePubSub
from .handshake import Finding, ServerFacts, findings, handshake, probe, read_clock
from .link import Link
from .pubsub import PubSub
from .server_info import read_info
from .startup_errors import Target

__all__ = [
    "AnyDoorbell",
    "AnyLink",
    "Backend",
    "Choice",
    "Finding",
    "FoundBinary",
    "ServerFacts",
    "UseEmbedded",
    "UseFake",
    "UseUrl",
    "choose",
    "find_binary",
]

AnyLink = Link | FakeLink
AnyDoorbell = PubSub | FakePubSub

log = structlog.get_logger(__name__)


class Backend(anyio.AsyncContextManagerMixin):
    """``async with Backend(settings.valkey, client_name="n1") as backend: backend.link``"""

    link: AnyLink
    pubsub: AnyDoorbell
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
        dialer = Dialer(endpoint, self._settings, f"{self._client_name}-bell", primary=True)
        bell = PubSub(dialer, self._settings, clock=self._clock, rng=self._rng)
        self.pubsub = bell
        self._history = link.history
        stack.callback(link.on_state(self._follow))
        self.beside(bell.redial)
        await tasks.start(bell.run)

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
