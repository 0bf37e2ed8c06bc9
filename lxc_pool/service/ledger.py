"""The ledger: what the service owns, on disk, so that the next one knows it after this one was killed.

SQLite in WAL mode, without fsync: containers do not survive a power cut either. One row a container, written before the
act that it announces; written with the pool's lock held, which takes some 15 µs (measured), so that rows and decisions
can't get out of step. `audit` may read it beside us.

What is announced: BUILDING before a clone, LEASED before its client learns of it, REAPING before a removal. RESERVED is
not written: nobody has used such a container, so that after a restart it is as good as warm.

A client waits while its lease is announced, and after a rest, when no cache has SQLite's code, a row takes 80 µs: a
fifth of a `get` (measured). So that goes to the intent file first, and into its row once the client has its answer.
What the intent file says holds if the row says WARM, and only then: any other row is newer, since no container that was
leased is ever warm again.

By the same rule the newest of each lease is found again whose row is lost, because the file was, or an older copy was
put in its place: when its row is written, so is a file in its container's directory, which takes 9 µs (measured). That
says what the lease is, and how often it was changed; or that the container is to be removed, which nothing revokes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.errors import BackendError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import LeaseId, State
from lxc_pool.service import intent
from lxc_pool.service.intent import IntentFile

log = logging.getLogger(__name__)

_SCHEMA = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS container (name TEXT PRIMARY KEY, entry BLOB NOT NULL) WITHOUT ROWID;
"""


