"""Terminals of commands, with pseudo-terminals of this host and no container: requests, masters, the relay."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.cli import terminal as cli_terminal
from lxc_pool.client.control import Control
from lxc_pool.client.process import Process
from lxc_pool.client.stdio import Streams
from lxc_pool.errors import ExecFailed
from lxc_pool.execution import packets, terminal
from lxc_pool.execution.cgroups import CommandCgroup
from lxc_pool.execution.command import Command, Loop
from lxc_pool.execution.protocol import (
    OPENED,
    ExecRequest,
    Exited,
    Failed,
    ProtocolError,
    Started,
    Terminal,
    decode_event,
    wants_terminal,
)
from lxc_pool.execution.strays import Hunt, mark
from tests.support.processes import open_descriptors, sleeper
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    eventually(lambda: open_descriptors() == before, "descriptors are closed")


@pytest.fixture
def pty() -> Iterator[tuple[int, int]]:
    """Master and slave."""
    master, slave = os.openpty()
    yield master, slave
    for descriptor in (master, slave):
        with contextlib.suppress(OSError):
            os.close(descriptor)


@pytest.fixture
def control() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, its = packets.pair()
    with ours, its:
        yield ours, its


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [Terminal(24, 80), Terminal(0, 0, ()), Terminal(65535, 65535, (0, 2))])
def test_a_request_for_a_terminal_survives_the_way(wanted: Terminal) -> None:
    request = ExecRequest.create(["sh", "-c", ""], {"TERM": "xterm"}, "/tmp", "a:b", wanted)
    assert ExecRequest.decode(request.encode()) == request
    assert pickle.loads(pickle.dumps(request)) == request  # noqa: S301  # our own
    assert wants_terminal(request.encode())
    assert not wants_terminal(ExecRequest.create(["sh"]).encode())


@pytest.mark.parametrize("rest", [b"", b"\0\0\0\0", b"\0\0\0\0\x08/\0\0a", b"\0\0\0\0\xff/\0\0a"])
def test_what_is_no_request_for_a_terminal_is_refused(rest: bytes) -> None:
    with pytest.raises(ProtocolError):
        ExecRequest.decode(struct.pack("<4sIII", b"lxt1", 1, 0, 0) + rest)


# --- masters ----------------------------------------------------------------------------------------------------------


def test_only_a_master_is_taken_for_one(pty: tuple[int, int], tmp_path: Path) -> None:
    terminal.check_master(pty[0])
    with contextlib.ExitStack() as stack:
        (tmp_path / "file").touch()
        refused = [os.open(path, os.O_RDONLY) for path in ("/dev/null", "/dev/zero", "/", tmp_path / "file")]
        refused += [os.open(f"/proc/self/fd/{pty[0]}", os.O_PATH), *os.pipe(), os.memfd_create("x")]
        refused += [sock.detach() for sock in socket.socketpair()]
        for descriptor in refused:
            stack.callback(os.close, descriptor)
        for descriptor in (*refused, pty[1], 9999):
            with pytest.raises(OSError, match="no pseudo-terminal"):
                terminal.check_master(descriptor)


def test_of_several_descriptors_beside_a_message_one_is_received(
    pty: tuple[int, int], control: tuple[socket.socket, socket.socket]
) -> None:
    ours, its = control
    socket.send_fds(its, [b"two"], list(pty))
    data, descriptor = packets.receive_beside(ours)
    assert (data, os.path.samestat(os.fstat(descriptor), os.fstat(pty[0]))) == (b"two", True)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    its.send(b"none")
    assert packets.receive_beside(ours) == (b"none", -1)


def hear(wants: bool, sent: list[tuple[bytes, int]], tmp_path: Path) -> tuple[list[Started | Failed | Exited], int]:
    """Let a supervisor hear *sent* of a command that has begun; return what its client is told and handed."""
    loop = Loop()
    ours, its = packets.pair()
    report, sender = packets.pair()
    (tmp_path / "command").mkdir()
    hunt = Hunt(str(tmp_path / "command"), mark(), pytest.fail)
    command = Command(loop, CommandCgroup(str(tmp_path), "command"), its, hunt, lambda _: None, wants_terminal=wants)
    with ours, sleeper() as process:
        command.begin(process.pid, os.pidfd_open(process.pid), report)
        with sender:
            for message, descriptor in sent:
                packets.send_beside(sender, message, descriptor)
        while command._entering:
            loop.turn()
        if not command._killed:
            process.kill()
            while not command._over:
                loop.turn()
            ours.shutdown(socket.SHUT_WR)  # or it would wait for an order to kill what came of it
        while not command.done:
            loop.turn()
        process.returncode = -9  # the supervisor has waited for it
        heard: list[Started | Failed | Exited] = []
        received = -1
        while True:
            data, descriptor = packets.receive_beside(ours)
            if not data:
                return heard, received
            received = max(received, descriptor)
            heard.append(decode_event(data))


def test_a_master_goes_to_the_client_that_asked_for_it(pty: tuple[int, int], tmp_path: Path) -> None:
    (started, exited), descriptor = hear(True, [(OPENED, pty[0]), (OPENED, pty[1])], tmp_path)
    assert (type(started), exited) == (Started, Exited(-9))
    terminal.check_master(descriptor)
    os.close(descriptor)


def test_what_is_no_master_goes_to_nobody_and_ends_the_command(pty: tuple[int, int], tmp_path: Path) -> None:
    root = os.open("/", os.O_RDONLY)
    try:
        (failed,), descriptor = hear(True, [(OPENED, root), (OPENED, pty[1])], tmp_path)
    finally:
        os.close(root)
    assert (failed, descriptor) == (Failed(25, "enter", "no pseudo-terminal came out of the container"), -1)


def test_a_master_that_nobody_asked_for_goes_to_nobody(pty: tuple[int, int], tmp_path: Path) -> None:
    (started, _), descriptor = hear(False, [(OPENED, pty[0])], tmp_path)
    assert (type(started), descriptor) == (Started, -1)


def test_a_terminal_that_does_not_arrive_is_an_error() -> None:
    def launch(_request: ExecRequest, descriptors: tuple[int, int, int, int]) -> None:
        with socket.socket(fileno=os.dup(descriptors[3])) as supervisor:
            supervisor.send(Started(os.getpid()).encode())

    with pytest.raises(ExecFailed, match="did not arrive"):
        Process.start(launch, ["x"], tty=True)


# --- the relay --------------------------------------------------------------------------------------------------------


class CountingRelay(cli_terminal._Relay):
    """Counts how often it looks for output."""

    looks = 0

    def _show(self) -> int:
        self.looks += 1
        return super()._show()


def test_the_relay_sleeps_while_the_command_has_its_terminal_closed(
    pty: tuple[int, int], control: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, typed = os.pipe()
    shown, screen = os.pipe()
    signalled, signaller = os.pipe()
    monkeypatch.setattr(cli_terminal, "STDIN", keys)
    monkeypatch.setattr(cli_terminal, "STDOUT", screen)
    ours, its = control
    process = Process(["x"], Control(socket.socket(fileno=os.dup(ours.fileno()))), Streams(-3, -3, -3))
    process.terminal = os.dup(pty[0])
    os.set_blocking(process.terminal, False)
    name = os.ttyname(pty[1])
    os.write(pty[1], b"first ")
    os.close(pty[1])
    relay = CountingRelay(process, signalled)
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        assert os.read(shown, 100) == b"first "
        time.sleep(0.05)  # there is no event for that nothing happens
        assert relay.looks < 10
        again = os.open(name, os.O_RDWR | os.O_NOCTTY)
        os.write(again, b"again")
        assert os.read(shown, 100) == b"again"
        os.write(typed, b"keys\n")
        assert os.read(again, 100) == b"keys\n"
        os.close(again)
    finally:
        its.send(Exited(0).encode())
        thread.join()
    process.close()
    for descriptor in (keys, typed, shown, screen, signalled, signaller):
        os.close(descriptor)
