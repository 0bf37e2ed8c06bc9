"""Answers of the kernel's over netlink, and what somebody else may put between them; real sockets where root may."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess

import pytest

from lxc_pool.host import netlink
from lxc_pool.host.netlink import Observer, has_table, isolate

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

DONE = struct.pack("=IHHII", 16, 3, 0, 1, 0)


class ScriptedSocket:
    """A socket that datagrams have come on, each with its sender's port; the kernel's is 0."""

    def __init__(self, *datagrams: tuple[bytes, int]) -> None:
        self._datagrams = list(datagrams)

    def recvfrom(self, _most: int) -> tuple[bytes, tuple[int, int]]:
        data, sender = self._datagrams.pop(0)
        return data, (sender, 0)


def read(*datagrams: tuple[bytes, int]) -> list[bytes]:
    return list(netlink._messages(ScriptedSocket(*datagrams)))  # type: ignore[arg-type]  # all that it needs of one


def test_what_is_not_the_kernels_is_passed_over() -> None:
    link = struct.pack("=IHHII", 20, 16, 0, 1, 0) + b"true"
    forged = struct.pack("=IHHII", 20, 16, 0, 1, 0) + b"lies"
    endless = struct.pack("=IHHII", 0, 16, 0, 1, 0)
    assert read((forged, 4711), (endless, 4711), (DONE, 4711), (link, 0), (DONE, 0)) == [link]


def test_several_messages_come_in_one_piece() -> None:
    first = struct.pack("=IHHII", 19, 16, 0, 1, 0) + b"abc"
    second = struct.pack("=IHHII", 20, 16, 0, 1, 0) + b"defg"
    assert read((first + b"\0" + second + DONE, 0)) == [first, second]


def test_a_refusal_is_an_error() -> None:
    with pytest.raises(PermissionError):
        read((struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -1), 0))


@needs_root
def test_a_port_that_is_not_there_can_not_be_isolated() -> None:
    with pytest.raises(OSError, match="no interface"):
        isolate("lxp-nowhere")


@needs_root
def test_a_table_that_is_not_there_is_not_there() -> None:
    assert not has_table("lxp-nothing-of-that-name")


@needs_root
def test_an_observer_sees_the_devices_of_a_process() -> None:
    observer = Observer(os.getpid())
    try:
        assert set(observer.links()) == {name for _index, name in socket.if_nameindex()} - {"lo"}
    finally:
        observer.close()


@needs_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip")
def test_of_as_many_devices_as_a_hostile_root_may_make_not_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "_MOST_LINKS", 4)
    batch = "".join(f"link add a{number} type veth peer name b{number}\n" for number in range(3))
    command = ["unshare", "--net", "sh", "-c", "ip -batch - && echo ready && exec sleep infinity"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(batch.encode())
            process.stdin.close()
            assert process.stdout.readline() == b"ready\n"
            observer = Observer(process.pid)
            try:
                for _ in range(3):
                    with pytest.raises(OSError, match="more than 4"):
                        observer.links()
            finally:
                observer.close()
        finally:
            process.kill()


@needs_root
def test_a_process_that_has_ended_can_not_be_looked_into() -> None:
    with pytest.raises(ProcessLookupError):
        Observer(2**30)