class LeaseEntry(msgspec.Struct, frozen=True):
    """A lease in the ledger.

    Attributes:
        expires: Monotonic time of this boot at which it ends; None: it has no ttl.
        revision: How often it was changed since its hand-off: of two, the newer has more.
    """

    request: str
    id: LeaseId
    uid: int
    owner: ProcessIdentity | None
    expires: float | None
    revision: int = 0


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

    def intend(self, entry: Entry) -> None:
        """Do what `write` does for a container that is leased, but quicker: `settle` has to be called soon after.

        Raises:
            BackendError: It could not be written; the old one stands.
        """

    def settle(self) -> None:
        """Put what was intended last into its place.

        Raises:
            BackendError: It could not be put there; it holds nevertheless.
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
    _intent_file: IntentFile | None = None
    _intended: Entry | None = None
    _failing: bool = False

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

    def note_unknown(self, made: set[str]) -> None:
        """Compare it, once it is open, with the containers that are there: what it does not know, it has lost.

        A ledger that was emptied, or whose newest part is gone, is no corrupt one to SQLite.
        """
        assert self._database is not None, "it is open"
        known = {name for (name,) in self._database.execute("SELECT name FROM container")}
        lost = sorted(made - known)
        if lost and self.notice is None:
            self.notice = (
                f"the ledger {self.path} has lost what it knew of {len(lost)} containers on this host, {lost[0]} for "
                "one: they are removed, since nothing is written down beside them of a lease"
            )
            log.warning("%s", self.notice)

    def write(self, entry: Entry) -> None:
        """See `Journal.write`."""
        self._overtake(entry.name)
        if entry.state is State.REAPING:  # first: it is removed whether or not the row can be written
            self._write_beside(entry)
        with self._change() as database:
            _put_row(database, entry)
        if entry.state is State.LEASED:  # last: what is refused must not be found there
            self._write_beside(entry)

    def erase(self, name: str) -> None:
        """See `Journal.erase`."""
        self._overtake(name)
        with self._change() as database:
            database.execute("DELETE FROM container WHERE name = ?", (name,))

    def intend(self, entry: Entry) -> None:
        """See `Journal.intend`."""
        self.settle()
        if self._intent_file is None or self._failing:
            self.write(entry)  # and say at once that there is no room, say, instead of at the next one
            return
        try:
            self._intent_file.put(msgspec.msgpack.encode(entry))
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error
        self._intended = entry

    def settle(self) -> None:
        """See `Journal.settle`."""
        if (entry := self._intended) is None:
            return
        try:
            self.write(entry)
        except BackendError:
            self._intended = entry
            raise

    def close(self) -> None:
        """Close the files."""
        if self._database is not None:
            with contextlib.suppress(BackendError):  # the next one finds it in the intent file
                self.settle()
            self._database.close()
            self._database = None
        if self._intent_file is not None:
            self._intent_file.close()
            self._intent_file = None

    def _overtake(self, name: str) -> None:
        """Forget what was intended of a container that there is newer word of."""
        if self._intended is not None and self._intended.name == name:
            self._intended = None

    def _load(self) -> tuple[Entry, ...]:
        self.close()
        _require_files(self.path)
        # It says who has what: root's alone. The files beside it get the same mode. Source: SQLite, os_unix.c,
        # findCreateFileMode.
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "rb") as file:
                os.fchmod(file.fileno(), 0o600)
            intended = _read_intent(self.path)
            self._intent_file = IntentFile(_intent_path(self.path))
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
            _require_version(self.path, database)
            database.executescript(_TABLES)
            database.execute(f"PRAGMA user_version = {_SCHEMA}")
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            beside = _read_beside(self.path)
            entries = _entries(database, intended, beside)
            lost = [entry for entry in entries if beside.get(entry.name) is entry]
            for entry in lost:
                _put_row(database, entry)
        except BaseException:
            database.close()
            raise
        if lost and self.notice is None:
            self.notice = (
                f"the ledger {self.path} had lost what was newest of {len(lost)} leases, that of {lost[0].name} for "
                "one: it is taken from what is written down beside their containers"
            )
            log.warning("%s", self.notice)
        self._database = database
        if intended in entries:
            self._intended = intended
        return entries

    def _write_beside(self, entry: Entry) -> None:
        """Write a lease, or its end, down beside its container, too. If that is not possible, the row stands alone."""
        with contextlib.suppress(OSError):
            file = IntentFile(_path_beside(self.path, entry.name))
            try:
                file.put(msgspec.msgpack.encode(entry))
            finally:
                file.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        if self._database is None:
            raise BackendError("the ledger is closed")
        try:
            yield self._database
        except sqlite3.Error as error:
            self._failing = True
            raise self._unwritable(str(error)) from error
        self._failing = False

    def _unwritable(self, reason: str) -> BackendError:
        return BackendError(f"the ledger {self.path} can't be written: {reason}; is its disk full?")

    def _set_aside(self) -> Path:
        aside = self.path.with_name(f"{self.path.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}")
        self.path.rename(aside)
        for suffix in ("-wal", "-shm", "-intent"):
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
    _require_files(path)
    try:
        intended = _read_intent(path)  # before the rows: one that is newer is then seen
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)
        with contextlib.closing(database):
            _require_version(path, database)
            return _entries(database, intended, _read_beside(path))
    except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
        raise BackendError(f"the ledger {path} can't be read: {error}") from error


def _require_files(path: Path) -> None:
    """Refuse to open what is no file: a fifo would never be opened, and what a link leads to is not ours.

    Raises:
        BackendError: The message says what to do.
    """
    for suffix in ("", "-wal", "-shm", "-intent"):
        file = path.with_name(path.name + suffix)
        with contextlib.suppress(OSError):  # it is not there, or can't be opened either
            if not stat.S_ISREG(os.lstat(file).st_mode):
                raise BackendError(f"{file} is no file: it belongs to the ledger's; move away what is there")


def _require_version(path: Path, database: sqlite3.Connection) -> None:
    """Refuse a ledger that another version of lxc_pool has written.

    Raises:
        BackendError: The message says what to do.
    """
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version not in (0, _SCHEMA):
        raise BackendError(
            f"the ledger {path} is of version {version}, and not {_SCHEMA}: run the lxc-pool that wrote it, or remove "
            "everything with that one's `lxc-pool cleanup --all --execute`"
        )


def _intent_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-intent")


def _read_intent(path: Path) -> Entry | None:
    body = intent.read(_intent_path(path))
    return None if body is None else msgspec.msgpack.decode(body, type=Entry)


def _path_beside(path: Path, name: str) -> Path:
    return path.parent / "containers" / name / "lease"


def _read_beside(path: Path) -> dict[str, Entry]:
    """Return the leases, and ends, that are written down beside their containers, by name."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(path.parent / "containers"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):  # nothing that was written there
                if (body := intent.read(_path_beside(path, name))) is not None:
                    entry = msgspec.msgpack.decode(body, type=Entry)
                    if entry.name == name and entry.state in (State.LEASED, State.REAPING):
                        found[name] = entry
    return found


def _put_row(database: sqlite3.Connection, entry: Entry) -> None:
    database.execute("REPLACE INTO container VALUES (?, ?)", (entry.name, msgspec.msgpack.encode(entry)))


def _entries(database: sqlite3.Connection, intended: Entry | None, beside: Mapping[str, Entry]) -> tuple[Entry, ...]:
    """Return what the rows say, and where they are older, the intent file, or what is *beside* the containers."""
    rows = database.execute("SELECT entry FROM container").fetchall()
    entries = {entry.name: entry for entry in (msgspec.msgpack.decode(row[0], type=Entry) for row in rows)}
    for name, entry in beside.items():
        if name not in entries or _is_newer(entry, entries[name]):
            entries[name] = entry
    if intended is not None and intended.name in entries and entries[intended.name].state is State.WARM:
        entries[intended.name] = intended
    return tuple(entries.values())


def _is_newer(beside: Entry, row: Entry) -> bool:
    """Return whether what is written down beside a container is newer than its row."""
    if row.state is State.LEASED and beside.state is State.LEASED:
        return row.lease is not None and beside.lease is not None and beside.lease.revision > row.lease.revision
    return row.state is not State.REAPING


def _is_corruption(error: sqlite3.OperationalError) -> bool:
    # SQLITE_ERROR: what we ask for makes no sense, since its tables are not ours.
    return error.sqlite_errorcode in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
