"""Parts of executing that need neither a container nor root: cgroups read from text, pumps, conversations."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool.client.communication import Communication
from lxc_pool.client.control import Control
from lxc_pool.client.process import Process
from lxc_pool.client.stdio import Streams
from lxc_pool.errors import ExecFailed
from lxc_pool.execution import entry, packets, strays
from lxc_pool.execution.cgroups import CommandCgroup, Membership, parse_mounts, plan
from lxc_pool.execution.command import Command, Loop
from lxc_pool.execution.confinement import Changes, Confinement
from lxc_pool.execution.launcher import Launcher
from lxc_pool.execution.protocol import (
    ExecRequest,
    Exited,
    Failed,
    KillTree,
    Signal,
    Started,
    decode_event,
    decode_order,
)
from tests.support.descriptors import few_descriptors
from tests.support.recorded_layouts import LAYOUTS, Host

HYBRID = """\
24 1 0:22 / /proc rw - proc proc rw
30 1 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
31 1 0:27 / /sys/fs/cgroup/free\\040zer rw - cgroup cgroup rw,freezer
32 1 0:28 / /sys/fs/cgroup/systemd rw - cgroup systemd rw,xattr,name=systemd
33 1 0:29 / /sys/fs/cgroup/unified rw shared:1 - cgroup2 cgroup2 rw
34 1 0:29 /part /elsewhere rw - cgroup2 cgroup2 rw
"""


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_hybrid_host() -> None:
    own = "3:cpu,cpuacct:/\n2:freezer:/\n1:name=systemd:/\n0::/\n"
    its = "3:cpu,cpuacct:/c\n2:freezer:/c\n1:name=systemd:/c/init.scope\n0::/c\n"
    root = "/sys/fs/cgroup"
    join = (f"{root}/cpu,cpuacct/c", f"{root}/free zer/c", f"{root}/systemd/c/init.scope")
    assert plan(own, its, parse_mounts(HYBRID)) == Membership(join, f"{root}/unified/c", unified=True)


def test_only_differences_are_joined() -> None:
    its = "3:cpu,cpuacct:/\n2:freezer:/c\n0::/c\n"
    planned = plan("3:cpu,cpuacct:/\n2:freezer:/\n0::/\n", its, parse_mounts(HYBRID))
    assert planned.join == ("/sys/fs/cgroup/free zer/c",)


def test_a_v2_host_has_nothing_to_join() -> None:
    mounts = parse_mounts("1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    assert plan("0::/x\n", "0::/c\n", mounts) == Membership((), "/sys/fs/cgroup/c", unified=True)


def test_a_v1_host_holds_commands_in_the_freezer() -> None:
    mounts = {options: point for options, point in parse_mounts(HYBRID).items() if "" not in options}
    planned = plan("2:freezer:/\n0::/\n", "2:freezer:/c\n0::/\n", mounts)
    assert planned == Membership(("/sys/fs/cgroup/free zer/c",), "/sys/fs/cgroup/free zer/c", unified=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_command_joins_what_the_init_of_a_recorded_host_is_in(name: str, tmp_path: Path) -> None:
    host = Host.put_up(name, tmp_path)
    own, its = ("\n".join(lines) for lines in (host.recording["own_membership"], host.recording["membership"]))
    planned = plan(own, its, parse_mounts(host.mountinfo))
    versions = {str(cgroup): tree.version for tree, cgroup in zip(host.trees, host.payload, strict=True)}
    assert sorted(planned.join) == sorted(cgroup for cgroup, version in versions.items() if version == 1)
    unified = [cgroup for cgroup, version in versions.items() if version == 2]
    freezer = [str(path) for path in host.payload if (path / "freezer.state").exists()]
    assert planned.unified is bool(unified)
    assert [planned.parent] == (unified or freezer)
    # Both are looked for by the names that the kernel gives its files.
    assert os.path.exists(f"{planned.parent}/cgroup.procs")
    assert os.path.exists(f"{planned.parent}/cgroup.kill") is planned.unified


@pytest.mark.parametrize("its", ["5:memory:/c\n0::/c\n", "3:cpu,cpuacct:/c\n"])
def test_a_hierarchy_that_can_not_be_joined_is_an_error(its: str) -> None:
    with pytest.raises(FileNotFoundError, match="mounted"):
        plan("5:memory:/\n0::/\n", its, parse_mounts(HYBRID))


def test_a_cgroup_without_a_kill_file_is_emptied_process_by_process(tmp_path: Path) -> None:
    cgroup = CommandCgroup(str(tmp_path), "command")
    cgroup.create()
    cgroup.create()
    procs = tmp_path / "command" / "cgroup.procs"
    with subprocess.Popen(["sleep", "1000"]) as process:
        procs.write_text(f"{process.pid}\n")
        # a plain file keeps naming what has ended, as a process that can't be killed would be named
        assert not cgroup.kill()
        assert process.wait() == -signal.SIGKILL
        assert not cgroup.kill()
    procs.unlink()
    assert cgroup.kill()
    assert cgroup.remove()
    assert cgroup.remove()


def test_a_cgroup_that_can_not_be_looked_into_is_not_taken_for_empty(tmp_path: Path) -> None:
    cgroup = CommandCgroup(str(tmp_path), "command")
    cgroup.create()
    (tmp_path / "command" / "below").mkdir()
    (tmp_path / "command" / "below" / "cgroup.procs").touch()
    with few_descriptors(0):
        assert not cgroup.kill()
        assert not cgroup.remove()
    assert cgroup.kill()


def test_processes_that_there_are_too_few_descriptors_for_are_killed_bit_by_bit(tmp_path: Path) -> None:
    cgroup = CommandCgroup(str(tmp_path), "command")
    cgroup.create()
    living = {process.pid: process for process in [subprocess.Popen(["sleep", "1000"]) for _ in range(5)]}
    with contextlib.ExitStack() as stack:
        procs = stack.enter_context((tmp_path / "command" / "cgroup.procs").open("w"))
        poller = select.poll()
        pids = {}
        for pid in living:
            pids[descriptor := os.pidfd_open(pid)] = pid
            stack.callback(os.close, descriptor)
            poller.register(descriptor, select.POLLIN)

        def list_living() -> None:
            os.pwrite(procs.fileno(), "".join(f"{pid:<9}\n" for pid in living).encode().ljust(100), 0)

        def be_the_kernel() -> None:
            while living:
                for descriptor, _ in poller.poll():
                    poller.unregister(descriptor)
                    assert living.pop(pids[descriptor]).wait() == -signal.SIGKILL
                list_living()

        list_living()
        kernel = threading.Thread(target=be_the_kernel, daemon=True)
        kernel.start()
        with few_descriptors(3):
            while not cgroup.kill():
                pass
        kernel.join(10)
    assert not living


def test_an_operation_may_tidy_up_though_its_beginning_is_heard_of_after_its_clients_end(tmp_path: Path) -> None:
    client, control = packets.pair()
    its_end, report = packets.pair()
    hunt = strays.Hunt(str(tmp_path), 0, lambda: None)
    loop, done = Loop(), list[Command]()
    command = Command(loop, CommandCgroup(str(tmp_path), "command"), control, hunt, done.append, grace=1000.0)
    tidy = "trap 'echo tidy; exit' TERM; echo begun; while true; do read -r line; done"
    with subprocess.Popen(["sh", "-c", tidy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        command.begin(process.pid, os.pidfd_open(process.pid), report)
        its_end.close()
        client.close()  # both are to be heard now, in an order that nothing promises
        while not done:
            loop.turn()
        assert process.stdout.readline() == "tidy\n"
        process.returncode = 0  # the command has waited for it


def test_a_used_cgroup_is_not_removed(tmp_path: Path) -> None:
    cgroup = CommandCgroup(str(tmp_path), "command")
    cgroup.create()
    (tmp_path / "command" / "below").mkdir()
    (tmp_path / "command" / "file").touch()
    assert not cgroup.remove()
    assert not (tmp_path / "command" / "below").exists()


def test_the_client_hears_what_the_supervisor_says() -> None:
    ours, its = packets.pair()
    control = Control(ours)
    with its:
        assert control.await_start(0.01) is None
        its.send(Started(7).encode())
        assert control.await_start(None) == Started(7)
        assert control.await_exit(0.01) is None
        control.signal(15)
        assert decode_order(its.recv(100)) == Signal(15)
        its.send(Exited(3).encode())
        assert control.await_exit(None) == 3
        control.signal(9)
    control.kill_tree()
    assert (control.closed, control.ended, control.returncode) == (True, True, 3)


@pytest.mark.parametrize("order", ["signal", "kill_tree"])
def test_an_order_that_comes_too_late_does_not_cost_the_clients_word_of_the_end(order: str) -> None:
    """A socket that is closed with something unread says so at the other end, before what was sent to it."""
    ours, its = packets.pair()
    control = Control(ours)
    with its:
        its.send(Started(7).encode())
        assert control.await_start(None) == Started(7)
        if order == "signal":
            control.signal(9)
        else:
            control._send(KillTree())
        its.send(Exited(3).encode())
    assert control.await_exit(None) == 3
    control.kill_tree()
    assert (control.closed, control.returncode) == (True, 3)


def test_a_tree_that_can_not_be_killed_is_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, its = packets.pair()
    control = Control(ours)
    with its:
        its.send(Failed(16, "kill", "frozen?").encode())
        with pytest.raises(ExecFailed, match="frozen"):
            control.kill_tree()
        assert decode_order(its.recv(100)) == KillTree()
        with pytest.raises(ExecFailed, match="frozen"):
            control.await_exit(0)
        monkeypatch.setattr("lxc_pool.client.control.KILL_TIMEOUT", 0.01)
        with pytest.raises(ExecFailed, match="not answered"):
            control.kill_tree()
    control.close()


def test_a_control_socket_is_known_for_one_though_no_descriptor_is_left() -> None:
    ours, its = packets.pair()
    with ours, its, open("/dev/null", "rb+") as null:
        streams, init = (null.fileno(), null.fileno(), null.fileno()), (null.fileno(), 1)
        with few_descriptors(0), pytest.raises(ExecFailed, match="launcher of commands is closed"):
            Launcher().launch(0, ExecRequest(("true",), {}), (*streams, its.fileno()), init)
        with few_descriptors(0), pytest.raises(ValueError, match="no end of a pair"):
            Launcher().launch(0, ExecRequest(("true",), {}), (*streams, null.fileno()), init)
        ours.send(b"still open")
        assert its.recv(100) == b"still open"


@pytest.fixture
def ask() -> Iterator[Callable[[Launcher], None]]:
    """What has a launcher send some command of a user's."""
    ours, its = packets.pair()
    null = os.open(os.devnull, os.O_RDWR)
    yield lambda launcher: launcher.launch(7, ExecRequest(("true",), {}), (null, null, null, its.fileno()), (null, 1))
    os.close(null)
    ours.close()
    its.close()


