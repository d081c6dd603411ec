"""Reads through a node's caches from inside its process, as ordered over a unix socket.

A1  A probe begins no earlier than its aim after the ack; how much later, the history tells.
A2  What a read returned is written down with the moment at which the read began.
A3  Orders are JSON lines. ``Watch``, ``GiveUp`` and ``LetGo`` get no answer; the others are
    answered with a line when they are done.

HTTP would cost more than what it asks for: thousands of reads a second are wanted.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Self

import msgspec

from faults.checker import CROSSED
from faults.history import History
from faults.setting import AIMS, Setup
from forebay.schemas.errors import ForebayError

_PROBES_MAX = 50_000


class Reading(msgspec.Struct, frozen=True):
    """What the caches hold: whose version it is, and the version."""

    subject: str
    version: int


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Probe the subject some time after this ack."""

    subject: str
    ack_ns: int


class Crowd(msgspec.Struct, frozen=True, tag="crowd"):
    """Have many callers ask for one key at once."""

    key: int
    callers: int


class GiveUp(msgspec.Struct, frozen=True, tag="give up"):
    """Cancel the first of the callers who ask for this key."""

    key: int
    callers: int


class Crowded(msgspec.Struct, frozen=True):
    values: dict[str, int]  #: how often each answer was given
    given_up: int


class Drive(msgspec.Struct, frozen=True, tag="drive"):
    """Read these keys by turns for some time, ``rate`` reads a second."""

    keys: int
    rate: float
    seconds: float


class Driven(msgspec.Struct, frozen=True):
    reads: int


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Probe the subject now."""

    subject: str


class Looked(msgspec.Struct, frozen=True):
    version: int
    stale: bool
    tier: str


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """Keep the next load of the subject from returning what it has read; answered once it has."""

    subject: str


class Held(msgspec.Struct, frozen=True):
    subject: str


class LetGo(msgspec.Struct, frozen=True, tag="let go"):
    """Let the load that is held return."""

    subject: str


class Rest(msgspec.Struct, frozen=True, tag="rest"):
    """Answered when nobody else gives orders any more, and all that was ordered is done."""


class Rested(msgspec.Struct, frozen=True):
    """All orders are carried out."""


Order = Watch | Crowd | GiveUp | Drive | Look | Hold | LetGo | Rest
Hit = Any  # of forebay: with value, stale, tier
Read = Callable[[str, int], Awaitable[Hit]]


class Gate:
    """Where a load is held, once."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()


