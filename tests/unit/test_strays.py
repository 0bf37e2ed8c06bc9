"""Strays are told from others by their mark, killed, and sought again as long as somebody may have missed one."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.execution import cgroups, strays
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
PAYLOAD = "/sys/fs/cgroup/lxc.payload.x"


class Container:
    """Processes that a container has outside of its commands' cgroups."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stack = contextlib.ExitStack()

    def start(self, *, marked: bool) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "1000"])
        if marked:
            mark = strays.mark()
            resource.prlimit(process.pid, strays._LIMIT, (mark, mark))
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        self.processes.append(process)
        return process

    def pids(self, payload: str) -> set[int]:
        assert payload == PAYLOAD
        return {process.pid for process in self.processes if process.poll() is None}


def hunt(mark: int) -> bool:
    """Hunt to the end; return whether there are none left."""
    survivors: list[bool] = []
    hunt = strays.Hunt(PAYLOAD, mark, lambda: survivors.append(True))
    eventually(hunt.go_on, "it is over")
    return not survivors


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> Iterator[Container]:
    container = Container()
    monkeypatch.setattr(cgroups, "pids_of_no_command", container.pids)
    with container.stack:
        yield container
        monkeypatch.undo()


def test_what_has_the_mark_of_a_command_or_of_a_later_one_is_killed(container: Container) -> None:
    before = container.start(marked=True)
    mark = strays.mark()
    its, later, no_commands = (container.start(marked=marked) for marked in (True, True, False))
    assert hunt(mark)
    assert (its.wait(10), later.wait(10)) == (-signal.SIGKILL, -signal.SIGKILL)
    assert (before.poll(), no_commands.poll()) == (None, None)
    assert strays.Hunt(PAYLOAD, mark, pytest.fail).go_on()


def test_what_puts_a_mark_on_is_marked_with_all_that_comes_of_it() -> None:
    script = (
        "from lxc_pool.execution import strays; strays.put_on_mark(); import os; "
        "os.execlp('sh', 'sh', '-c', \"sh -c 'ulimit -H -x 2>/dev/null || grep locks /proc/self/limits'\")"
    )
    highest = strays.mark()
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT, text=True).stdout
    (its,) = {int(word) for word in said.split() if word.isdecimal()}
    assert strays.mark() < its < highest < resource.RLIM_INFINITY % 2**64


def test_a_mark_can_be_lowered_and_is_one_still(container: Container) -> None:
    mark = strays.mark()
    process = container.start(marked=True)
    resource.prlimit(process.pid, strays._LIMIT, (5, 5))
    assert hunt(mark)
    assert process.wait(10) == -signal.SIGKILL


def test_one_that_can_not_be_killed_is_given_up_in_time(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = strays.mark()
    process = container.start(marked=True)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    monkeypatch.setattr(strays, "TIMEOUT", 0.05)
    began = time.monotonic()
    assert not hunt(mark)
    assert time.monotonic() - began >= 0.05
    assert process.poll() is None


def test_who_ends_while_it_is_looked_at_may_have_forked_and_is_sought_again(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = strays.mark()
    gone = subprocess.Popen(["true"])
    gone.wait()
    process = container.start(marked=True)
    listings = iter([{gone.pid}, {gone.pid}, {gone.pid, process.pid}])
    monkeypatch.setattr(cgroups, "pids_of_no_command", lambda payload: next(listings, None) or container.pids(payload))
    assert hunt(mark)
    assert process.wait(10) == -signal.SIGKILL


def test_a_container_where_processes_end_all_the_time_is_not_taken_for_one_with_strays(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    del container
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(cgroups, "pids_of_no_command", lambda _payload: {gone.pid})
    monkeypatch.setattr(strays, "TIMEOUT", 0.05)
    assert hunt(strays.mark())


def test_a_pid_that_has_come_to_mean_another_process_is_not_killed(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second listing says so."""
    mark = strays.mark()
    process = container.start(marked=True)
    listings = iter([{process.pid}, set[int](), set[int]()])
    monkeypatch.setattr(cgroups, "pids_of_no_command", lambda _payload: next(listings))
    assert hunt(mark)
    assert process.poll() is None


def test_limits_are_read_of_proc_where_the_call_is_refused(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = strays.mark()
    process, other = container.start(marked=True), container.start(marked=False)

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(resource, "prlimit", refused)
    assert hunt(mark)
    assert process.wait(10) == -signal.SIGKILL
    assert other.poll() is None


def test_what_can_not_be_looked_for_is_not_taken_for_gone(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = strays.mark()
    process = container.start(marked=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", raise_shortage)
        assert not strays.Hunt(PAYLOAD, mark, pytest.fail).go_on()
    assert process.poll() is None
    assert hunt(mark)


def raise_shortage(*_: object) -> None:
    raise OSError(errno.EMFILE, "too many")


def test_where_file_locks_are_limited_nobody_is_taken_for_a_stray(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = container.start(marked=True)
    prlimit = resource.prlimit
    monkeypatch.setattr(resource, "prlimit", lambda pid, *limit: (5, 5) if pid == os.getpid() else prlimit(pid, *limit))
    assert hunt(strays.mark())
    assert process.poll() is None


def test_what_is_in_a_commands_cgroup_is_left_out_unless_the_container_has_made_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, place in enumerate(("", "lxc_pool.1.1", "lxc_pool.1.1/below", "init.scope", "init.scope/lxc_pool.2.1")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "cgroup.procs").write_text(f"{number + 1}\n")
    assert cgroups.pids_of_no_command(str(tmp_path)) == {1, 4}
    assert cgroups.pids_of_no_command(str(tmp_path / "none")) == set()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert cgroups.pids_of_no_command(str(tmp_path)) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("directory", "payload"),
    [
        ("/sys/fs/cgroup/lxc.payload.a", "/sys/fs/cgroup/lxc.payload.a"),
        ("/sys/fs/cgroup/unified/x/lxc.payload.a-1/init.scope", "/sys/fs/cgroup/unified/x/lxc.payload.a-1"),
        ("/sys/fs/cgroup/elsewhere", "/sys/fs/cgroup/elsewhere"),
    ],
)
def test_a_containers_cgroup_is_above_what_its_init_has_made(directory: str, payload: str) -> None:
    assert cgroups.payload(directory) == payload
