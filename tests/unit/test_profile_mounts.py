"""What a profile mounts is put where it belongs, and nowhere else; `tests/lxc/test_mounts.py` has the containers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lxc_pool.backend.lxc import profile_mounts
from lxc_pool.config import MountConfig
from lxc_pool.errors import StartFailed
from lxc_pool.host import mount_calls, mount_lock
from tests.support.processes import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")

OWNER = 0x70000000
"""Whom the container's root is on the host."""

SOMEBODY = 64001


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A root file system, with what a hostile image may have in it."""
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").touch()
    (root / "out").symlink_to(tmp_path)
    (root / "etc/out").symlink_to(tmp_path / "file")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/name").write_text("data")
    (tmp_path / "file").write_text("file")
    return root


def in_own_mounts(action: Callable[[], Any]) -> Any:
    """Call *action* in a child whose mounts are its own."""

    def act() -> Any:
        mount_lock.leave_hosts_mounts()
        return action()

    return in_child(act)


def put(rootfs: Path, source: Path | str, dst: str, *, readonly: bool = True, lock: bool = False) -> None:
    profile_mounts.put([MountConfig(str(source), dst, readonly)], rootfs, OWNER, lock=lock)


@pytest.mark.parametrize("lock", [False, True])
def test_directories_and_files_are_mounted_where_they_are_wanted(rootfs: Path, tmp_path: Path, *, lock: bool) -> None:
    def act() -> tuple[str, ...]:
        put(rootfs, tmp_path / "data", "/srv/a/data", lock=lock)
        put(rootfs, tmp_path / "file", "/etc/passwd", lock=lock)
        put(rootfs, tmp_path / "file", "/etc/new", lock=lock)
        return tuple((rootfs / path).read_text() for path in ("srv/a/data/name", "etc/passwd", "etc/new"))

    assert in_own_mounts(act) == ("data", "file", "file")
    # What was missing is the container's root's.
    for path in ("srv", "srv/a", "srv/a/data", "etc/new"):
        assert ((rootfs / path).stat().st_uid, (rootfs / path).stat().st_gid) == (OWNER, OWNER)
    assert (rootfs / "etc").stat().st_uid == 0
    assert list((rootfs / "srv/a/data").iterdir()) == []  # but for the child's mount


def test_one_that_is_locked_stays_as_it_is(rootfs: Path, tmp_path: Path) -> None:
    def remount() -> None:
        mount_calls.mount("none", str(rootfs / "data"), flags=0x1020 | mount_calls.NOSUID)  # MS_REMOUNT | MS_BIND

    def act() -> list[str]:
        put(rootfs, tmp_path / "data", "/data", lock=True)
        attempts: list[Callable[[], None]] = [(rootfs / "data/new").touch, remount]
        said = []
        for attempt in attempts:
            try:
                attempt()
                said.append("done")
            except OSError as error:
                said.append(error.strerror or "")
        return said

    assert in_own_mounts(act) == ["Read-only file system", "Operation not permitted"]


def test_of_a_writable_one_the_owner_is_the_containers_root(rootfs: Path, tmp_path: Path) -> None:
    os.chown(tmp_path / "data", SOMEBODY, SOMEBODY)

    def act() -> list[int]:
        put(rootfs, tmp_path / "data", "/data", readonly=False)
        return [(rootfs / "data").stat().st_uid, (rootfs / "data/name").stat().st_uid]

    assert in_own_mounts(act) == [OWNER, 65534]


@pytest.mark.parametrize(
    ("source", "dst", "readonly", "words"),
    [
        ("missing", "/mnt/x", True, "failed: No such file"),
        ("/dev/null", "/mnt/x", True, "neither a directory nor a regular file"),
        ("data", "/mnt/x", False, "is writable and root's"),
        ("data", "/out/x", True, "Not a directory (out); links of the image are not followed"),
        ("data", "/out", True, "Not a directory (out)"),
        ("data", "/etc/passwd", True, "Not a directory (passwd)"),
        ("data", "/etc/passwd/x", True, "Not a directory (passwd)"),
        ("file", "/etc", True, "no regular file (etc)"),
        ("file", "/etc/out", True, "no regular file (out)"),
    ],
)
def test_what_can_not_be_mounted_is_told(
    rootfs: Path, tmp_path: Path, source: str, dst: str, words: str, *, readonly: bool
) -> None:
    before = sorted(tmp_path.iterdir())
    kind, said = in_own_mounts(lambda: put(rootfs, tmp_path / source, dst, readonly=readonly))
    assert kind is StartFailed
    assert words in said
    assert f"mount of {tmp_path / source}" in said
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "file"
