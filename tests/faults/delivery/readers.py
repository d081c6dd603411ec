"""Readers that fill the near caches of the workers while events are published."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Protocol, Self

from faults.delivery.history import SUFFIX
from faults.delivery.workload import KEY
from support.node_process import NodeProcess

_ACCEPTED = b'"outcome":"accepted"'
_RECENT = 500
_PAUSE_S = 0.02


class Progress:
    """The progress of the publishers, read from their histories."""

    def __init__(self, directory: Path) -> None:
        self.recent: deque[str] = deque(maxlen=_RECENT)  #: keys that were published lately
        self._directory = directory
        self._read: Counter[Path] = Counter()
        self._accepted: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._lock = Lock()

    def accepted(self, publisher: str = "") -> int:
        """Events up to now; of all publishers, or of this one."""
        self._catch_up()
        return self._accepted[publisher] if publisher else self._accepted.total()

    def keys(self) -> set[str]:
        self._catch_up()
        return self._keys

    def _catch_up(self) -> None:
        with self._lock:
            for path in self._directory.glob(f"*{SUFFIX}"):
                with path.open("rb") as file:
                    file.seek(self._read[path])
                    lines = file.read()
                lines = lines[: lines.rfind(b"\n") + 1]
                self._read[path] += len(lines)
                self._accepted[path.name.removesuffix(SUFFIX)] += lines.count(_ACCEPTED)
                for key in KEY.findall(lines):
                    self._keys.add(key.decode())
                    self.recent.append(key.decode())


class _Running(Protocol):
    running: list[NodeProcess]


class Reader(Thread):
    """Asks some worker for some key that was published lately, until ``end`` is set."""

    def __init__(self, progress: Progress, workers: _Running, seed: int = 1) -> None:
        super().__init__(daemon=True)
        self.keys: list[str] = []  #: that were answered
        self._progress = progress
        self._workers = workers
        self._rng = random.Random(f"reader {seed}")
        self._end = Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(_PAUSE_S):
            recent, nodes = list(self._progress.recent), list(self._workers.running)
            if not recent or not nodes:
                continue
            key, node = self._rng.choice(recent), self._rng.choice(nodes)
            try:
                if node.url and node.get(f"/v1/cache/{key}").status in (200, 404):
                    self.keys.append(key)
            except (OSError, ValueError, TimeoutError):
                time.sleep(_PAUSE_S)  # it is being killed, or the answer was cut short