class Agent:
    """``read(subject, turn)`` is a read of what the subject's version stands behind."""

    def __init__(
        self,
        name: str,
        setup: Setup,
        history: History,
        *,
        read: Read,
        read_cold: Callable[[int], Awaitable[Reading]],
        read_flaky: Callable[[int], Awaitable[Hit]],
    ) -> None:
        self._path = setup.socket(name)
        self._bound_ms = setup.bound_ms
        self._history = history
        self._read = read
        self._read_cold = read_cold
        self._read_flaky = read_flaky
        self._decode = msgspec.json.Decoder(Order).decode
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients = 0
        self._server: asyncio.Server | None = None
        self._crowds: dict[int, Sequence[asyncio.Task[str]]] = {}
        self._gates: dict[str, Gate] = {}
        self._turn = 0

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def stop(self) -> None:
        """Give up what is under way, and close the history."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._history.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        with suppress(asyncio.CancelledError):  # the stop of the node; nobody waits for this task
            async for line in reader:
                order = self._decode(line)
                if isinstance(order, Watch):
                    self._watch(order)
                elif isinstance(order, GiveUp):
                    for caller in self._crowds[order.key][: order.callers]:
                        caller.cancel()
                elif isinstance(order, LetGo):
                    self._gates.pop(order.subject).opened.set()
                else:
                    if isinstance(order, Hold):  # before whatever is ordered next
                        self._gates[order.subject] = Gate()
                    self._spawn(self._answer(order, writer))
        self._clients -= 1
        writer.close()

    async def pass_gate(self, subject: str) -> None:
        """Wait, if a load of the subject is to be held."""
        if (gate := self._gates.get(subject)) is not None:
            gate.reached.set()
            await gate.opened.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _watch(self, order: Watch) -> None:
        assert len(self._tasks) < _PROBES_MAX
        for aim in AIMS:
            self._spawn(self._probe(order, int(aim * self._bound_ms)))

    async def _probe(self, order: Watch, aim_ms: int) -> None:
        due_ns = order.ack_ns + aim_ms * 1_000_000
        while (left_ns := due_ns - time.monotonic_ns()) > 0:
            await asyncio.sleep(left_ns / 1e9)
        with suppress(ForebayError):  # it is in the history
            await self._read_now(order.subject, aim_ms)

    async def _read_now(self, subject: str, aim_ms: int = 0) -> Hit:
        self._turn += 1
        began_ns = time.monotonic_ns()
        try:
            hit = await self._read(subject, self._turn)
        except ForebayError as error:
            self._history.write(
                "probe",
                "fail",
                subject=subject,
                began_ns=began_ns,
                aim_ms=aim_ms,
                note=type(error).__name__,
            )
            raise
        reading: Reading = hit.value
        self._history.write(
            "probe",
            "ok",
            subject=subject,
            version=reading.version,
            began_ns=began_ns,
            aim_ms=aim_ms,
            stale=hit.stale,
            tier=hit.tier,
            note="" if reading.subject == subject else CROSSED,
        )
        return hit

    async def _answer(
        self, order: Crowd | Drive | Look | Hold | Rest, writer: asyncio.StreamWriter
    ) -> None:
        answer: Crowded | Driven | Looked | Held | Rested
        if isinstance(order, Crowd):
            answer = await self._crowd(order)
        elif isinstance(order, Drive):
            answer = await self._drive(order)
        elif isinstance(order, Look):
            hit = await self._read_now(order.subject)
            answer = Looked(hit.value.version, hit.stale, hit.tier)
        elif isinstance(order, Rest):
            while self._clients > 1 or len(self._tasks) > 1:  # this one is at work itself
                await asyncio.sleep(0.01)
            answer = Rested()
        else:
            await self._gates[order.subject].reached.wait()
            answer = Held(order.subject)
        writer.write(msgspec.json.encode(answer) + b"\n")
        await writer.drain()

    async def _crowd(self, order: Crowd) -> Crowded:
        callers = [asyncio.create_task(self._cold(order.key)) for _ in range(order.callers)]
        self._crowds[order.key] = callers
        answers = await asyncio.gather(*callers, return_exceptions=True)
        given_up = sum(isinstance(each, asyncio.CancelledError) for each in answers)
        values = Counter(map(str, answers))
        values.pop(str(asyncio.CancelledError()), None)
        return Crowded(dict(values), given_up)

    async def _cold(self, key: int) -> str:
        reading = await self._read_cold(key)
        return f"{reading.subject} {reading.version}"

    async def _drive(self, order: Drive) -> Driven:
        started, reads = time.monotonic(), 0
        under_way: set[asyncio.Task[None]] = set()
        while (elapsed := time.monotonic() - started) < order.seconds:
            while reads < elapsed * order.rate:
                task = asyncio.create_task(self._read_one(reads % order.keys))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                reads += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*under_way)
        return Driven(reads)

    async def _read_one(self, key: int) -> None:
        began_ns, subject = time.monotonic_ns(), f"flaky:{key}"
        try:
            hit = await self._read_flaky(key)
        except Exception as error:  # a loader's own, too: it is what the caller gets
            note = type(error).__name__
            self._history.write("read", "fail", subject=subject, began_ns=began_ns, note=note)
            return
        self._history.write(
            "read",
            "ok",
            subject=subject,
            version=hit.value.version,
            began_ns=began_ns,
            stale=hit.stale,
            tier=hit.tier,
        )


class AgentClient:
    """Gives orders to an agent, and waits for the answers: ``client.ask(Crowd(...))``."""

    def __init__(self, path: str, *, patience_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(patience_s)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def send(self, order: Order) -> None:
        self._socket.sendall(msgspec.json.encode(order) + b"\n")

    def crowded(self) -> Crowded:
        return msgspec.json.decode(self._lines.readline(), type=Crowded)

    def driven(self) -> Driven:
        return msgspec.json.decode(self._lines.readline(), type=Driven)

    def rested(self) -> Rested:
        return msgspec.json.decode(self._lines.readline(), type=Rested)

    def looked(self) -> Looked:
        return msgspec.json.decode(self._lines.readline(), type=Looked)

    def held(self) -> Held:
        return msgspec.json.decode(self._lines.readline(), type=Held)
