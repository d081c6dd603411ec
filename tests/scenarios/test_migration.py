"""The way over from the service that Forebay grew out of: its environment, its entries, four worker
processes, and a rolling change of CACHE_VER while events come."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import valkey

from support.eventually import wait_until
from support.node_process import PATIENCE_S
from support.uvicorn_server import Uvicorn
from support.valkey_server import ValkeyServer, free_port
from support.webshop import LOADS

WORKERS, DB, PASSWORD = 4, 3, "canary-7f3a"
STALENESS_MS = 200  #: the promise: from then on, nobody reads what is older than an applied event
EVENTS = "forebay:shop:events"
BARE, WRAPPED = range(100, 110), range(200, 210)  #: products that the service before had stored
STORED = [*BARE, *WRAPPED]
UNREAD = [108, 109, 208, 209]  #: first read after the change of CACHE_VER
CHANGED = [107, 207]  #: by an event, before anybody has read them
MOVING = [106, 206]  #: by one event after the other
CALM = [row for row in STORED if row not in {*UNREAD, *CHANGED, *MOVING}]
NEW = [300, 301]  #: not stored by the service before


class Seen(NamedTuple):
    port: int
    row: int
    value: int
    began_at: float


class Migration:
    """The source, the server, and what was read."""

    def __init__(self, directory: Path, server: ValkeyServer) -> None:
        self.directory = directory
        self.seen: list[Seen] = []
        self.known: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self.released: list[Uvicorn] = []  #: those that serve
        self.client = valkey.Valkey(unix_socket_path=server.socket_path, db=DB)
        self.environ = {
            "VALKEY_FAKE": "0",
            "VALKEY_USER": "app",
            "VALKEY_PASSWORD": PASSWORD,
            "VALKEY_WRITER_ENDPOINT": "127.0.0.1",
            "VALKEY_WRITER_PORT": str(server.port),
            "VALKEY_READER_ENDPOINT": "127.0.0.1",
            "VALKEY_READER_PORT": str(free_port()),
            "VALKEY_TLS": "false",
            "VALKEY_DB": str(DB),
            "RATE_MAX_TOKENS": "50",
            "RATE_WINDOW_SEC": "1",
            "FOREBAY_WORKERS__ENABLED": "true",
            "FOREBAY_CACHE__MAX_STALENESS_MS": str(STALENESS_MS),
        }

    def store_entries(self) -> None:
        """As the service before did, in both of its forms; the source has the same values."""
        for row in BARE:
            self.client.set(f"v1:product:{row}", str(row), ex=3_600)
        for row in WRAPPED:
            entry = {"value": row, "stale_at": time.time() + 1_800}
            self.client.set(f"v1:product:{row}", msgspec.json.encode(entry), ex=3_600)
        for row in (*STORED, *NEW):
            self._row(row, row)

    def release(self, version: str) -> Uvicorn:
        count = ("--workers", str(WORKERS))
        return Uvicorn(self.directory, *count, name=version, CACHE_VER=version, **self.environ)

    def until_running(self, web: Uvicorn) -> None:
        wait_until(lambda: len(web.events("node.running")) == WORKERS, what="all workers")
        self.released.append(web)

    def change(self, *changed: int) -> None:
        """Change the rows, publish it, and wait until the event is applied."""
        rows = {row: self._newest(row) + 1_000 for row in changed}
        for row, value in rows.items():
            self._row(row, value)
        keys = [f"product:{row}" for row in rows]
        event = msgspec.json.encode({"type": "invalidate", "keys": keys})
        self.client.xadd(EVENTS, {"event": event})
        wait_until(lambda: self.client.xlen(EVENTS) == 0, what="the end of the event")
        applied_at = time.monotonic()
        for row, value in rows.items():
            self.known[row].append((applied_at + STALENESS_MS / 1_000, value))

    def read(self, web: Uvicorn, row: int) -> int:
        began_at = time.monotonic()
        value: int = web.get(f"/{row}")["value"]
        self.seen.append(Seen(web.port, row, value, began_at))
        return value

    @contextmanager
    def readers(self) -> Iterator[None]:
        """Read what moves, from whatever serves, while the block runs."""
        done, failures = threading.Event(), list[Exception]()

        def read() -> None:
            while not done.is_set():
                for web in list(self.released):
                    try:
                        for row in MOVING:
                            self.read(web, row)
                    except (OSError, HTTPException) as error:
                        if web in self.released:  # it was not being stopped
                            failures.append(error)

        threads = [threading.Thread(target=read, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join(PATIENCE_S)
        assert failures == []

    def until_read(self) -> None:
        """Wait until each moving product was read, from each release that serves, after its last
        event had to be known.
        """
        for row in MOVING:
            for web in self.released:
                read = partial(self._is_read, row, web.port, self.known[row][-1][0])
                wait_until(read, what=f"a read of {row}")

    def _is_read(self, row: int, port: int, known_at: float) -> bool:
        latest = self.seen[-500:]
        return any(s.row == row and s.port == port and s.began_at > known_at for s in latest)

    def stale(self) -> list[Seen]:
        """Reads that began when a newer value had to be known, or saw what was never there."""
        return [
            seen
            for seen in list(self.seen)
            if seen.value < max([v for at, v in self.known[seen.row] if at < seen.began_at] or [0])
            or seen.value % 1_000 != seen.row
        ]

    def loads(self) -> Counter[tuple[str, int]]:
        """How often each product was loaded, by cache version."""
        path = self.directory / LOADS
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return Counter((version, int(row)) for version, row in map(str.split, lines))

    def _newest(self, row: int) -> int:
        return int((self.directory / str(row)).read_text())

    def _row(self, row: int, value: int) -> None:
        aside = self.directory / f"{row}.new"
        aside.write_text(str(value))
        aside.rename(self.directory / str(row))


@pytest.fixture
def migration(make_server: Callable[..., ValkeyServer], tmp_path: Path) -> Migration:
    server = make_server(
        acl=["user default on nopass ~* &* +@all", f"user app on >{PASSWORD} ~* &* +@all"]
    )
    made = Migration(tmp_path, server)
    made.store_entries()
    return made


def test_a_migration_reads_nothing_stale_and_loads_nothing_that_was_stored(
    migration: Migration,
) -> None:
    """No private server, no stale value, and no load that a stored entry could have spared."""
    with migration.release("1") as old:
        migration.until_running(old)
        migration.change(*CHANGED)
        for _ in range(WORKERS):
            assert [migration.read(old, row) for row in CALM] == CALM
        assert [migration.read(old, row) for row in (*MOVING, *NEW)] == [*MOVING, *NEW]
        assert migration.loads() == {("1", row): 1 for row in NEW}
        assert [migration.read(old, row) for row in CHANGED] == [row + 1_000 for row in CHANGED]
        with migration.release("2") as new, migration.readers():
            while len(new.events("node.running")) < WORKERS:
                migration.change(*MOVING)
                migration.until_read()
            migration.until_running(new)
            for _ in range(2):
                migration.change(*MOVING)
                migration.until_read()
            assert [migration.read(new, row) for row in UNREAD] == UNREAD
            assert [migration.read(new, row) for row in (*CALM, *CALM)] == [*CALM, *CALM]
            no_private_server(old)
            migration.released.remove(old)
            old.stop()
            migration.change(*MOVING)
            migration.until_read()
            no_private_server(new)
    assert migration.stale() == []
    loads = migration.loads()
    assert [load for load in loads if load[1] in UNREAD] == []
    assert [load for load in loads if load[0] == "1" and load[1] in CALM] == []
    # What version 1 has brought over is no entry of version 2, as after any such change.
    assert {loads["2", row] for row in CALM} == {1}


def no_private_server(web: Uvicorn) -> None:
    chosen: list[dict[str, Any]] = web.events("backend.chosen")
    assert [each["choice"] for each in chosen] == ["UseUrl"] * WORKERS
    assert "private_server" not in web.get("/readyz")
    assert {each["name"] for each in web.events("backend.finding")} <= {"persistence"}
    assert {each["setting"] for each in web.events("setting.unused")} == {"valkey.reader_url"}
