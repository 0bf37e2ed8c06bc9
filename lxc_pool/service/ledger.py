"""The ledger: what the service owns, on disk, so that the next one knows it after this one was killed.

SQLite in WAL mode, without fsync: containers do not survive a power cut either. One row a container, written before the
act that it announces; written with the pool's lock held, which takes some 15 µs (measured), so that rows and decisions
can't get out of step. `audit` may read it beside us.

What is announced: BUILDING before a clone, LEASED before its client learns of it, REAPING before a removal. RESERVED is
not
written: nobody has used such a container, so that after a restart it is as good as warm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.errors import BackendError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import LeaseId, State

log = logging.getLogger(__name__)

_SCHEMA = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS container (name TEXT PRIMARY KEY, entry BLOB NOT NULL) WITHOUT ROWID;
"""


class LeaseEntry(msgspec.Struct, frozen=True):
    """A lease in the ledger.

    Attributes:
        expires: Monotonic time of this boot at which it ends; None: it has no ttl.
    """

    request: str
    id: LeaseId
    uid: int
    owner: ProcessIdentity | None
    expires: float | None


class Entry(msgspec.Struct, frozen=True):
    """A container in the ledger.

    Attributes:
        since: Monotonic time of this boot at which it came up, or its building began.
        image: The version that it was cloned from.
        recipe: What it was made by, beside the image; see `ProfileConfig.recipe`.
        endpoint: Its place in the pool's network; None: it has none.
    """

    name: str
    profile: str
    state: State
    since: float
    image: str
    recipe: str
    init: ProcessIdentity | None
    lease: LeaseEntry | None
    reason: str | None
    endpoint: Endpoint | None = None


class Journal(Protocol):
    """What the pool needs of the ledger; tests have one in memory."""

    def write(self, entry: Entry) -> None:
        """Put an entry in the place of the one of that name, if there is one.

        Raises:
            BackendError: It could not be written; the old one stands.
        """

    def erase(self, name: str) -> None:
        """Remove an entry.

        Raises:
            BackendError: It could not be removed; it stands.
        """


@dataclasses.dataclass(slots=True)
class Ledger:
    """The real `Journal`. Not thread-safe: the pool's lock guards it.

    Attributes:
        path: The file.
        notice: What people should know of it; None: all is well.
    """

    path: Path
    notice: str | None = None
    _database: sqlite3.Connection | None = None

    def open(self) -> tuple[Entry, ...]:
        """Open the ledger and return what is in it; a corrupt one is set aside and a new one begun.

        Raises:
            BackendError: It can't be opened, or made.
        """
        try:
            return self._load()
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as error:
            if isinstance(error, sqlite3.OperationalError) and not _is_corruption(error):
                raise BackendError(f"the ledger {self.path} can't be opened: {error}; is its disk full?") from error
            aside = self._set_aside()
            self.notice = f"the ledger was corrupt ({error}): it was set aside as {aside} and rebuilt from the host"
            log.warning("%s", self.notice)
        try:
            return self._load()
        except sqlite3.DatabaseError as error:
            raise BackendError(f"the ledger {self.path} can't be made: {error}") from error

    def write(self, entry: Entry) -> None:
        """See `Journal.write`."""
        with self._change() as database:
            database.execute("REPLACE INTO container VALUES (?, ?)", (entry.name, msgspec.msgpack.encode(entry)))

    def erase(self, name: str) -> None:
        """See `Journal.erase`."""
        with self._change() as database:
            database.execute("DELETE FROM container WHERE name = ?", (name,))

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _load(self) -> tuple[Entry, ...]:
        self.close()
        # It says who has what: root's alone. The files beside it get the same mode. Source: SQLite, os_unix.c,
        # findCreateFileMode.
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "rb") as file:
                os.fchmod(file.fileno(), 0o600)
        except OSError as error:
            raise BackendError(
                f"the ledger {self.path} can't be opened: {error.strerror}; is its disk full?"
            ) from error
        # Autocommit: each statement is a transaction of its own. Short timeout: a reader never blocks a writer in WAL
        # mode.
        database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA):
                raise BackendError(
                    f"the ledger {self.path} is of version {version}, this service writes {_SCHEMA}: run the lxc-pool "
                    "that wrote it, or remove everything with that one's `lxc-pool cleanup --all --execute`"
                )
            database.executescript(_TABLES)
            database.execute(f"PRAGMA user_version = {_SCHEMA}")
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            rows = database.execute("SELECT entry FROM container").fetchall()
            entries = tuple(msgspec.msgpack.decode(row[0], type=Entry) for row in rows)
        except BaseException:
            database.close()
            raise
        self._database = database
        return entries

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        if self._database is None:
            raise BackendError("the ledger is closed")
        try:
            yield self._database
        except sqlite3.Error as error:
            raise BackendError(f"the ledger {self.path} can't be written: {error}; is its disk full?") from error

    def _set_aside(self) -> Path:
        aside = self.path.with_name(f"{self.path.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}")
        self.path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).unlink()
        return aside


def read(path: Path) -> tuple[Entry, ...]:
    """Return what is in a ledger without changing it, whether or not a service uses it.

    Raises:
        BackendError: It can't be read.
    """
    if not path.exists():
        return ()
    try:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)
        with contextlib.closing(database):
            rows = database.execute("SELECT entry FROM container").fetchall()
        return tuple(msgspec.msgpack.decode(row[0], type=Entry) for row in rows)
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise BackendError(f"the ledger {path} can't be read: {error}") from error


def _is_corruption(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
