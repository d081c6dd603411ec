"""The statements that a batch is made of.

I1  The upsert and the delete change a row only if it has an older version, or none.
I2  The fence answers with the epoch in force and locks its row until the end of the
    transaction; within an epoch the position only grows, a new epoch sets it.

Names are quoted by SQLAlchemy; no SQL is put together from text. A deleted row leaves no
version behind: a replay brings it back, until it has come to the delete again.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Delete, Select, Table, and_, bindparam, case, delete, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import ReturningInsert

from .base import Progress
from .sql_rows import Row

__all__ = ["Statements", "progress_rows"]

Insert = postgresql.Insert | sqlite.Insert


class Statements:
    """What is said to one table and one progress table."""

    def __init__(
        self,
        dialect: str,
        table: Table,
        progress: Table,
        *,
        key: tuple[str, ...],
        version_column: str,
    ) -> None:
        self._insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
        self._table = table
        self._progress = progress
        self._key = key
        self._version = version_column
        self.fence = self._fence()
        self.delete = self._delete()

    def upsert(self, columns: Iterable[str]) -> Insert:
        statement = self._insert(self._table)
        stored, ours = self._table.c[self._version], statement.excluded[self._version]
        return statement.on_conflict_do_update(
            index_elements=[self._table.c[name] for name in self._key],
            set_={name: statement.excluded[name] for name in columns if name not in self._key},
            where=or_(stored.is_(None), stored < ours),
        ).inline()

    def delete_parameters(self, row: Row) -> Row:
        return {f"of_{name}": row[name] for name in (*self._key, self._version)}

    def positions(self, sink: str, shards: Iterable[int]) -> Select[tuple[int, int, int]]:
        columns = self._progress.c
        return select(columns.shard, columns.ms, columns.seq).where(
            columns.sink == sink, columns.shard.in_(list(shards))
        )

    def _delete(self) -> Delete:
        columns = self._table.c
        stored = columns[self._version]
        ours = bindparam(f"of_{self._version}", type_=stored.type)
        same = [columns[name] == bindparam(f"of_{name}") for name in self._key]
        return delete(self._table).where(*same, or_(stored.is_(None), stored < ours))

    def _fence(self) -> ReturningInsert[tuple[int, int]]:
        statement = self._insert(self._progress)
        stored, ours = self._progress.c, statement.excluded
        further = or_(stored.ms > ours.ms, and_(stored.ms == ours.ms, stored.seq > ours.seq))
        keeps = and_(stored.epoch == ours.epoch, further)
        return statement.on_conflict_do_update(
            index_elements=[stored.sink, stored.shard],
            set_={
                "epoch": case((stored.epoch > ours.epoch, stored.epoch), else_=ours.epoch),
                "ms": case((keeps, stored.ms), else_=ours.ms),
                "seq": case((keeps, stored.seq), else_=ours.seq),
            },
        ).returning(stored.shard, stored.epoch)


def progress_rows(sink: str, progress: Iterable[Progress]) -> list[Row]:
    """One row per shard, in one order for all, so that two sinks cannot deadlock."""
    rows: dict[int, Row] = {}
    for entry in sorted(progress, key=lambda entry: entry.shard):
        ms, _, seq = entry.position.partition("-")
        rows[entry.shard] = {
            "sink": sink,
            "shard": entry.shard,
            "epoch": entry.epoch,
            "ms": int(ms),
            "seq": int(seq or 0),
        }
    return list(rows.values())
