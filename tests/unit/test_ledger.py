"""What the ledger keeps, and what it does when it can't."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from lxc_pool.errors import BackendError
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.model import ContainerId, State
from lxc_pool.service import ledger
from lxc_pool.service.ledger import Entry, LeaseEntry, Ledger


def entry(name: str = "c1", state: State = State.WARM, lease: LeaseEntry | None = None) -> Entry:
    return Entry(name, "default", state, 12.5, "busybox:1", "recipe", ProcessIdentity("boot", 5, 6), lease, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def test_what_was_written_is_there_after_a_restart(path: Path) -> None:
    lease = LeaseEntry("r1", ContainerId("job", 1, 2), 1000, ProcessIdentity("boot", 7, 8), 99.5)
    first = Ledger(path)
    assert first.open() == ()
    first.write(entry("c1"))
    first.write(entry("c2", State.LEASED, lease))
    first.write(entry("c1", State.REAPING))
    first.write(entry("c3"))
    first.erase("c3")
    # No close: the service was killed.
    second = Ledger(path)
    assert second.open() == (entry("c1", State.REAPING), entry("c2", State.LEASED, lease))
    assert second.notice is None
    first.close()
    second.close()


def test_it_is_read_beside_a_service_that_writes(path: Path) -> None:
    assert ledger.read(path) == ()
    book = Ledger(path)
    book.open()
    book.write(entry())
    assert ledger.read(path) == (entry(),)
    book.write(entry("c2"))
    assert len(ledger.read(path)) == 2
    book.close()


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 8000], ids=["rubbish", "header"])
def test_a_corrupt_one_is_set_aside_and_said_so(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    book = Ledger(path)
    assert book.open() == ()
    assert book.notice is not None
    assert "corrupt" in book.notice
    (aside,) = path.parent.glob("ledger.db.corrupt-*")
    assert aside.read_bytes() == content
    book.write(entry())
    book.close()


def test_nothing_of_one_that_is_set_aside_comes_back(path: Path, tmp_path: Path) -> None:
    book = Ledger(path)
    book.open()
    for number in range(300):  # so that the file that is lost has pages which are nowhere else
        book.write(entry(f"b{number}"))
    book.close()
    book.open()
    book.write(entry("c1"))
    book.intend(entry("c1", State.LEASED, LEASE))
    place = tmp_path / "killed"
    place.mkdir()
    for suffix in ("-wal", "-intent"):  # as they are when it is killed
        (place / f"{path.name}{suffix}").write_bytes(path.with_name(f"{path.name}{suffix}").read_bytes())
    book.close()
    (place / path.name).write_bytes(b"x" * path.stat().st_size)
    again = Ledger(place / path.name)
    assert again.open() == ()
    again.write(entry("c1"))
    again.close()
    assert again.open() == (entry("c1"),)
    again.close()


def test_an_entry_that_can_not_be_decoded_makes_it_a_corrupt_one(path: Path) -> None:
    book = Ledger(path)
    book.open()
    book.close()
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("INSERT INTO container VALUES ('c1', x'c1')")
    database.close()
    with pytest.raises(BackendError, match="can't be read"):
        ledger.read(path)
    again = Ledger(path)
    assert again.open() == ()
    assert again.notice is not None
    again.close()


def test_one_of_a_later_version_is_left_alone(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(BackendError, match="version 99"):
        Ledger(path).open()
    assert not list(path.parent.glob("*.corrupt-*"))


def test_one_that_can_not_be_made_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="missing/ledger"):
        Ledger(tmp_path / "missing" / "ledger.db").open()


def test_a_write_that_fails_says_so_and_leaves_the_old_entry(path: Path) -> None:
    book = Ledger(path)
    book.open()
    book.write(entry())
    assert book._database is not None
    book._database.execute("PRAGMA query_only = ON")
    with pytest.raises(BackendError, match="can't be written"):
        book.write(entry(state=State.REAPING))
    with pytest.raises(BackendError, match="can't be written"):
        book.erase("c1")
    assert ledger.read(path) == (entry(),)
    book.close()
    with pytest.raises(BackendError, match="closed"):
        book.write(entry())


def test_nobody_but_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.touch(mode=0o644)
    path.with_name("ledger.db-intent").touch(mode=0o644)
    ledger = Ledger(path)
    ledger.open()
    ledger.write(entry())
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    ledger.close()
    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600, "ledger.db-intent": 0o600}


LEASE = LeaseEntry("r1", ContainerId("job", 1, 2), 1000, ProcessIdentity("boot", 7, 8), 99.5)


@pytest.mark.parametrize("settled", [False, True])
def test_what_was_intended_holds_after_a_restart_whether_or_not_it_was_settled(path: Path, settled: bool) -> None:
    first = Ledger(path)
    first.open()
    first.write(entry("c1"))
    first.write(entry("c2"))
    leased = entry("c2", State.LEASED, LEASE)
    first.intend(leased)
    if settled:
        first.settle()
    assert ledger.read(path) == (entry("c1"), leased)
    # No close: the service was killed.
    second = Ledger(path)
    assert second.open() == (entry("c1"), leased)
    second.settle()
    path.with_name("ledger.db-intent").unlink()
    assert ledger.read(path) == (entry("c1"), leased)
    first.close()
    second.close()


def test_each_intent_is_settled_by_the_next_and_by_the_end(path: Path) -> None:
    book = Ledger(path)
    book.open()
    entries = tuple(entry(f"c{number}", State.LEASED, LEASE) for number in range(3))
    for leased in entries:
        book.write(entry(leased.name))
        book.intend(leased)
    book.close()
    path.with_name("ledger.db-intent").unlink()
    assert ledger.read(path) == entries


@pytest.mark.parametrize("erased", [False, True])
def test_newer_word_of_a_container_overtakes_what_was_intended_of_it(path: Path, erased: bool) -> None:
    book = Ledger(path)
    book.open()
    book.write(entry())
    book.intend(entry("c1", State.LEASED, LEASE))
    if erased:
        book.erase("c1")
    else:
        book.write(entry("c1", State.REAPING))
    expected = () if erased else (entry("c1", State.REAPING),)
    assert ledger.read(path) == expected
    book.settle()
    assert ledger.read(path) == expected
    again = Ledger(path)
    assert again.open() == expected
    again.close()
    book.close()


@pytest.mark.parametrize(
    "damage", [lambda record: record[:-1], lambda record: record[:-1] + b"!", lambda record: record[:3]]
)
def test_an_intent_that_is_torn_never_was(path: Path, damage: Callable[[bytes], bytes]) -> None:
    book = Ledger(path)
    book.open()
    book.write(entry())
    book.intend(entry("c1", State.LEASED, LEASE))
    intent = path.with_name("ledger.db-intent")
    intent.write_bytes(damage(intent.read_bytes()))
    assert ledger.read(path) == (entry(),)
    again = Ledger(path)
    assert again.open() == (entry(),)
    again.close()
    book.close()


def test_a_shorter_intent_in_the_place_of_a_longer_one_is_whole(path: Path) -> None:
    book = Ledger(path)
    book.open()
    for name in ("c" * 100, "c1"):
        book.write(entry(name))
        book.intend(entry(name, State.LEASED, LEASE))
    assert dict.fromkeys(ledger.read(path)) == dict.fromkeys(
        [entry("c" * 100, State.LEASED, LEASE), entry("c1", State.LEASED, LEASE)]
    )
    book.close()


def test_while_rows_can_not_be_written_one_hand_off_is_intended_and_no_more(path: Path) -> None:
    book = Ledger(path)
    book.open()
    for name in ("c1", "c2", "c3"):
        book.write(entry(name))
    assert book._database is not None
    book._database.execute("PRAGMA query_only = ON")
    book.intend(entry("c1", State.LEASED, LEASE))
    with pytest.raises(BackendError, match="can't be written"):
        book.settle()
    with pytest.raises(BackendError, match="can't be written"):
        book.intend(entry("c2", State.LEASED, LEASE))
    with pytest.raises(BackendError, match="can't be written"):
        book.erase("c1")  # what was intended is forgotten with it
    with pytest.raises(BackendError, match="can't be written"):
        book.intend(entry("c2", State.LEASED, LEASE))
    book._database.execute("PRAGMA query_only = OFF")
    book.intend(entry("c3", State.LEASED, LEASE))
    assert ledger.read(path)[1:] == (entry("c2"), entry("c3", State.LEASED, LEASE))
    book.close()


def test_an_intent_that_has_no_room_is_an_error(path: Path) -> None:
    book = Ledger(path)
    book.open()
    book.write(entry())
    assert book._intent_file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, book._intent_file._file)
    os.close(full)
    with pytest.raises(BackendError, match=r"ledger .* can't be written: No space left.*full\?"):
        book.intend(entry("c1", State.LEASED, LEASE))
    assert ledger.read(path) == (entry(),)
    book.close()


def _make_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.timeout(10)  # a fifo is never opened
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, _make_link], ids=["fifo", "directory", "link"])
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-intent"])
def test_what_is_no_file_is_told_and_left_alone(path: Path, make: Callable[[Path], None], suffix: str) -> None:
    if suffix:
        path.touch()
    place = path.with_name(path.name + suffix)
    make(place)
    for act in (Ledger(path).open, lambda: ledger.read(path)):
        with pytest.raises(BackendError, match=f"{place} is no file.*move away"):
            act()
    assert os.path.lexists(place)


def test_one_with_tables_of_others_is_a_corrupt_one(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE container (something INTEGER)")
    book = Ledger(path)
    assert book.open() == ()
    assert book.notice is not None
    assert "set aside" in book.notice
    book.close()


def test_one_of_another_version_is_not_read_either(path: Path) -> None:
    book = Ledger(path)
    book.open()
    book.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(BackendError, match="version 7"):
        ledger.read(path)


LEASE = LeaseEntry("r1", ContainerId("job", 1, 2), 1000, ProcessIdentity("boot", 7, 8), 99.5)


@pytest.fixture
def beside(path: Path) -> Path:
    """The directory of container c1, in which its lease was written down."""
    directory = path.parent / "containers" / "c1"
    directory.mkdir(parents=True)
    book = Ledger(path)
    book.open()
    book.write(entry("c1", State.LEASED, LEASE))
    book.close()
    assert (directory / "lease").stat().st_mode & 0o777 == 0o600
    return directory


@pytest.mark.parametrize("older", [None, State.BUILDING, State.WARM])
@pytest.mark.usefixtures("beside")
def test_a_lease_whose_row_is_lost_is_found_beside_its_container(path: Path, older: State | None) -> None:
    path.unlink()
    book = Ledger(path)
    if older is not None:
        database = sqlite3.connect(path, isolation_level=None)
        database.executescript(ledger._TABLES)
        ledger._put_row(database, entry("c1", older))
        database.close()
        assert ledger.read(path) == (entry("c1", State.LEASED, LEASE),)
    assert book.open() == (entry("c1", State.LEASED, LEASE),)
    assert "had lost what was newest of 1 leases, that of c1" in str(book.notice)
    book.note_unknown({"c1"})
    assert "had lost" in str(book.notice)
    book.close()
    again = Ledger(path)
    assert again.open() == (entry("c1", State.LEASED, LEASE),)
    assert again.notice is None
    again.close()


def test_what_is_beside_a_container_is_as_new_as_its_row(beside: Path, path: Path) -> None:
    kept = LeaseEntry("r1", "x", 1000, None, 1e9)  # shorter than what was there
    book = Ledger(path)
    book.open()
    book.intend(entry("c1", State.LEASED, kept))
    book.settle()
    book.close()
    path.unlink()
    assert book.open() == (entry("c1", State.LEASED, kept),)
    book.close()
    assert (beside / "lease").exists()


@pytest.mark.parametrize("act", [State.LEASED, State.REAPING])
def test_an_older_copy_revokes_nothing(beside: Path, path: Path, act: State) -> None:
    """Of a lease that was changed, the newest holds; one that has ended does not come back."""
    assert (beside / "lease").exists()
    copy = path.read_bytes()
    changed = LeaseEntry("r1", "x", 1000, None, 1.0, revision=1)
    newest = entry("c1", act, changed if act is State.LEASED else None)
    book = Ledger(path)
    book.open()
    book.write(newest)
    book.close()
    path.write_bytes(copy)
    assert ledger.read(path) == (newest,)
    assert book.open() == (newest,)
    assert "had lost" in str(book.notice)
    book.close()


@pytest.mark.usefixtures("beside")
def test_a_container_is_known_to_be_removed_though_its_row_can_not_be_written(path: Path) -> None:
    book = Ledger(path)
    book.open()
    assert book._database is not None
    book._database.execute("PRAGMA query_only = ON")
    with pytest.raises(BackendError):
        book.write(entry("c1", State.REAPING))
    book.close()
    assert book.open() == (entry("c1", State.REAPING),)
    book.close()


@pytest.mark.usefixtures("beside")
def test_a_change_that_is_refused_does_not_hold(path: Path) -> None:
    book = Ledger(path)
    book.open()
    assert book._database is not None
    book._database.execute("PRAGMA query_only = ON")
    with pytest.raises(BackendError):
        book.write(entry("c1", State.LEASED, LeaseEntry("r1", "x", 1000, None, 1.0, revision=1)))
    book.close()
    assert book.open() == (entry("c1", State.LEASED, LEASE),)
    book.close()


@pytest.mark.parametrize("newer", [State.REAPING, State.LEASED])
@pytest.mark.usefixtures("beside")
def test_what_a_newer_row_says_holds(path: Path, newer: State) -> None:
    book = Ledger(path)
    book.open()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        ledger._put_row(database, entry("c1", newer))
    book.close()
    assert book.open() == (entry("c1", newer),)
    assert book.notice is None
    book.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lease: lease.write_bytes(b""),
        lambda lease: lease.write_bytes(lease.read_bytes()[:-1]),
        lambda lease: lease.write_bytes(lease.read_bytes().replace(b"c1", b"c2")),
        lambda lease: lease.parent.rename(lease.parent.with_name("c2")),
        lambda lease: (lease.unlink(), lease.mkdir()),
    ],
    ids=["empty", "torn", "changed", "another's", "directory"],
)
def test_what_is_no_lease_beside_a_container_is_none(beside: Path, path: Path, spoil: Callable[[Path], object]) -> None:
    path.unlink()
    spoil(beside / "lease")
    book = Ledger(path)
    assert book.open() == ()
    assert book.notice is None
    book.close()


def test_what_it_should_know_and_does_not_is_said_once(path: Path) -> None:
    book = Ledger(path)
    book.open()
    book.write(entry("c1"))
    book.note_unknown({"c1"})
    before = book.notice
    book.note_unknown({"c1", "c2", "c3"})
    after = book.notice
    book.close()
    assert before is None
    assert after is not None
    assert "lost what it knew of 2 containers on this host, c2" in after
