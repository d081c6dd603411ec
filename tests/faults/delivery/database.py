"""PostgreSQL behind the sinks, with a log of every row that changed, in one order.

P1  Each insert and update of a row is logged by a trigger, in the row's own transaction. Writers of
    one row wait for each other, so the log has the effects of a key in the order in which they
    came about.
P2  A row that is refused keeps its transaction open for a while first, so that the nemesis can end
    backends in the middle of a poisoned batch.

Everything here is synchronous: the other side is another process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self

import asyncpg

from faults.delivery.history import Effect, Mark, Row

POISON_WAIT_S = 0.01
_SCHEMA = f"""
CREATE TABLE flight (id TEXT PRIMARY KEY, event TEXT NOT NULL, seq BIGINT NOT NULL,
    status TEXT NOT NULL, dep_delay INTEGER, tailnum TEXT, version BIGINT NOT NULL);
CREATE TABLE gate (id TEXT PRIMARY KEY, event TEXT NOT NULL, seq BIGINT NOT NULL,
    gate TEXT NOT NULL, version BIGINT NOT NULL);
CREATE TABLE effect (place BIGSERIAL PRIMARY KEY, key TEXT NOT NULL, event TEXT NOT NULL,
    seq BIGINT NOT NULL, version BIGINT NOT NULL);
CREATE FUNCTION log_effect() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO effect (key, event, seq, version)
        VALUES (TG_TABLE_NAME || ':' || NEW.id, NEW.event, NEW.seq, NEW.version);
    RETURN NULL;
END $$;
CREATE FUNCTION refuse_poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.dep_delay > 9999 THEN
        PERFORM pg_sleep({POISON_WAIT_S});
        RAISE check_violation USING MESSAGE = 'no flight is so late';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER flight_effect AFTER INSERT OR UPDATE ON flight
    FOR EACH ROW EXECUTE FUNCTION log_effect();
CREATE TRIGGER gate_effect AFTER INSERT OR UPDATE ON gate
    FOR EACH ROW EXECUTE FUNCTION log_effect();
CREATE TRIGGER flight_poison BEFORE INSERT OR UPDATE ON flight
    FOR EACH ROW EXECUTE FUNCTION refuse_poison();
"""
#: Ends backends that are in a poisoned transaction, or in any other one of a sink.
_TERMINATE = """
SELECT wait_event = 'PgSleep' AS poisoned, pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND datname = current_database() AND backend_type = 'client backend'
AND (wait_event = 'PgSleep' OR ($1 AND state LIKE '%in transaction%' OR $1 AND state = 'active'))
LIMIT 1
"""


class Database:
    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        self._connection = self._runner.run(asyncpg.connect(url))
        self._run("execute", _SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.terminate()
        self._runner.close()

    def mark(self, number: int) -> None:
        """Set a mark among the effects, for the cut of this number."""
        words = "INSERT INTO effect (key, event, seq, version) VALUES ('', 'mark', $1, 0)"
        self._run("execute", words, number)

    def terminate(self, *, anyone: bool) -> tuple[int, int]:
        """End a backend: in a poisoned transaction, or else in any, if ``anyone``; how many."""
        ended = self._run("fetch", _TERMINATE, anyone)
        poisoned = sum(bool(each["poisoned"]) for each in ended)
        return poisoned, len(ended) - poisoned

    def have_arrived(self, events: Sequence[str]) -> int:
        words = "SELECT count(DISTINCT event) FROM effect WHERE event = ANY($1)"
        return self._run("fetchval", words, list(events))

    def effects(self) -> list[Effect | Mark]:
        rows = self._run("fetch", "SELECT * FROM effect ORDER BY place")
        return [
            Effect(**row) if row["key"] else Mark(place=row["place"], number=row["seq"])
            for row in rows
        ]

    def rows(self) -> list[Row]:
        return [
            Row(key=f"{table}:{row['id']}", event=row["event"], seq=row["seq"])
            for table in ("flight", "gate")
            for row in self._run("fetch", f"SELECT id, event, seq FROM {table}")
        ]

    def _run(self, name: str, *words: Any) -> Any:
        return self._runner.run(getattr(self._connection, name)(*words))
