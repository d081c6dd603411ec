"""One run of the demo: Valkey, the nodes, the replayer and the readers, from start to end.

I1  Whatever ends it, things end in this order: replayer and readers, the nodes (which drain),
    Valkey, the directory.
I2  ``cancel`` begins that ending at any moment; ``kill_all`` makes it short.
I3  With ``once``, a day is played, what the cluster still has to do is waited for, and then
    all is compared with the data set; the outcome also tells how the processes ended, and
    whether any is left.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import anyio
import anyio.to_thread
from msgspec import Struct

from ...coordinator.background import BackgroundTasks, background_tasks
from ...coordinator.clock import Clock
from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.data_dir import claim_temporary
from ...schemas.errors import ProcessFailed
from ...schemas.keys import Names
from ...schemas.settings import Settings
from . import verify
from .children import Child
from .cluster import Cluster, free_ports
from .database import create
from .flights import read_day
from .programs import Programs
from .scene import Scene
from .verify import Finding

__all__ = ["NODE_COMMAND", "Outcome", "Plan", "Session"]

NODE_COMMAND = (
    *(sys.executable, "-P", "-m", "forebay.nodes.cli", "run"),
    *("--app", "forebay.nodes.demo.app:node"),
)
KILLED_FOR_S = 2.0
DRAIN_LIMIT_S = 60.0
_OBSERVE_EVERY_S = 1.0


class Plan(Struct, frozen=True, kw_only=True):
    settings: Settings
    origins: Mapping[str, str]  #: of the settings
    environ: Mapping[str, str]  #: of all children
    node_environ: Mapping[str, str]  #: settings of the nodes; the session adds its own
    namespace: str
    nodes: int = 3
    port: int = 8642
    duration_s: float = 60.0  #: of a day
    rate: float = 150.0  #: reads a second
    once: bool = False
    kill: bool = False
    data_dir: Path | None = None  #: kept; None: a temporary one
    node_command: tuple[str, ...] = NODE_COMMAND


class Outcome(Struct, frozen=True, kw_only=True):
    """What came of a day played once."""

    ok: bool
    killed: bool
    checks: dict[str, bool]
    problems: dict[str, str]  #: of the checks that failed
    counts: dict[str, int]
    timings_s: dict[str, float]
    backend: dict[str, str]
    nodes: dict[str, list[int]]  #: exit codes, one for each time a node was started


class Session:
    """Used once: ``outcome = await Session(plan, clock=clock).run()``."""

    def __init__(self, plan: Plan, *, clock: Clock) -> None:
        self.scene = Scene()
        self._plan = plan
        self._clock = clock
        self._scope = anyio.CancelScope()
        self._day = read_day()
        self._children: list[Child] = []
        self._backend: Backend | None = None
        self._findings: dict[str, Finding] = {}
        self._timings_s: dict[str, float] = {}

    def cancel(self) -> None:
        self._scope.cancel()

    def kill_all(self) -> None:
        """At once, without drain; ``run`` then returns soon."""
        for child in self._children:
            child.kill()
        if server := self._server_pid():
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)

    async def run(self) -> Outcome | None:
        """None if it was cancelled before a day was played and compared.

        Raises:
            ProcessFailed: one of the processes ended by itself.
            StartupError: Valkey was not reached.
        """
        played = False
        with self._scope:
            async with self._directory() as directory:
                async with self._valkey() as backend, self._cluster(directory) as cluster:
                    await self._play(backend, cluster, directory)
                    played = True
                self._check_processes(cluster)
        return self._outcome() if played and not self._scope.cancelled_caught else None

    @asynccontextmanager
    async def _directory(self) -> AsyncGenerator[Path]:
        if self._plan.data_dir is not None:
            directory = self._plan.data_dir.absolute()
            directory.mkdir(parents=True, exist_ok=True)
            self.scene.directory = str(directory)
            yield directory
            return
        temporary = await claim_temporary()
        self.scene.directory = str(temporary.path)
        try:
            yield temporary.path
        finally:
            temporary.release()

    @asynccontextmanager
    async def _valkey(self) -> AsyncGenerator[Backend]:
        backend = Backend(
            self._plan.settings.valkey, client_name="forebay-dev", origins=self._plan.origins
        )
        self.scene.why = backend.choice.why
        async with backend:
            self._backend = backend
            self.scene.backend = backend.url
            async with background_tasks() as tasks:
                if backend.server is not None:
                    tasks.start_soon(_fail_when_dead, backend.server.died)
                yield backend

    def _ports(self) -> list[int]:
        first, ports = self._plan.port, free_ports(self._plan.port, self._plan.nodes)
        for number, port in enumerate(ports):
            if first and port != first + number:
                note = (
                    f"port {first + number} is taken: node-{number + 1} listens on {port} instead"
                )
                self.scene.notes.append(note)
        return ports

    @asynccontextmanager
    async def _cluster(self, directory: Path) -> AsyncGenerator[Cluster]:
        database = directory / "flights.db"
        await anyio.to_thread.run_sync(create, database, self._day)
        cluster = Cluster(
            self._plan.node_command,
            ports=self._ports(),
            environ=self._node_environ(database),
            directory=directory,
        )
        self._children += [node.child for node in cluster.nodes]
        self.scene.nodes = [node.scene for node in cluster.nodes]
        began_at = self._clock.monotonic()
        async with cluster:
            self._took("start", began_at)
            self.scene.ready = True
            try:
                yield cluster
            finally:
                self.scene.ready = False
                began_at = self._clock.monotonic()
        self._took("stop", began_at)

    def _node_environ(self, database: Path) -> dict[str, str]:
        return {
            **self._plan.environ,
            **self._plan.node_environ,
            "FOREBAY_VALKEY__URL": self._address(),
            "FOREBAY_NODE__NAMESPACE": self._plan.namespace,
            "FOREBAY_HTTP__HOST": "127.0.0.1",
            "FOREBAY_LOG__FORMAT": "json",
            # A board is made in milliseconds: readers need not wait long for a node that died.
            "FOREBAY_CACHE__LEASE_MS": "2000",
            "FOREBAY_DEMO_DB": str(database),
        }

    async def _play(self, backend: Backend, cluster: Cluster, directory: Path) -> None:
        programs = self._programs(cluster, directory)
        self._children += programs.children
        began_at = self._clock.monotonic()
        async with background_tasks() as tasks:
            tasks.start_soon(self._observe, cluster)
            async with programs.running():
                restarted = self._begin_kill(tasks, programs, cluster)
                await programs.replayed()
                self._took("day", began_at)
                await restarted.wait()
                await self._drain(cluster, directory)
        await self._compare(backend, cluster, directory)

    def _programs(self, cluster: Cluster, directory: Path) -> Programs:
        return Programs(
            self.scene,
            directory=directory,
            environ=self._plan.environ,
            url=self._url(),
            events_key=self._names.events,
            nodes=cluster.urls,
            duration_s=self._plan.duration_s,
            days=1 if self._plan.once else 0,
            rate=self._plan.rate,
        )

    def _begin_kill(
        self, tasks: BackgroundTasks, programs: Programs, cluster: Cluster
    ) -> anyio.Event:
        """The event is set when the killed node is back; at once if none is to be killed."""
        restarted = anyio.Event()

        async def kill_one() -> None:
            await programs.half_way.wait()
            self.scene.notes.append("kill -9 node-1")
            await cluster.kill_and_restart(cluster.nodes[0], after_s=KILLED_FOR_S)
            self.scene.notes.append("node-1 is back")
            restarted.set()

        if self._plan.kill:
            tasks.start_soon(kill_one)
        else:
            restarted.set()
        return restarted

    async def _observe(self, cluster: Cluster) -> None:
        while True:
            await cluster.observe()
            await anyio.sleep(_OBSERVE_EVERY_S)

    async def _drain(self, cluster: Cluster, directory: Path) -> None:
        began_at = self._clock.monotonic()
        self._findings["backlog_drained"] = await verify.until_drained(
            cluster, directory / "flights.db", limit_s=DRAIN_LIMIT_S
        )
        self._took("drain", began_at)

    async def _compare(self, backend: Backend, cluster: Cluster, directory: Path) -> None:
        began_at = self._clock.monotonic()
        stored, changes = await verify.read_table(directory / "flights.db")
        expected = verify.expected_boards(self._day)
        self._findings |= {
            "rows_equal_the_data_set": verify.rows_equal(stored, self._day),
            "boards_show_the_final_state": await verify.boards_shown(cluster, expected),
            "order_kept": verify.order_kept(changes, self._day),
            "no_dead_letters": await verify.no_dead_letters(backend.link, self._names),
        }
        if self.scene.reads is not None:
            self._findings["no_board_went_back"] = verify.never_back(self.scene.reads)
        self._took("compare", began_at)

    def _check_processes(self, cluster: Cluster) -> None:
        exits = {node.child.name: node.child.exits for node in cluster.nodes}
        expected = {name: [0] for name in exits}
        if self._plan.kill:
            expected["node-1"] = [-signal.SIGKILL, 0]
        wrong = [
            f"{name} ended with {exits[name]}" for name in exits if exits[name] != expected[name]
        ]
        self._findings["nodes_ended_cleanly"] = Finding(ok=not wrong, problem="; ".join(wrong))
        left = [
            f"{child.name} ({child.groups_alive()})"
            for child in self._children
            if child.groups_alive()
        ]
        if pid := self._server_pid():
            left += [f"valkey ({pid})"] if Path(f"/proc/{pid}").exists() else []
        self._findings["no_orphan_process"] = Finding(ok=not left, problem=", ".join(left))

    def _outcome(self) -> Outcome:
        found, scene = self._findings, self.scene
        replay, reads = scene.replay, scene.reads
        return Outcome(
            ok=all(finding.ok for finding in found.values()),
            killed=self._plan.kill,
            checks={name: finding.ok for name, finding in found.items()},
            problems={name: finding.problem for name, finding in found.items() if not finding.ok},
            counts={
                "flights": len(self._day),
                "events": replay.published if replay else 0,
                "events_repeated": replay.repeated if replay else 0,
                "rows_changed": found["order_kept"].count,
                "boards_compared": found["boards_show_the_final_state"].count,
                "reads": reads.reads_total if reads else 0,
                "reads_stale": reads.stale_total if reads else 0,
                "read_errors": reads.errors_total if reads else 0,
            },
            timings_s=self._timings_s,
            backend={"url": scene.backend, "why": scene.why},
            nodes={child.name: child.exits for child in self._children if child.name[:4] == "node"},
        )

    @property
    def _names(self) -> Names:
        return Names(self._plan.namespace, self._plan.settings.node.shards)

    def _server_pid(self) -> int:
        return self._backend.server.pid if self._backend and self._backend.server else 0

    def _address(self) -> str:
        """Without user and password: the nodes have these as settings."""
        assert self._backend is not None
        if self._backend.server is not None:
            return f"unix://{self._backend.server.socket_path}"
        return self._backend.url

    def _url(self) -> str:
        """With user and password."""
        valkey, address = self._plan.settings.valkey, self._address()
        if not valkey.url or not valkey.password:
            return address
        scheme, _, rest = address.partition("://")
        user, password = quote(valkey.username, safe=""), quote(valkey.password.reveal(), safe="")
        return f"{scheme}://{user}:{password}@{rest}"

    def _took(self, what: str, began_at: float) -> None:
        self._timings_s[what] = round(self._clock.monotonic() - began_at, 3)


async def _fail_when_dead(died: anyio.Event) -> None:
    await died.wait()
    raise ProcessFailed("valkey", "ended by itself")
