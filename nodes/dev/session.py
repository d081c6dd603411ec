"""One run of ``forebay dev``: Valkey, the nodes, the replayer and the readers, start to end.

I1  Everything stops in this order: replayer and readers, the nodes (which drain), Valkey, the
    directory.
I2  ``cancel`` starts that stop at any time; ``kill_all`` makes it immediate.
I3  With ``once``, one day is replayed, the session waits until the cluster has finished its work,
    and compares everything with the data set. The outcome also reports how the processes
    exited, and any process that is left.
I4  A replayer or a reader that exits early raises ProcessFailed with the end of its log.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import anyio
import anyio.to_thread
import msgspec

from ...coordinator.background import BackgroundTasks, background_tasks
from ...coordinator.clock import Clock
from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.data_dir import claim_temporary
from ...schemas.errors import ProcessFailed
from ...schemas.keys import Names
from ..demo.database import create
from ..demo.flights import read_day
from . import verify
from .processes import Child, Cluster, free_ports, tail_of
from .readers import ReadReport
from .replayer import ReplayReport
from .scene import Outcome, Plan, Scene
from .verify import Finding

KILLED_FOR_S = 2.0
DRAIN_LIMIT_S = 60.0
_OBSERVE_EVERY_S = 1.0
_STOP_LIMIT_S = 3.0


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
        self._half_way = anyio.Event()
        self._replayed = anyio.Event()

    def cancel(self) -> None:
        self._scope.cancel()

    def kill_all(self) -> None:
        """Kill all processes without a drain; ``run`` then returns soon."""
        for child in self._children:
            child.kill()
        if server := self._server_pid():
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)

    async def run(self) -> Outcome | None:
        """The outcome, or None if the session was cancelled before the comparison.

        Raises:
            ProcessFailed: a process exited early.
            StartupError: Valkey is not reachable.
        """
        played = False
        with self._scope:
            async with self._directory() as directory:
                async with self._valkey() as backend, self._cluster(directory) as cluster:
                    await self._play(backend, cluster, directory)
                    played = True
                self._check_processes(cluster)
        return self._outcome() if played and not self._scope.cancelled_caught else None

    # Start and stop

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
                self.scene.notes.append(
                    f"port {first + number} is in use: node-{number + 1} listens on {port} instead"
                )
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
            self._record_time("start", began_at)
            self.scene.ready = True
            try:
                yield cluster
            finally:
                self.scene.ready = False
                began_at = self._clock.monotonic()
        self._record_time("stop", began_at)

    def _node_environ(self, database: Path) -> dict[str, str]:
        return {
            **self._plan.environ,
            **self._plan.node_environ,
            "FOREBAY_VALKEY__URL": self._address(),
            "FOREBAY_NODE__NAMESPACE": self._plan.namespace,
            "FOREBAY_HTTP__HOST": "127.0.0.1",
            "FOREBAY_LOG__FORMAT": "json",
            # A board loads within milliseconds: readers need not wait long for a killed node.
            "FOREBAY_CACHE__LEASE_MS": "2000",
            "FOREBAY_DEMO_DB": str(database),
        }

    def _program(self, name: str, directory: Path, *arguments: str, first_line: str = "") -> Child:
        child = Child(
            name,
            [sys.executable, "-P", "-m", f"{__package__}.{name}", *arguments],
            environ=self._plan.environ,
            log_path=directory / f"{name}.log",
            reports=True,
            first_line=first_line,
        )
        self._children.append(child)
        return child

    # The day

    async def _play(self, backend: Backend, cluster: Cluster, directory: Path) -> None:
        began_at = self._clock.monotonic()
        async with background_tasks() as tasks:
            tasks.start_soon(self._observe, cluster)
            async with self._replayer_and_readers(cluster, directory):
                restarted = self._kill_half_way(tasks, cluster)
                await self._replayed.wait()
                self._record_time("day", began_at)
                await restarted.wait()
                await self._drain(cluster, directory)
        await self._compare(backend, cluster, directory)

    @asynccontextmanager
    async def _replayer_and_readers(
        self, cluster: Cluster, directory: Path
    ) -> AsyncGenerator[None]:
        plan, nodes = self._plan, ",".join(node.url for node in cluster.nodes)
        replayer = self._program(
            *("replayer", directory, "--url", "-", "--events-key", self._names.events),
            *("--duration", str(plan.duration_s), "--days", "1" if plan.once else "0"),
            first_line=self._url(),  # on stdin, since it may contain a password
        )
        readers = self._program("readers", directory, "--nodes", nodes, "--rate", str(plan.rate))
        try:
            await replayer.start()
            await readers.start()
            async with background_tasks() as tasks:
                tasks.start_soon(self._follow_replayer, replayer)
                tasks.start_soon(self._follow_readers, readers)
                yield
        finally:
            await replayer.stop(_STOP_LIMIT_S)
            await readers.stop(_STOP_LIMIT_S)

    async def _follow_replayer(self, replayer: Child) -> None:
        async for line in replayer.lines():
            self.scene.replay = report = msgspec.json.decode(line, type=ReplayReport)
            if report.published * 2 >= report.total:
                self._half_way.set()
        if await replayer.wait():
            raise _exited(replayer)
        self._replayed.set()

    async def _follow_readers(self, readers: Child) -> None:
        async for line in readers.lines():
            self.scene.reads = msgspec.json.decode(line, type=ReadReport)
        await readers.wait()
        raise _exited(readers)

    def _kill_half_way(self, tasks: BackgroundTasks, cluster: Cluster) -> anyio.Event:
        """An event that is set when the killed node is back, or now if none is to be killed."""
        restarted = anyio.Event()

        async def kill_one() -> None:
            await self._half_way.wait()
            self.scene.notes.append("kill -9 node-1")
            await cluster.kill_and_restart(cluster.nodes[0], after_s=KILLED_FOR_S)
            self.scene.notes.append("node-1 is ready again")
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

    # The comparison

    async def _drain(self, cluster: Cluster, directory: Path) -> None:
        began_at = self._clock.monotonic()
        self._findings["backlog_drained"] = await verify.until_drained(
            cluster, directory / "flights.db", limit_s=DRAIN_LIMIT_S
        )
        self._record_time("drain", began_at)

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
        self._record_time("compare", began_at)

    def _check_processes(self, cluster: Cluster) -> None:
        exits = {node.child.name: node.child.exits for node in cluster.nodes}
        expected = {name: [0] for name in exits}
        if self._plan.kill:
            expected["node-1"] = [-signal.SIGKILL, 0]
        wrong = [
            f"{name} exited with {exits[name]}" for name in exits if exits[name] != expected[name]
        ]
        self._findings["nodes_ended_cleanly"] = Finding(ok=not wrong, problem="; ".join(wrong))
        left = [
            f"{each.name} ({each.groups_alive()})" for each in self._children if each.groups_alive()
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
        """Without user and password, which the nodes get as settings."""
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

    def _record_time(self, phase: str, began_at: float) -> None:
        self._timings_s[phase] = round(self._clock.monotonic() - began_at, 3)


def _exited(child: Child) -> ProcessFailed:
    said = tail_of(child.log_path)
    return ProcessFailed(child.name, f"exited with {child.exits[-1]}", said=said)


async def _fail_when_dead(died: anyio.Event) -> None:
    await died.wait()
    raise ProcessFailed("valkey", "exited")
