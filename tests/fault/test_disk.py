"""The disk is full, the ledger can't be written, or is lost: a clear error, no half hand-off, and all is well after."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import BackendError, LeaseError, PoolServiceProxy, PoolTimeout, State
from lxc_pool.host import idranges
from lxc_pool.host.residue import LOCKS
from tests.support.faults import FaultyService
from tests.support.oracle import Footprint, assert_healed, assert_no_larger, becomes_ready
from tests.support.waiting import eventually

CONFIG = "[pool]\nsize = 2\nworkers = 2\nmin_free = 0\n"


class Disk:
    """A small file system of its own for a state dir."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Leave not one byte."""
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def leave(self, size: int) -> None:
        """Leave so many bytes."""
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.path).free - size)

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", self.path], check=True)


@pytest.fixture
def disk() -> Iterator[Disk]:
    path = Path(tempfile.mkdtemp(prefix="lxp-test-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=0755", "none", path], check=True)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
        path.rmdir()
        shutil.rmtree(LOCKS / path.relative_to("/"), ignore_errors=True)


@pytest.fixture
def on_disk(images: Path, disk: Disk) -> Iterator[FaultyService]:
    """A service whose state dir is on the small file system."""
    service = FaultyService()
    service.state_dir = disk.path / "state"
    service.containers = service.state_dir / "containers"
    service.state_dir.mkdir(mode=0o755)
    subprocess.run(["cp", "-a", images, service.state_dir / "images"], check=True)
    try:
        yield service
    finally:
        disk.remount("rw")
        disk.empty()
        service.close()


def leased(pool: PoolServiceProxy) -> set[str]:
    return {info.name for info in pool.containers() if info.state is State.LEASED}


def lease_many(pool: PoolServiceProxy) -> None:
    """Lease until it fails: there may be some room in the ledger's own pages."""
    for _ in range(1000):
        with pool.lease("x", 1):
            pass


def test_a_full_disk_gives_nothing_out_loses_nothing_and_is_over_when_there_is_room(
    on_disk: FaultyService, disk: Disk
) -> None:
    service = on_disk
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    with pool.lease("held") as held:
        held.run(["true"], check=True)
        assert_healed(service, pool, leased=[held.name])
        before = Footprint.of(service.pid)
        disk.fill()
        with pytest.raises(BackendError, match=r"ledger .* can't be written.*full"):
            lease_many(pool)
        assert pool.echo("alive") == "alive"
        assert leased(pool) == {held.name}  # no half hand-off
        held.run(["true"], check=True)  # commands in what is leased already do not need the disk
        status = json.loads(service.cli("status", "--json").stdout)
        assert "full" in status["last_error"]
    eventually(lambda: held.name not in {info.name for info in pool.containers()}, "a release needs no room")
    disk.empty()
    becomes_ready(pool, 15)
    assert_healed(service, pool)
    with pool.lease("y") as container:
        container.run(["true"], check=True)
    assert_healed(service, pool)
    assert_no_larger(service.pid, before)


def test_below_min_free_nothing_is_made_and_what_is_warm_is_handed_out(on_disk: FaultyService, disk: Disk) -> None:
    pool = on_disk.start(config=CONFIG.replace("min_free = 0", 'min_free = "8M"'))
    pool.wait_ready()
    disk.leave(6 << 20)
    for _ in range(2):
        with pool.lease("one of the warm ones", 1) as container:
            container.run(["true"], check=True)
    eventually(lambda: "min_free is 8 MiB: make room" in (pool.status().last_error or ""), "it is said")
    with pytest.raises(PoolTimeout, match="min_free is 8 MiB"):
        pool.lease("one too many", 0.2).__enter__()
    assert pool.containers() == ()  # not even begun
    disk.empty()
    becomes_ready(pool, 15)
    assert_healed(on_disk, pool)


def test_a_service_does_not_start_on_a_full_disk_and_says_why(on_disk: FaultyService, disk: Disk) -> None:
    disk.fill()
    on_disk.launch(config=CONFIG)
    finished = on_disk.wait()
    assert finished.status == 5
    last = finished.log.splitlines()[-1]
    assert last.startswith("lxc-pool: ")
    assert "space left" in last or "full" in last
    assert "Traceback" not in finished.log
    disk.empty()
    pool = on_disk.start(config=CONFIG)
    pool.wait_ready()
    assert_healed(on_disk, pool)


def test_a_service_that_was_killed_on_a_full_disk_is_taken_up_when_there_is_room(
    on_disk: FaultyService, disk: Disk
) -> None:
    pool = on_disk.start(config=CONFIG)
    with pool.lease("held") as held:
        disk.fill()
        on_disk.kill()
        on_disk.launch(config=CONFIG)
        with contextlib.suppress(AssertionError):  # it may find room enough to start, or end with a word
            on_disk.await_ready()
        if on_disk.died():
            finished = on_disk.wait()
            assert finished.status == 5
            assert "Traceback" not in finished.log
        else:
            on_disk.kill()
        disk.empty()
        on_disk.start(config=CONFIG)
        held.run(["true"], check=True)
        assert_healed(on_disk, pool, leased=[held.name])


