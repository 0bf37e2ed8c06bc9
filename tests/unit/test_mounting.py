"""What can be told of mounts into containers without a container; `tests/lxc/test_mounts.py` has the rest."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import stat
from pathlib import Path

import pytest

from lxc_pool.execution import mounting, operations
from lxc_pool.execution.launcher import check_mountable
from lxc_pool.execution.protocol import MOUNT, ExecRequest, ProtocolError
from lxc_pool.host import mount_calls
from tests.support.processes import in_child

_PR_GET_DUMPABLE = 3


@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFREG])
def test_directories_and_files_may_be_mounted(kind: int) -> None:
    mounting.check_type(kind | 0o644)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (stat.S_IFCHR, "a character device"),
        (stat.S_IFBLK, "a block device"),
        (stat.S_IFIFO, "a fifo"),
        (stat.S_IFSOCK, "a socket"),
        (stat.S_IFLNK, "a symbolic link"),
        (0, "something else"),
    ],
)
def test_nothing_else_may(kind: int, word: str) -> None:
    with pytest.raises(mounting.Refusal) as caught:
        mounting.check_type(kind | 0o644)
    assert word in caught.value.text
    assert caught.value.number == 0


def test_only_names_of_files_are_mountable(tmp_path: Path) -> None:
    named = os.open(tmp_path, os.O_PATH)
    opened = os.open(tmp_path, os.O_RDONLY)
    sock = socket.socket(socket.AF_UNIX).detach()
    try:
        check_mountable(named)
        for descriptor in (opened, sock):
            with pytest.raises(ValueError, match="O_PATH"):
                check_mountable(descriptor)
    finally:
        for descriptor in (named, opened, sock):
            os.close(descriptor)
    with pytest.raises(ValueError, match="can't be examined"):
        check_mountable(opened)


def test_only_the_service_asks_for_a_mount() -> None:
    encoded = ExecRequest.for_operation(MOUNT, "/mnt", "r", "1", "2").encode()
    with pytest.raises(ProtocolError, match="unknown operation"):
        ExecRequest.decode(encoded)
    assert ExecRequest.decode(encoded, trusted=True).argv == (MOUNT, "/mnt", "r", "1", "2")
    with pytest.raises(ProtocolError, match="unknown operation"):
        ExecRequest.decode(ExecRequest.for_operation("reboot").encode(), trusted=True)


def test_a_descriptors_mount_is_the_one_that_mountinfo_has(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_PATH)
    try:
        number = mount_calls.mount_id(descriptor)
    finally:
        os.close(descriptor)
    points = {
        int(line.split()[0]): line.split()[4] for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    }
    assert str(tmp_path).startswith(points[number])


def test_a_line_of_mountinfo_ends_with_a_newline_only() -> None:
    forged = b"9\v1\v0:1\v/\v/x\vrw,idmapped\v-\vext4\vx\vrw"
    text = b"7 1 0:1 / /a\r" + forged + b"\r rw - tmpfs none rw\n9 1 0:1 / /x rw - tmpfs none rw\n"
    assert mounting._line(text, 9) == b"9 1 0:1 / /x rw - tmpfs none rw".split()
    assert mounting._line(text, 8) is None


@pytest.mark.parametrize("argv", [("unmount", "/mnt"), (MOUNT, "/mnt", "r", "1", "2")])
def test_what_is_done_outside_has_a_deadline(argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_arguments: object, **_options: object) -> int:
        raise mounting.Refusal(5, "so far")

    def act() -> tuple[float, str]:
        monkeypatch.setattr(mounting, "seal", stop)
        said = ""
        try:
            operations.prepare(argv, 2**22 - 1, None)  # no such process: unmount ends there
        except mounting.Refusal as error:
            said = error.text
        return signal.getitimer(signal.ITIMER_REAL)[0], said

    left, said = in_child(act)
    assert 0 < left <= mounting.TIMEOUT
    assert said


def test_other_operations_have_none_and_keep_their_input() -> None:
    def act() -> tuple[float, bool]:
        before = os.fstat(0)
        operations.prepare(("files-out", "/etc"), os.getpid(), None)
        return signal.getitimer(signal.ITIMER_REAL)[0], os.path.samestat(os.fstat(0), before)

    assert in_child(act) == (0.0, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_who_has_made_the_user_namespace_of_a_mount_is_closed_again() -> None:
    def closed() -> tuple[bool, str]:
        mounting._make_user_namespace(mounting.Owner(1000, 1001), None)
        return bool(ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE)), Path("/proc/self/setgroups").read_text("ascii")

    assert in_child(closed) == (False, "deny\n")
