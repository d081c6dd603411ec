"""Processes that take locks, driven step by step: the effect of each step is waited for.

P1  The next step begins when the last has had its effect, on however busy a machine.
P2  Histories are those of a run, and are judged by the same checker; a time in which something is
    done to servers or processes lasts to the end.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from faults.lock_checker import faults_of
from faults.lock_history import Began, Ended, Line, Refused, grants_of, read, writes_of
from faults.lock_nemesis import LockNemesis
from faults.lock_run import BOUND_S, MARGIN_S, lock_cluster
from faults.lock_setting import BeBusy, Give, LockSetup, Take
from support.eventually import wait_until
from support.node_process import stands_still

_ANSWERS = (Began, Refused)


class LockSteps:
    def __init__(self, nemesis: LockNemesis) -> None:
        self._nemesis = nemesis
        self._workers = nemesis.workers

    def take(self, process: str, name: str, *, timeout_s: float | None = None) -> Began | Refused:
        """It is taken and held, or it is refused."""
        before = len(self._lines(process, *_ANSWERS))
        self._workers.order(process, Take(name, timeout_s))
        *_, answer = wait_until(
            lambda: self._lines(process, *_ANSWERS)[before:], what=f"{name} of {process}"
        )
        return answer

    def give(self, process: str, name: str) -> None:
        before = len(self._lines(process, Ended))
        self._workers.order(process, Give(name))
        wait_until(
            lambda: self._lines(process, Ended)[before:], what=f"the end of {name} of {process}"
        )

    def be_busy(self, process: str, pass_s: float) -> None:
        """From now on each pass of its event loop takes so long."""
        self._workers.order(process, BeBusy(pass_s))

    def until_lost(self, process: str) -> Ended:
        """A lease of this process is lost."""
        (lost, *_) = wait_until(
            lambda: [line for line in self._lines(process, Ended) if line.lost], what="a loss"
        )
        return lost

    @contextmanager
    def asleep(self, process: str) -> Iterator[None]:
        self._workers.signal(process, signal.SIGSTOP)
        wait_until(
            lambda: stands_still(self._workers.pid(process)), what="a process that stands still"
        )
        yield
        self._workers.signal(process, signal.SIGCONT)

    def kill(self, process: str) -> None:
        self._workers.kill(process)

    def lag(self) -> None:
        """The replica learns of nothing that happens from now on."""
        self._disturb()
        self._nemesis.lag()

    def fail_over(self) -> None:
        """The primary dies, and the replica takes its place at once."""
        self._disturb()
        self._nemesis.lose_primary()

    def part(self, process: str) -> None:
        """The replica is promoted for this process; the primary goes on for the others."""
        self._disturb()
        self._nemesis.part([process])

    def rejoin(self) -> None:
        """The primary that was promoted is everybody's."""
        self._nemesis.rejoin()

    def faults(self) -> list[str]:
        """Ends the processes."""
        self._workers.stop()
        lines = read(self._workers.setup.path)
        return faults_of(
            grants_of(lines, self._workers.died),
            writes_of(lines),
            margin_s=MARGIN_S,
            bound_s=BOUND_S,
            disturbed=self._nemesis.disturbed,
        )

    def _disturb(self) -> None:
        if not self._nemesis.disturbed:
            self._nemesis.disturbed.append((time.monotonic(), math.inf))

    def _lines(self, process: str, *kinds: type[Line]) -> Sequence[Line]:
        history = read(self._workers.setup.path).get(process, ())
        return [line for line in history if isinstance(line, kinds)]


@contextmanager
def lock_steps(setup: LockSetup, *processes: str) -> Iterator[LockSteps]:
    """These processes take no lock by themselves."""
    with lock_cluster(msgspec.structs.replace(setup, tasks=0), processes) as nemesis:
        yield LockSteps(nemesis)