def test_a_service_does_not_start_on_a_read_only_disk_and_says_why(on_disk: FaultyService, disk: Disk) -> None:
    on_disk.start(config=CONFIG).wait_ready()
    on_disk.stop()
    disk.remount("ro")
    on_disk.launch(config=CONFIG)
    finished = on_disk.wait()
    assert finished.status == 5
    assert "Read-only file system" in finished.log.splitlines()[-1]
    assert "Traceback" not in finished.log


def test_a_ledger_that_becomes_read_only_stops_hand_offs_and_no_removals(service: FaultyService) -> None:
    pool = service.start(size=2)
    pool.wait_ready()
    with pool.lease("held") as held:
        assert_healed(service, pool, leased=[held.name])
        service.faults.set_read_only(True)
        last = pool.get("x", 5)  # one that is written into the intent file alone
        assert last is not None
        with last, pytest.raises(BackendError, match=r"ledger .* can't be written: attempt to write a readonly"):
            pool.get("x", 5)
        assert leased(pool) == {held.name}
        with pytest.raises(BackendError):
            held.renew(5)
        held.run(["true"], check=True)
    eventually(lambda: held.name not in {info.name for info in pool.containers()}, "a release needs no ledger")
    service.faults.set_read_only(False)
    assert_healed(service, pool)


