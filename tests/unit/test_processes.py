"""A process is known for what it is, held on to, and ended with its whole tree: tried on real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lxc_pool.host import own_processes
from lxc_pool.host.processes import (
    ProcessIdentity,
    describe_tree,
    has_executed,
    identify,
    is_our_own,
    kill_tree,
    open_pidfd,
)
from tests.support.descriptors import few_descriptors
from tests.support.processes import open_descriptors, sleeper


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """Have a directory that every user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="lxp-test-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


TREE = "sh -c 'sleep infinity & wait' & sleep infinity & echo ready; wait"


def test_a_process_has_one_identity_for_its_life() -> None:
    with sleeper() as process:
        identity = identify(process.pid)
        assert identity == identify(process.pid)
        assert identity.pid == process.pid
        assert identity.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with sleeper() as other:
            assert identify(other.pid) != identity


def test_its_start_is_read_right_whatever_it_is_called(tmp_path: Path) -> None:
    program = tmp_path / ") R 1 (x"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "infinity"], stdin=subprocess.DEVNULL)
    try:
        created = identify(process.pid).start_ticks / os.sysconf("SC_CLK_TCK") + psutil.boot_time()
        assert created == pytest.approx(psutil.Process(process.pid).create_time(), abs=1.5)
    finally:
        process.kill()
        process.wait()


def test_a_zombie_has_ended_though_its_pid_is_still_taken() -> None:
    with sleeper() as process:
        identity = identify(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError, match="has ended"):
            identify(process.pid)
        with pytest.raises(ProcessLookupError):
            has_executed(identity)
        with pytest.raises(ProcessLookupError):
            open_pidfd(identity)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 10**30])