def test_an_agent_that_can_not_be_started(monkeypatch: pytest.MonkeyPatch, ask: Callable[[Launcher], None]) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with Launcher() as launcher, pytest.raises(ExecFailed, match="can't be started"):
        ask(launcher)


def test_an_agent_that_ends_at_once(monkeypatch: pytest.MonkeyPatch, ask: Callable[[Launcher], None]) -> None:
    monkeypatch.setattr("lxc_pool.execution.launcher._BOOTSTRAP", "")
    real = packets.send

    def late(sock: socket.socket, payload: bytes, fds: list[int]) -> None:
        select.select([sock], [], [], 10)  # until the agent has ended
        real(sock, payload, fds)

    monkeypatch.setattr(packets, "send", late)
    with Launcher() as launcher, pytest.raises(ExecFailed, match="the agent that runs commands ends at once"):
        ask(launcher)


def test_a_supervisor_that_ends_at_once(monkeypatch: pytest.MonkeyPatch, ask: Callable[[Launcher], None]) -> None:
    deaf = "import socket, sys\nsock = socket.socket(fileno=int(sys.argv[1]))\nwhile sock.recv(9): pass"
    monkeypatch.setattr("lxc_pool.execution.launcher._BOOTSTRAP", deaf)
    real = packets.send

    def late(sock: socket.socket, payload: bytes, fds: list[int]) -> None:
        if payload:
            select.select([sock], [], [], 10)  # until the agent has let go of the supervisor's end
        real(sock, payload, fds)

    monkeypatch.setattr(packets, "send", late)
    with Launcher() as launcher, pytest.raises(ExecFailed, match="supervisor of this user's commands ends at once"):
        ask(launcher)


