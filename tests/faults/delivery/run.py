"""Does every accepted event arrive, once, in order, under every fault? A run, and its figures.

usage: cd tests && python -m faults.delivery [--events 50000] [--faults 18] [--seed 1]

Three `forebay run` processes bring writes to PostgreSQL. Programs in Node.js and Python publish
them, into the stream and by write_behind, each with a history of its own. Readers fill the near
caches meanwhile. After the last fault all work must finish by itself; then the final state is
recorded, and judged by ``checker``. The plan is printed first, and depends on the
arguments only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import msgspec
import structlog

from faults.delivery.application import Application
from faults.delivery.checker import Findings, check
from faults.delivery.database import Database
from faults.delivery.history import Dead, History, Left, Read, read_history
from faults.delivery.nemesis import KINDS, RECOVERY_BOUND_S, Fault, Kind, Nemesis, is_ready, plan
from faults.delivery.plants import PLANTS
from faults.delivery.publishers import settings_of, write_events
from faults.delivery.readers import Progress, Reader
from faults.delivery.setting import DeliverySetup
from faults.delivery.workload import EVENT_ID, Published, gates, workload
from forebay.coordinator.valkey.embedded import bound_to_owner
from forebay.schemas.keys import EVENTS, Names
from support.eventually import wait_until
from support.node_process import NodeProcess, environ
from support.postgres import PostgresServer
from support.programs import tool
from support.valkey_server import ValkeyServer

SERVER = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "auto-aof-rewrite-percentage": "0",  # so that the tail of the AOF is in one file
}
WORKER = {
    "workers__ownership_ttl_ms": 1_500,
    "workers__beat_ms": 300,
    "workers__attempts_max": 2,
    "valkey__reconnect_jitter_ms": 50,
    "valkey__reconnect_max_ms": 300,
    "valkey__breaker_recovery_ms": 200,
    "durable__dedupe_ms": 120_000,
}
PUBLISHER_JS = Path(__file__).with_name("publisher.js")
_WORKERS = ("one", "two", "three")
_GATES_SHARE = 0.05
_PATIENCE_S = 240.0
_START_S = 60.0  #: of all workers at once, on a machine that has other things to do
_CALM_S = 15.0  #: without any progress, nothing will move any more
_READ_BY_EACH_MAX = 400  #: keys that each worker is asked for at the end
_TOGETHER = 200


class WorkerProcesses:
    """``forebay run``, three times; the process that replaces "one" is "one-2"."""

    def __init__(self, setup: DeliverySetup) -> None:
        self.running: list[NodeProcess] = []
        self.exits: list[int] = []
        self._setup = setup
        self._closing = ExitStack()

    def spawn_all(self) -> None:
        if not self.running:
            self.running = [self._make(name, 1) for name in _WORKERS[: self._setup.workers]]
        for node in self.running:
            node.url = ""
            node.spawn()

    def until_ready(self) -> None:
        for node in self.running:
            wait_until(
                lambda node=node: is_ready(node), limit_s=_START_S, what=f"{node.name} ready"
            )

    def kill_all(self) -> None:
        for node in self.running:
            if node.ended() is None:
                node.signal(signal.SIGKILL)
        for node in self.running:
            node.wait()

    def replace(self, index: int) -> None:
        """Drain it, then start the next version."""
        old = self.running[index]
        if old.ended() is None:
            self.exits.append(old.stop())
        self.running[index] = self._make(f"{_WORKERS[index]}-2", 2).spawn()
        self.until_ready()

    def stop(self) -> None:
        for node in self.running:
            node.signal(signal.SIGTERM)
        self.exits += [node.wait() for node in self.running]

    def close(self) -> None:
        self._closing.close()

    def _make(self, name: str, application: int) -> NodeProcess:
        node = NodeProcess(
            self._setup.path,
            name=name,
            app="faults.delivery.app:node",
            environ=self._setup.environ(application=application),
            node__namespace=self._setup.namespace,
            node__shards=self._setup.shards,
            valkey__url=self._setup.url,
            **WORKER,
        )
        self._closing.callback(node.close)
        return node


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    seconds: float
    plan: Sequence[Fault]
    done: Sequence[str]
    events: Mapping[str, int]  #: by publisher
    exits: Sequence[int]  #: of workers that were stopped in good order
    findings: Findings


class _Run:
    """The processes of one run."""

    def __init__(
        self, setup: DeliverySetup, server: ValkeyServer, database: Database, stack: ExitStack
    ) -> None:
        self.setup = setup
        self.server = server
        self.database = database
        self.names = Names(setup.namespace, setup.shards)
        self.history = History(setup.path, "harness")
        self.progress = Progress(setup.path)
        self.workers = WorkerProcesses(setup)
        self.publishers: dict[str, subprocess.Popen[bytes]] = {}
        self.events: dict[str, int] = {}
        stack.callback(self.workers.close)
        stack.callback(self.close)

    def publish(self, events: Mapping[str, Sequence[Published]]) -> None:
        for name, each in events.items():
            self._spawn(name, each, self.setup.rate * len(each) / self.setup.events, 1)
        for name in events:
            wait_until(
                lambda name=name: self.ended() or self.progress.accepted(name),
                limit_s=_PATIENCE_S,
                what=f"the first event of {name}",
            )

    def publish_gates(self) -> subprocess.Popen[bytes]:
        events = gates(int(self.setup.events * _GATES_SHARE))
        return self._spawn("gates", events, self.setup.rate / 8, 2)

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.publishers.values())

    def wait(self) -> None:
        """Until all publishers have published all."""
        give_up_at = time.monotonic() + _PATIENCE_S + self.setup.events / self.setup.rate
        for name, process in self.publishers.items():
            code = process.wait(max(1.0, give_up_at - time.monotonic()))
            assert code == 0, f"{name} ended with {code}:\n{self._log(name).read_text()[-3_000:]}"

    def close(self) -> None:
        self.history.close()
        for process in self.publishers.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def _spawn(
        self, name: str, events: Sequence[Published], rate: float, application: int
    ) -> subprocess.Popen[bytes]:
        setup, path = self.setup, self.setup.path / f"{name}.events.jsonl"
        write_events(path, events)
        if name == "node":
            history = setup.path / f"{name}.delivery.jsonl"
            command = [tool("node"), str(PUBLISHER_JS), str(setup.port), setup.stream, str(path)]
            command += [str(history), str(rate)]
        else:
            command = [
                sys.executable,
                "-m",
                "faults.delivery.publishers",
                name,
                str(path),
                str(rate),
            ]
        self.events[name] = len(events)
        with self._log(name).open("ab") as output:
            self.publishers[name] = subprocess.Popen(
                bound_to_owner(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=setup.path,
                env=environ(**setup.environ(application=application)),
                process_group=0,
            )
        return self.publishers[name]

    def _log(self, name: str) -> Path:
        return self.setup.path / f"{name}.publisher.log"


@contextmanager
def _cluster(setup: DeliverySetup) -> Iterator[_Run]:
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="forebay-delivery-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        server = stack.enter_context(ValkeyServer(config=SERVER))
        postgres = stack.enter_context(PostgresServer())
        database = stack.enter_context(Database(postgres.url))
        setup = msgspec.structs.replace(
            setup,
            directory=str(directory),
            url=server.url,
            port=server.port,
            database=postgres.url,
        )
        made = _Run(setup, server, database, stack)
        made.workers.spawn_all()
        made.workers.until_ready()
        yield made


def delivery_run(
    setup: DeliverySetup,
    faults: Sequence[Fault] = (),
    *,
    bound_s: float = RECOVERY_BOUND_S,
    calm_s: float = _CALM_S,
    keep: Path | None = None,
) -> Outcome:
    """A whole run. ``bound_s``: within which every shard must get on after a fault; ``calm_s``: how
    long nothing may move before waiting work counts as left; ``keep``: where histories and logs are
    copied to. Workers with a planted fault are killed at the end: they might not drain."""
    began = time.monotonic()
    with _cluster(setup) as made:
        nemesis = Nemesis(
            made.server,
            made.database,
            made.workers,
            names=made.names,
            history=made.history,
            seed=setup.seed,
            bound_s=bound_s,
            accepted=made.progress.accepted,
            publish_gates=made.publish_gates,
            gates_accepted=lambda: made.progress.accepted("gates"),
        )
        try:
            made.publish(workload(setup.seed, setup.events))
            with Reader(made.progress, made.workers) as reader:
                nemesis.execute(faults, ended=made.ended)
                made.wait()
            nemesis.probe("end")
            _come_to_rest(made, calm_s)
            _take_down(made, reader.keys)
            if setup.planted:
                made.workers.kill_all()
            else:
                made.workers.stop()
            lines = read_history(made.setup.path)
        finally:
            if keep is not None:
                shutil.copytree(made.setup.path, keep, dirs_exist_ok=True)
    return Outcome(
        seed=setup.seed,
        seconds=round(time.monotonic() - began, 1),
        plan=faults,
        done=nemesis.done,
        events=made.events,
        exits=made.workers.exits,
        findings=check(lines, recovery_bound_s=bound_s),
    )


def _waiting(made: _Run) -> tuple[int, int, int]:
    """Events in the ingress stream, writes for sinks, and events that are held."""
    execute, part = made.server.execute, made.names.part
    writes = sum(execute("XLEN", part(shard, "writes")) for shard in range(made.names.shards))
    return execute("XLEN", made.names.events), writes, execute("XLEN", part(EVENTS, "held"))


def _come_to_rest(made: _Run, calm_s: float) -> None:
    """Wait until no work waits, as long as the amount shrinks."""
    least, since = sum(_waiting(made)), time.monotonic()
    while least and time.monotonic() < since + calm_s:
        time.sleep(0.02)
        if (now := sum(_waiting(made))) < least:
            least, since = now, time.monotonic()


def _take_down(made: _Run, near: Sequence[str]) -> None:
    """Record the final state: waiting work, rows, effects, dead letters, and answers of nodes."""
    events, writes, held = _waiting(made)
    rows = made.database.rows()
    made.history.write(Left(events=events, writes=writes, held=held))
    made.history.write(*rows, *made.database.effects(), *_dead_letters(made))
    keys = sorted(made.progress.keys())
    half = min(_READ_BY_EACH_MAX, made.setup.events // 8) // 2
    asked = [*near[-half:], *keys[:: 1 + len(keys) // half]]
    for node in made.workers.running:
        for key in asked:
            made.history.write(_answer_of(node, key))
    made.history.write(*anyio.run(_shared_answers, made.setup, keys))


def _dead_letters(made: _Run) -> list[Dead]:
    found: dict[str, str] = {}
    for shard in (EVENTS, *range(made.names.shards)):
        for _, fields in made.server.execute("XRANGE", made.names.part(shard, "dead"), "-", "+"):
            letter = dict(zip(fields[::2], fields[1::2], strict=True))
            reason = letter[b"reason"].decode()
            events = EVENT_ID.findall(letter[b"event"]) or [b"nobody's"]
            found.update(dict.fromkeys((event.decode() for event in events), reason))
    return [Dead(event=event, reason=reason) for event, reason in found.items()]


def _answer_of(node: NodeProcess, key: str) -> Read:
    answer = node.get(f"/v1/cache/{key}")
    assert answer.status in (200, 404), (key, answer)
    event = answer.json["event"] if answer.status == 200 else ""
    stale = answer.headers["X-Forebay-Stale"] == "true"
    return Read(node=node.name, key=key, event=event, stale=stale)


async def _shared_answers(setup: DeliverySetup, keys: Sequence[str]) -> list[Read]:
    """The answers of a fresh node for each key: the shared tier."""
    setup = msgspec.structs.replace(setup, application=2, planted=())
    application, found = Application(setup, settings_of(setup)), []

    async def read(key: str) -> None:
        event, stale = await application.event_of(key)
        found.append(Read(node="newcomer", key=key, event=event, stale=stale))

    async with application.node:
        for start in range(0, len(keys), _TOGETHER):
            async with anyio.create_task_group() as tasks:
                for key in keys[start : start + _TOGETHER]:
                    tasks.start_soon(read, key)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--events", type=int, default=50_000, help="without those of the new version"
    )
    parser.add_argument("--faults", type=int, default=18)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=400.0, help="events a second")
    parser.add_argument("--only", action="append", default=[], choices=KINDS)
    parser.add_argument("--planted", action="append", default=[], choices=PLANTS)
    parser.add_argument("--keep", type=Path, help="copy histories and logs to this directory")
    given = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    kinds: Sequence[Kind] = given.only or KINDS
    faults = plan(given.seed, given.events, given.faults, kinds)
    print(json.dumps({"seed": given.seed, "plan": msgspec.to_builtins(faults)}), flush=True)
    setup = DeliverySetup(
        seed=given.seed, events=given.events, rate=given.rate, planted=given.planted
    )
    outcome = delivery_run(setup, faults, keep=given.keep)
    shortened = msgspec.structs.replace(outcome, findings=outcome.findings.shortened())
    print(json.dumps(msgspec.to_builtins(shortened), indent=2))
    return 0 if outcome.findings.sound else 1