def test_a_container_that_was_removed_while_the_ledger_was_read_only_stays_removed(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("held") as held:
        service.faults.set_read_only(True)
    eventually(lambda: held.name not in {info.name for info in pool.containers()}, "a release needs no ledger")
    service.kill()
    service.faults.set_read_only(False)
    pool = service.start(size=1)
    assert_healed(service, pool)


@pytest.mark.parametrize("known_as", ["leased", "intended", "warm"])
def test_what_was_released_while_the_ledger_could_not_be_written_is_nobodys_after_a_kill(
    service: FaultyService, known_as: str
) -> None:
    """The ledger knows it as leased, by its row or by the intent alone, or even as warm; no lane has come to it."""
    pool = service.start(size=4)
    pool.wait_ready()
    with pool.lease("held") as held:
        assert_healed(service, pool, leased=[held.name])
        if known_as != "leased":
            service.faults.set_read_only(True)
        released = pool.get("released", 5)
        assert released is not None
        released.run(["true"], check=True)
        service.faults.set_read_only(True)
        service.faults.plan("stopping", "hang")
        released.release()
        eventually(lambda: service.faults.has_happened("stopping", "hang"), "a lane is about to stop it")
        others = []
        if known_as == "warm":
            service.faults.set_read_only(False)
            others = [pool.get(number, 5) for number in range(2)]  # their intents take its intent's place
        service.kill()
        service.faults.forget()
        pool = service.start(size=4)
        names = {info.name for info in pool.containers() if info.state is not State.REAPING}
        assert released.name not in names
        held.run(["true"], check=True)
        for other in others:
            assert other is not None
            other.run(["true"], check=True)
            other.release()
        assert_healed(service, pool, leased=[held.name])
    assert_healed(service, pool)


@pytest.mark.parametrize("content", [b"no database at all" * 500, b""], ids=["rubbish", "empty"])
def test_a_ledger_that_is_lost_is_begun_anew_with_the_leases_and_the_host_cleaned_of_all_else_that_it_knew(
    service: FaultyService, content: bytes
) -> None:
    pool = service.start(size=2)
    container = pool.get("x", 30)
    assert container is not None
    pool.wait_ready()
    with service.client("c = pool.get('x', 30); print(c.name, flush=True); sys.stdin.read()") as client:
        assert client.stdout is not None
        orphan = client.stdout.readline().strip()
        (before,) = [info for info in pool.containers() if info.name == container.name]
        service.kill()
    warm = {path.name for path in service.containers.iterdir()} - {container.name, orphan}
    assert warm
    for path in service.state_dir.glob("ledger.db-*"):
        path.unlink()
    (service.state_dir / "ledger.db").write_bytes(content)
    # Of containers whose directories are gone already, only these would be left.
    gone = f"lxp-{service.instance}-abcd-1"
    lock = LOCKS / str(service.containers).lstrip("/") / f".{gone}"
    lock.touch()
    idranges.take(str(service.containers / gone))
    pool = service.start(size=2)
    container.run(["true"], check=True)
    assert_healed(service, pool, leased=[container.name])
    infos = {info.name: info for info in pool.containers()}
    assert not infos.keys() & (warm | {orphan})
    after = infos[container.name]
    assert (after.id, after.owner_pid, after.owner_uid) == (before.id, before.owner_pid, before.owner_uid)
    container.release()
    assert_healed(service, pool)
    notice = pool.status().ledger
    assert notice is not None
    if content:
        assert "corrupt" in notice
        (aside,) = service.state_dir.glob("ledger.db.corrupt-*")
        assert aside.read_bytes() == content
        assert str(aside) in notice
    else:
        assert "had lost what was newest of 2 leases" in notice
    assert notice in service.log
    assert json.loads(service.cli("status", "--json").stdout)["ledger"] == notice
    assert notice in service.cli("status").stdout


def test_an_older_copy_of_the_ledger_ends_no_lease_and_gives_nothing_out_twice(service: FaultyService) -> None:
    pool = service.start(size=2)
    pool.wait_ready()
    with pool.lease("older") as older:
        assert_healed(service, pool, leased=[older.name])
        copies = {path: path.read_bytes() for path in service.state_dir.glob("ledger.db*")}
        with pool.lease("newer") as newer:  # warm in the copy
            pool.wait_ready()
            with pool.lease("newest") as newest:  # the copy does not know it, or as being built
                pool.wait_ready()
                with pool.lease("unsettled"):
                    pass  # so that the intent file has another one
                leases = [older.name, newer.name, newest.name]
                assert_healed(service, pool, leased=leases)
                service.kill()
                for path in service.state_dir.glob("ledger.db*"):
                    path.unlink()
                for path, content in copies.items():
                    path.write_bytes(content)
                assert service.cli("cleanup", "--execute", "--state-dir", service.state_dir).returncode == 0
                pool = service.start(size=2)
                assert_healed(service, pool, leased=leases)
                for container in (older, newer, newest):
                    container.run(["true"], check=True)
                with pool.lease("x") as other:
                    assert other.name not in leases
                assert "had lost" in str(pool.status().ledger)
    assert_healed(service, pool)


def test_an_older_copy_of_the_ledger_revokes_no_renewal_no_keep_no_hand_off_and_no_release(
    service: FaultyService,
) -> None:
    pool = service.start(size=3)
    pool.wait_ready()
    script = "c = pool.get('kept', 30); print(c.name, flush=True); sys.stdin.readline(); c.keep(600)"
    with service.client(script) as keeper, subprocess.Popen(["sleep", "infinity"]) as other:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        kept = keeper.stdout.readline().strip()
        ends = time.monotonic() + 2  # not before the row says
        renewed = pool.get("renewed", 30, ttl=2)
        released = pool.get("released", 30)
        assert renewed is not None
        assert released is not None
        pool.wait_ready()
        copies = {path: path.read_bytes() for path in service.state_dir.glob("ledger.db*")}
        renewed.renew(600)
        keeper.stdin.write("\n")
        keeper.stdin.flush()
        assert keeper.wait(30) == 0
        handed = pool.get("handed", 30, owner=other.pid)
        assert handed is not None
        service.faults.plan("stopping", "hang")
        released.release()
        eventually(lambda: service.faults.has_happened("stopping", "hang"), "a lane is about to stop it")
        service.kill()
        service.faults.forget()
        eventually(lambda: time.monotonic() > ends, "what was renewed has ended by its older row")
        for path in service.state_dir.glob("ledger.db*"):
            path.unlink()
        for path, content in copies.items():
            path.write_bytes(content)
        pool = service.start(size=3)
        assert_healed(service, pool, leased=[renewed.name, kept, handed.name])
        infos = {info.name: info for info in pool.containers()}
        assert infos[handed.name].owner_pid == other.pid
        assert infos[kept].owner_pid is None
        with pytest.raises(LeaseError):
            released.run(["true"])
        other.kill()
        assert_healed(service, pool, leased=[renewed.name, kept])
    renewed.release()
    assert service.cli("release", kept).returncode == 0
    assert_healed(service, pool)


def test_an_audit_without_a_readable_ledger_says_so_and_nothing_is_removed(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as container:
        service.kill()
        saved = (service.state_dir / "ledger.db").read_bytes()
        wal = (service.state_dir / "ledger.db-wal").read_bytes()
        (service.state_dir / "ledger.db").write_bytes(b"no database at all" * 500)
        (service.state_dir / "ledger.db-wal").unlink()
        for command in (["audit"], ["cleanup"], ["cleanup", "--execute"]):
            done = service.cli(*command, "--state-dir", service.state_dir)
            assert done.returncode == 2, done
            assert "ledger" in done.stderr
            assert done.stdout == ""
        (service.state_dir / "ledger.db").write_bytes(saved)
        (service.state_dir / "ledger.db-wal").write_bytes(wal)
        pool = service.start(size=1)
        container.run(["true"], check=True)
    assert_healed(service, pool)


def test_a_state_dir_that_is_gone_for_a_while_stops_creations_and_nothing_else(service: FaultyService) -> None:
    pool = service.start(size=2)
    pool.wait_ready()
    away = service.directory / "away"
    with pool.lease("held") as held:
        assert_healed(service, pool, leased=[held.name])
        service.state_dir.rename(away)
        with pool.lease("x"):
            eventually(lambda: "state dir" in str(pool.status().last_error), "it is said")
            held.run(["true"], check=True)
            away.rename(service.state_dir)
    assert_healed(service, pool)