def test_an_agent_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lxc_pool.execution.launcher._BOOTSTRAP", "import signal; signal.pause()")
    monkeypatch.setattr("lxc_pool.execution.launcher.SEND_TIMEOUT", 0.05)
    with Launcher() as launcher:
        launcher._line(0)
        first = launcher.agent_pid
        uid = 0
        while launcher.agent_pid == first:
            uid += 1
            launcher._line(uid)
        launcher.close(timeout=0)


def test_a_supervisor_that_hangs_keeps_no_other_user_waiting(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[Launcher], None]
) -> None:
    monkeypatch.setattr("lxc_pool.execution.launcher._BOOTSTRAP", "import signal; signal.pause()")
    with Launcher() as launcher:
        hung = launcher._line(8)
        with hung.lock:  # as whoever sends to it has
            ask(launcher)
        launcher.close(timeout=0)


def test_a_conversation_refuses_what_its_stream_can_not_carry() -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "w") as text, pytest.raises(TypeError, match="str"):
        Communication(text, None, None, b"bytes")


def test_a_conversation_keeps_to_its_deadline_and_goes_on() -> None:
    (read, command_out), (command_in, write) = os.pipe(), os.pipe()
    with open(read, "rb") as stdout, open(write, "wb") as stdin, open(command_in, "rb") as source:
        talk = Communication(stdin, stdout, None, b"x" * 200_000)
        os.write(command_out, b"some")
        assert not talk.run(time.monotonic() + 0.05)
        assert talk.so_far() == (b"some", None)
        os.close(command_out)
        source.close()  # the command reads no more, which is no error
        assert talk.run(time.monotonic() + 5)
        assert talk.results() == (b"some", None)


