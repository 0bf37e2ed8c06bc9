"""The service's two directories: what they look like, whose they may be, and that they are one service's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lxc_pool import hostdir
from lxc_pool.errors import HostDirError
from lxc_pool.service.directories import host_dir, state_dir
from tests.support.processes import NOBODY, in_child

GROUP = os.getegid()
KEY = bytes(32)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give things to others")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_host_dir_is_made_for_the_group_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "run" / "pool"
    mask = os.umask(0o077)
    try:
        with host_dir(path, GROUP, KEY):
            assert mode(path) == 0o750
            assert mode(hostdir.key_path(path)) == 0o640
            assert path.stat().st_gid == hostdir.key_path(path).stat().st_gid == GROUP
    finally:
        os.umask(mask)


@needs_root
def test_host_dir_and_key_are_the_groups_but_stay_the_services(tmp_path: Path) -> None:
    with host_dir(tmp_path / "pool", 12345, KEY):
        for path in (tmp_path / "pool", hostdir.key_path(tmp_path / "pool")):
            assert (path.stat().st_uid, path.stat().st_gid) == (0, 12345)


def test_a_service_puts_its_key_there_and_takes_it_away_at_the_end(tmp_path: Path) -> None:
    with host_dir(tmp_path, GROUP, KEY):
        assert hostdir.read_key(tmp_path) == KEY
    assert not hostdir.key_path(tmp_path).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["service.lock"]


def test_a_key_that_a_killed_service_left_is_replaced_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    hostdir.key_path(tmp_path).write_bytes(b"old")
    (tmp_path / f".authkey.{os.getpid()}").write_bytes(b"partial")
    with host_dir(tmp_path, GROUP, KEY):
        assert hostdir.read_key(tmp_path) == KEY
        hostdir.key_path(tmp_path).unlink()  # whoever removes it does no harm to the end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["service.lock"]


def test_a_link_in_the_keys_place_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    path = tmp_path / "pool"
    path.mkdir()
    hostdir.key_path(path).symlink_to(tmp_path / "victim")
    with host_dir(path, GROUP, KEY):
        assert not hostdir.key_path(path).is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_a_second_service_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with host_dir(tmp_path / "host", GROUP, KEY), state_dir(tmp_path / "state"):
        with pytest.raises(HostDirError, match=f"host dir .* is in use by the service with pid {os.getpid()}"):
            host_dir(tmp_path / "host", GROUP, b"another").__enter__()
        with pytest.raises(HostDirError, match=f"state dir .* is in use by the service with pid {os.getpid()}"):
            state_dir(tmp_path / "state").__enter__()
        assert hostdir.read_key(tmp_path / "host") == KEY


def test_a_lock_of_a_service_that_is_gone_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "service.lock").write_text("4194304000\nold and longer than a pid\n", encoding="ascii")
    with host_dir(tmp_path, GROUP, KEY):
        assert (tmp_path / "service.lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_that_says_nothing_yet_is_a_service_that_is_starting(tmp_path: Path) -> None:
    with state_dir(tmp_path):
        (tmp_path / "service.lock").write_text("", encoding="ascii")
        with pytest.raises(HostDirError, match=r"pid \(starting\)"):
            state_dir(tmp_path).__enter__()


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/null"), lambda path: path.mkdir()])
def test_a_lock_file_that_is_none_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "service.lock")  # type: ignore[operator]  # one of the two above
    with pytest.raises(HostDirError, match="can't open the lock file"):
        state_dir(tmp_path).__enter__()


def test_the_instances_id_is_made_once_and_stays(tmp_path: Path) -> None:
    with state_dir(tmp_path / "a") as first:
        assert len(first) == 6
        assert {path.name for path in (tmp_path / "a").iterdir()} == {
            "service.lock",
            "containers",
            "images",
            "instance",
        }
    with state_dir(tmp_path / "a") as again, state_dir(tmp_path / "b") as other:
        assert again == first != other


@pytest.mark.parametrize("text", ["", "12345", "12345g", "../../x", "0123456", "\x00\xff"])
def test_an_instance_id_that_is_none_is_refused_not_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "instance").write_text(text, encoding="latin-1")
    with pytest.raises(HostDirError, match="does not hold an instance id"):
        state_dir(tmp_path).__enter__()
    assert (tmp_path / "instance").read_text(encoding="latin-1") == text


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(HostDirError, match="absolute"):
        state_dir(Path("state")).__enter__()


def test_a_link_to_a_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(HostDirError, match="is not a directory"):
        host_dir(tmp_path / "link", GROUP, KEY).__enter__()
    assert list((tmp_path / "real").iterdir()) == []


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostDirError, match="can't make"):
        host_dir(tmp_path / "file", GROUP, KEY).__enter__()
    with pytest.raises(HostDirError, match="can't make"):
        host_dir(tmp_path / "file" / "below", GROUP, KEY).__enter__()


@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_a_directory_that_others_may_write_to_is_refused_with_the_remedy(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "pool"
    path.mkdir()
    path.chmod(0o750 | bits)
    with pytest.raises(HostDirError, match=r"others may write to .*`chmod 0750"):
        host_dir(path, GROUP, KEY).__enter__()
    path.chmod(0o755 | bits)
    with pytest.raises(HostDirError, match=r"others may write to .*`chmod 0711"):
        state_dir(path).__enter__()


@needs_root
def test_another_users_directory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(HostDirError, match=f"belongs to uid {NOBODY}.*`chown 0 "):
        host_dir(path, GROUP, KEY).__enter__()


@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_a_place_in_which_others_could_replace_it_is_refused_with_the_remedy(tmp_path: Path, bits: int) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    place.chmod(0o755 | bits)
    for path in (place / "pool", place / "deep" / "pool", tmp_path / "link" / "pool"):
        for directory in (host_dir(path, GROUP, KEY), state_dir(path)):
            with pytest.raises(HostDirError, match=rf"others may write to {place} .*replace .*`chmod go-w {place}`"):
                directory.__enter__()
        assert not path.exists()
    place.chmod(0o1777)  # as /tmp: what is in there is its owner's
    with host_dir(place / "pool", GROUP, KEY):
        pass


@needs_root
def test_a_place_that_is_another_users_is_refused_with_the_remedy(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    os.chown(tmp_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(HostDirError, match=f"link belongs to uid {NOBODY}, who could replace"):
        host_dir(tmp_path / "link" / "pool", GROUP, KEY).__enter__()
    os.chown(place, NOBODY, NOBODY)
    with pytest.raises(HostDirError, match=f"place belongs to uid {NOBODY}.*`chown root {place}`"):
        state_dir(place / "state").__enter__()


@needs_root
def test_a_user_has_a_service_of_their_own_in_a_directory_of_their_own(open_path: Path) -> None:
    os.chown(open_path, NOBODY, NOBODY)

    def serve() -> str:
        with host_dir(open_path / "host", NOBODY, KEY), state_dir(open_path / "state"):
            return "served"

    assert in_child(serve, NOBODY) == "served"


def test_others_go_through_the_state_dir_to_nothing_but_their_own(tmp_path: Path) -> None:
    path = tmp_path / "state"
    (path / "images").mkdir(parents=True)
    (path / "images").chmod(0o755)  # as an earlier version left it
    with state_dir(path):
        assert mode(path) == mode(path / "containers") == 0o711
        assert mode(path / "images") == 0o700
