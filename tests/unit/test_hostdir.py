"""Where socket and key are, and which keys are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lxc_pool import hostdir
from lxc_pool.errors import AccessDenied, HostDirError
from tests.support.processes import as_nobody, open_descriptors


def test_the_host_dir_is_the_environments_or_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LXC_POOL_HOST_DIR", "/somewhere")
    assert hostdir.default_host_dir() == Path("/somewhere")
    monkeypatch.setenv("LXC_POOL_HOST_DIR", "")
    assert hostdir.default_host_dir() == Path("/run/lxc-pool")
    monkeypatch.delenv("LXC_POOL_HOST_DIR")
    assert hostdir.default_host_dir() == Path("/run/lxc-pool")


def test_a_path_longer_than_a_socket_may_have_is_refused_with_what_to_do() -> None:
    longest = Path("/" + "x" * (hostdir.MAX_SOCKET_PATH - len("/") - len("/pool.sock")))
    assert len(str(hostdir.socket_path(longest))) == hostdir.MAX_SOCKET_PATH
    with pytest.raises(HostDirError, match="choose a shorter host dir"):
        hostdir.socket_path(Path(f"{longest}x"))


def test_the_key_is_read_as_raw_bytes(tmp_path: Path) -> None:
    key = bytes(range(256))
    hostdir.key_path(tmp_path).write_bytes(key)
    assert hostdir.read_key(tmp_path) == key


def test_a_missing_key_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hostdir.read_key(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 4097])
def test_an_empty_or_far_too_long_key_is_none(tmp_path: Path, content: bytes) -> None:
    hostdir.key_path(tmp_path).write_bytes(content)
    with pytest.raises(HostDirError, match="does not hold a key"):
        hostdir.read_key(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"key")
    hostdir.key_path(tmp_path).symlink_to(tmp_path / "other")
    with pytest.raises(HostDirError, match="can't be opened as a key"):
        hostdir.read_key(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_no_key_and_does_not_block(tmp_path: Path, make: object) -> None:
    make(hostdir.key_path(tmp_path))  # type: ignore[operator]  # one of the two above
    before = open_descriptors()
    with pytest.raises(HostDirError, match="not a regular file"):
        hostdir.read_key(tmp_path)
    assert open_descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_an_unreadable_key_is_refused_with_the_group_to_be_in(open_path: Path) -> None:
    path = hostdir.key_path(open_path)
    path.write_bytes(b"key")
    path.chmod(0o640)
    os.chown(path, 0, 12345)
    kind, message = as_nobody(lambda: hostdir.read_key(open_path))
    assert kind is AccessDenied
    assert "group 12345" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_key_in_a_closed_directory_is_refused_with_whom_to_ask(open_path: Path) -> None:
    hostdir.key_path(open_path).write_bytes(b"key")
    open_path.chmod(0o700)
    kind, message = as_nobody(lambda: hostdir.read_key(open_path))
    assert kind is AccessDenied
    assert "ask the administrator" in message


@pytest.mark.parametrize("visible", [True, False])
def test_a_key_that_the_kernel_does_not_let_us_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, visible: bool
) -> None:
    if visible:
        hostdir.key_path(tmp_path).write_bytes(b"key")

    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessDenied, match="belongs to group" if visible else "the service's group"):
        hostdir.read_key(tmp_path)


def test_a_key_that_can_not_be_opened_for_another_reason_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostDirError, match="can't be opened as a key: Input/output error"):
        hostdir.read_key(tmp_path)