def test_wrong_streams_leave_nothing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as file:
        for streams in ((subprocess.PIPE, subprocess.PIPE, 9999), (file, file, 9999), (9999, None, None)):
            with pytest.raises(OSError, match="Bad file"):
                Streams(*streams)
        Streams(file, file, subprocess.PIPE).close()


def test_contradicting_text_options_are_refused() -> None:
    with pytest.raises(subprocess.SubprocessError, match="contradict"):
        Process.start(lambda *_: None, ["x"], text=True, universal_newlines=False)
    with pytest.raises(TypeError, match="bufsize"):
        Process.start(lambda *_: None, ["x"], bufsize="1")  # type: ignore[arg-type] # that is the test


def test_a_cgroup_that_can_not_be_entered_is_reported_whatever_number_the_report_has(tmp_path: Path) -> None:
    theirs, ours = packets.pair()
    walls = Confinement(
        0, own_pids=False, dropped=(), no_new_privs=False, filters=(), limits=(), oom_score_adj="0", label=None
    )
    null, no_cgroup = os.open(os.devnull, os.O_RDWR), os.open(tmp_path, os.O_RDONLY)
    with theirs, ours:
        where = Membership((), str(tmp_path), unified=False)
        door = entry.Door(os.getpid(), null, where, (), walls, Changes((), None))
        request = ExecRequest(("true",), {})
        pid = os.fork()
        if pid == 0:  # pragma: no cover - it ends in the function
            entry.enter_and_exec(request, (null, null, null, theirs.fileno()), no_cgroup, door)
        theirs.close()
        ours.settimeout(10)
        failed = decode_event(ours.recv(4096))
        os.waitpid(pid, 0)
    os.close(null)
    os.close(no_cgroup)
    assert failed == Failed(2, "enter", "entering the container: No such file or directory")