def test_a_pid_that_nobody_has_is_no_process(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        identify(pid)


def test_a_pidfd_is_of_just_this_process_and_none_is_left_if_it_is_not() -> None:
    with sleeper() as process:
        identity = identify(process.pid)
        descriptor = open_pidfd(identity)
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        process.wait()
        os.close(descriptor)
    before = open_descriptors()
    me = identify(os.getpid())
    with pytest.raises(ProcessLookupError, match="another's now"):
        open_pidfd(ProcessIdentity(me.boot_id, me.pid, me.start_ticks - 1))
    assert open_descriptors() == before


def test_a_forked_process_has_executed_nothing_until_it_does() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)
        os.execv("/bin/sleep", ["sleep", "infinity"])  # noqa: S606  # there is nothing for a shell to do
    identity = identify(pid)
    try:
        assert not has_executed(identity)
        os.write(writer, b"x")
        while not has_executed(identity):
            os.sched_yield()
        with pytest.raises(ProcessLookupError):
            has_executed(ProcessIdentity(identity.boot_id, pid, identity.start_ticks - 1))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def test_a_tree_is_killed_to_its_last_leaf() -> None:
    with subprocess.Popen(["sh", "-c", TREE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = psutil.Process(process.pid).children(recursive=True)
        assert len(tree) >= 2
        assert kill_tree(identify(process.pid)) == []
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in tree)


def test_a_tree_is_killed_as_a_whole_or_not_at_all() -> None:
    with subprocess.Popen(["sh", "-c", TREE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        identity, tree = identify(process.pid), psutil.Process(process.pid).children(recursive=True)
        for number in range(3):  # enough for some of the tree, or for none
            with few_descriptors(number), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                kill_tree(identity)
            assert all(member.status() != psutil.STATUS_ZOMBIE for member in (psutil.Process(process.pid), *tree))
        assert kill_tree(identity) == []
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in tree)


def test_who_has_the_pid_of_what_is_gone_is_not_killed() -> None:
    with sleeper() as process:
        identity = identify(process.pid)
        earlier = dataclasses.replace(identity, start_ticks=identity.start_ticks - 1)
        assert kill_tree(earlier) == []
        assert identify(process.pid) == identity


def test_killing_what_is_gone_is_no_error() -> None:
    with sleeper() as process:
        identity = identify(process.pid)
    assert kill_tree(identity) == []


def test_where_there_are_no_pidfds_a_tree_is_killed_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    # Not in `os`: psutil has looked when it was imported whether there are any, and would take that for a bug.
    monkeypatch.setattr("lxc_pool.host.processes.os", types.SimpleNamespace(**vars(os) | {"pidfd_open": refuse}))
    with sleeper() as process:
        assert kill_tree(identify(process.pid), timeout=0) in ([], [process.pid])
        process.wait(10)  # psutil may have taken its status


def test_without_time_to_wait_it_says_who_may_still_live() -> None:
    with sleeper() as process:
        assert kill_tree(identify(process.pid), timeout=0) in ([], [process.pid])
        process.wait(10)


DIES_WITH_THE_PIPE = """
import sys, time
from lxc_pool.host.processes import die_at_end_of
die_at_end_of(0)
print("ready", flush=True)
while True:
    time.sleep(3600)
"""


def test_a_process_can_be_bound_to_the_other_end_of_a_pipe() -> None:
    command = [sys.executable, "-c", DIES_WITH_THE_PIPE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == -signal.SIGKILL


def test_a_process_that_is_bound_to_a_pipe_that_is_closed_already_ends_itself() -> None:
    done = subprocess.run([sys.executable, "-c", DIES_WITH_THE_PIPE], input=b"", capture_output=True, check=False)
    assert done.returncode != 0
    assert done.stdout == b""


def test_a_tree_is_described_by_what_each_of_its_processes_runs_and_waits_in() -> None:
    with subprocess.Popen(["sh", "-c", TREE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        text = describe_tree(process.pid)
        assert str(process.pid) in text
        assert text.count("sleep infinity") >= 2
        for part in text.split("; process "):  # in state S by now, or still about to be
            assert re.search(r", wchan \S.*, stack \S.*, status State: [SRD] .* SigPnd: [0-9a-f]{16} ", part), part
        kill_tree(identify(process.pid))
    assert describe_tree(process.pid) == f"process {process.pid} has ended"


def test_what_a_process_calls_itself_is_told_without_what_a_terminal_obeys() -> None:
    command = ["sh", "-c", "echo ready; sleep infinity; :", "\x1b[31mevil\x07"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        text = describe_tree(process.pid)
        kill_tree(identify(process.pid))
    assert "?[31mevil?" in text
    assert "\x1b" not in text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be different users and in namespaces")
def test_a_process_is_our_own_by_all_its_uids_and_namespaces() -> None:
    assert is_our_own(os.getpid())
    held = ["sleep", "infinity"]
    for command, user in ((held, 65534), (["unshare", "--user", "-r", *held], 0)):
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, user=user) as process:
            while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
                os.sched_yield()  # it has to be executed first
            ours = is_our_own(process.pid)
            process.kill()
        assert not ours
    with open_directory() as place:  # a set-uid program is its user's, whoever it runs as
        program = place / "program"
        shutil.copy(shutil.which("sleep") or "", program)
        program.chmod(0o4755)
        with subprocess.Popen([program, "infinity"], stdin=subprocess.DEVNULL, user=65534) as process:
            while Path(f"/proc/{process.pid}/comm").read_text() != "program\n":
                os.sched_yield()  # as above
            ours = is_our_own(process.pid)
            process.kill()
        assert not ours


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be nobody else's")
def test_what_bears_a_services_mark_says_nothing_that_a_terminal_obeys() -> None:
    """The mark is a word in the environment: a set-uid program that becomes root by all its uids has its caller's."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    mark = {own_processes.VARIABLE: f"c0ffee:{gone.pid}:1"}
    command = ["sh", "-c", "echo; read x", "\x1b]0;mine\x07"]
    with subprocess.Popen(command, env=mark, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (found,) = own_processes.left("c0ffee")
        process.kill()
    assert found.words == "sh -c echo; read x ?]0;mine?"
