"""The source of truth: a SQLite file with a version for each subject.

Q1  A read sees whatever was committed before it began, in any process.
Q2  Readers write nothing, so that one which is stopped in the middle holds up nobody.
Q3  While the file ``down`` is there, every read of the source fails.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

_PATIENCE_S = 10.0


class SourceDown(Exception):
    """The source of truth cannot be asked."""


class Source:
    def __init__(self, path: Path) -> None:
        self._down = path.with_name("down")
        self._file = sqlite3.connect(path, isolation_level=None, timeout=_PATIENCE_S)
        self._file.execute("PRAGMA synchronous = OFF")  # no power loss here
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS versions (subject TEXT PRIMARY KEY, version INTEGER)"
            " WITHOUT ROWID"
        )

    def version(self, subject: str) -> int:
        """Its version; 0 if it was never written."""
        if self._down.exists():
            raise SourceDown(subject)
        found = self._file.execute("SELECT version FROM versions WHERE subject = ?", (subject,))
        row = found.fetchone()
        return int(row[0]) if row else 0

    def write(self, subject: str, version: int) -> None:
        """Committed when this returns."""
        self._file.execute("REPLACE INTO versions VALUES (?, ?)", (subject, version))

    def go_down(self) -> None:
        self._down.touch()

    def come_up(self) -> None:
        self._down.unlink()

    def close(self) -> None:
        self._file.close()
