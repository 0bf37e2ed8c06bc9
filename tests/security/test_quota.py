"""Disks that are bounded by project quotas: what root of a container tries against that, and what it leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool import PoolServiceProxy
from lxc_pool.host import apparmor, idranges
from tests.security.attackers import Attacker
from tests.support import quota_disk
from tests.support.quota_disk import projects
from tests.support.real_service import Service
from tests.support.waiting import eventually

_DISK = 48 << 20
_INODES = _DISK // 16384
_LEVELS = _INODES - 500

_CONFIGURATION = f"""\
[pool]
workers = 2
[profile.default]
size = 2
disk = {_DISK}
memory = 134217728
[profile.root]
size = 0
max = 1
privileged = true
"""

_REFUSED = re.compile("quota exceeded|No space left")
"""ext4 and XFS say it differently."""

_PATIENCE = 120.0
"""Seconds for removals, which some machines that have these file systems only emulate."""


@pytest.fixture(scope="module", params=sorted(quota_disk.KINDS))
def disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory(prefix="lxp-quota-") as directory,
        quota_disk.mounted(request.param, Path(directory, "disk")) as place,
    ):
        Path(directory).chmod(0o755)
        yield place


@pytest.fixture(scope="module")
def real(images: Path, disk: Path) -> Iterator[Service]:
    service = Service(images, place=disk)
    try:
        service.start(config=_CONFIGURATION)
        yield service
    finally:
        service.close()


def _gone(service: Service, name: str) -> bool:
    return not (service.containers / name).exists() and not (service.containers / ".discarded" / name).exists()


def _release(service: Service, attacker: Attacker) -> None:
    """Give a container back, and wait until nothing of its layer is left."""
    attacker.container.release()
    eventually(lambda: _gone(service, attacker.container.name), "the layer is removed", _PATIENCE)
    assert attacker.first_id not in projects(service.directory)
    assert attacker.first_id not in idranges.taken()


def test_it_is_said_which_bound_is_in_force(real: Service, pool: PoolServiceProxy) -> None:
    assert pool.status().disk_bound == "project quota"
    assert "project quota" in real.cli("check", "--state-dir", real.state_dir).stdout


def test_a_disk_that_is_full_is_full_for_its_container_alone(
    real: Service, disk: Path, new_attacker: Callable[[], Attacker]
) -> None:
    attacker, neighbour = new_attacker(), new_attacker()
    assert _REFUSED.search(attacker.shell("dd if=/dev/zero of=/full bs=64k"))
    record = projects(disk)[attacker.first_id]
    assert _DISK - (1 << 20) < record.used <= _DISK
    assert _REFUSED.search(attacker.shell("dd if=/dev/zero of=/more bs=64k count=100"))
    assert "ok" in neighbour.shell("dd if=/dev/zero of=/file bs=64k count=100 && sync && echo ok")
    assert "ok" in attacker.shell("rm -f /full /more && dd if=/dev/zero of=/file bs=64k count=100 && echo ok")
    _release(real, attacker)


def test_what_is_written_through_memory_counts_too(disk: Path, attacker: Attacker) -> None:
    said = attacker.run("map", "/mapped", str(2 * _DISK))
    assert said["signal"] == "7"  # SIGBUS
    assert projects(disk)[attacker.first_id].used <= _DISK


def test_files_without_content_are_bounded(real: Service, disk: Path, attacker: Attacker) -> None:
    assert _REFUSED.search(attacker.shell("mkdir /m; cd /m; i=0; while : >f$i; do i=$((i+1)); done"))
    assert projects(disk)[attacker.first_id].inodes == _INODES
    _release(real, attacker)


def test_root_of_a_container_gets_nothing_out_of_its_quota(disk: Path, attacker: Attacker) -> None:
    before = projects(disk)[attacker.first_id]
    said = attacker.run("projects", "/file")
    assert (said.pop("get"), said.pop("project"), said.pop("inherited")) == ("ok", str(attacker.first_id), "ok")
    assert set(said) == {
        *("another", "none", "uninherited", "unflagged", "files-none", "append-only", "immutable", "limit", "off")
    }
    assert set(said.values()) <= {"EINVAL", "EPERM", "ENOSYS"}, said  # the last: an overlay has no quotas
    after = projects(disk)[attacker.first_id]
    assert (after.limit, after.inodes_limit) == (before.limit, before.inodes_limit) == (_DISK, _INODES)


def test_a_hostile_tree_is_removed_and_nothing_that_it_leads_to(
    real: Service, disk: Path, pool: PoolServiceProxy, attacker: Attacker
) -> None:
    witness = disk / "witness"
    witness.mkdir()
    (witness / "file").touch()
    said = attacker.run("deep", "/deep", str(_LEVELS))
    # Far deeper than a path can be long, or a program recurse. AppArmor refuses what has a path of more than 8 KiB.
    # Source: Linux security/apparmor/lsm.c, aa_g_path_max.
    assert int(said["levels"]) > (20 if apparmor.is_on() else 1000)
    name = "n" * 255
    attacker.shell(
        f"mkdir -p /wide/{name}; cd /wide; for i in 1 2 3 4 5 6 7 8 9; do mkdir -p $i/$i/$i; done; "
        f"ln -s {witness} {name}/link; ln -s {witness}/file $name; ln {name}/link hard; mkfifo fifo; "
        "mkdir /0 /1 /delta; touch /0/1 /2; chmod 0 /wide; mount -t tmpfs none /wide/1/1"
    )
    layer = real.containers / attacker.container.name / "layer"
    # What only the host's root can do, looking at what a test has left, say.
    for flag in "ia":
        (layer / "delta" / flag).mkdir()
        (layer / "delta" / flag / "file").touch()
        subprocess.run(["chattr", f"+{flag}", layer / "delta" / flag / "file", layer / "delta" / flag], check=True)
    attacker.container.release()
    with pool.lease("meanwhile", timeout=30) as other:
        assert other.run(["true"]).returncode == 0
    _release(real, attacker)
    assert (witness / "file").exists()
    (witness / "file").unlink()
    witness.rmdir()


def test_ids_are_kept_while_anything_of_theirs_is_and_nobody_waits_for_it(
    real: Service, disk: Path, pool: PoolServiceProxy, attacker: Attacker
) -> None:
    attacker.shell("echo x >/file")
    with (real.containers / attacker.container.name / "layer/delta/file").open("rb"):
        attacker.container.release()
        layer = real.containers / ".discarded" / attacker.container.name / "layer"
        eventually(lambda: layer.parent.exists() and not layer.exists(), "all but the open file is gone", _PATIENCE)
        for _ in range(4):
            with pool.lease("next", timeout=60) as other:
                assert Attacker(other, b"").first_id != attacker.first_id
        assert projects(disk)[attacker.first_id].inodes >= 1
        assert attacker.first_id in idranges.taken()
        assert real.cli("audit", "--state-dir", real.state_dir).stdout == "clean\n"  # it is the service's
    eventually(lambda: _gone(real, attacker.container.name), "it is removed", _PATIENCE)
    assert attacker.first_id not in projects(disk)


def test_a_project_that_is_somebody_elses_is_left_alone(
    disk: Path, pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    free = next(
        project
        for project in range(idranges.DEFAULT_BASE, idranges.LIMIT, idranges.SIZE)
        if project not in idranges.taken() and project not in projects(disk)
    )
    theirs = disk / "theirs"
    theirs.mkdir()
    subprocess.run(["chattr", "-p", str(free), "+P", theirs], check=True)
    try:
        for _ in range(4):
            with pool.lease("x", timeout=60) as container:
                assert Attacker(container, b"").first_id != free
            pool.wait_ready(timeout=60)
    finally:
        theirs.rmdir()


def test_a_privileged_container_has_a_tmpfs(real: Service, pool: PoolServiceProxy) -> None:
    with pool.lease("x", profile="root", timeout=60) as container:
        assert not (real.containers / container.name / "layer").exists()
        size = container.run(["df", "-k", "/"], capture_output=True, text=True).stdout.splitlines()[1].split()[1]
        assert int(size) == 512 << 10


def test_without_room_for_all_layers_a_new_one_is_a_tmpfs(real: Service, disk: Path, pool: PoolServiceProxy) -> None:
    status = os.statvfs(disk)
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, status.f_bavail * status.f_frsize - (300 << 20))
    try:
        assert pool.status().disk_bound == "tmpfs"
        with pool.lease("x", timeout=60), pool.lease("y", timeout=60):
            pool.wait_ready(timeout=60)
            infos = [info for info in pool.containers() if info.profile == "default"]
            warm = [info.name for info in infos if info.state == "warm"]
            assert len(warm) == 2
            assert not any((real.containers / name / "layer").exists() for name in warm)
    finally:
        (disk / "filler").unlink()
    eventually(lambda: pool.status().disk_bound == "project quota", "there is room again")
    for _ in range(2):  # so that the next test has containers with layers
        with pool.lease("x", timeout=60):
            pass
    pool.wait_ready(timeout=60)
