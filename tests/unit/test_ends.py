"""The end of a process is seen by its pidfd, and without pidfds as well."""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import signal
import threading

import pytest

from lxc_pool.host import ends
from lxc_pool.host.processes import ProcessIdentity, identify
from tests.support.processes import open_descriptors, sleeper
from tests.support.waiting import eventually


@pytest.fixture(params=["pidfds", "ENOSYS", "EPERM"])
def pidfds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there are any."""
    if request.param == "pidfds":
        return True

    def refuse(_pid: int) -> int:
        number = getattr(errno, request.param)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    return False


def is_readable(descriptor: int, timeout: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(event & select.POLLIN for _descriptor, event in poll.poll(timeout * 1000))


def pollers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ends"]


def test_a_descriptor_is_readable_once_its_process_has_ended(*, pidfds: bool) -> None:
    before = open_descriptors()
    with sleeper() as one, sleeper() as other:
        first, second = ends.open_end(identify(one.pid)), ends.open_end(identify(other.pid))
        assert ends.is_pidfd(first) is pidfds
        assert not is_readable(first, 3 * ends.INTERVAL)
        one.kill()
        assert is_readable(first, 10)  # though it is a zombie, whose pid is taken
        assert is_readable(first)
        assert not is_readable(second, 3 * ends.INTERVAL)
    os.close(first)
    assert is_readable(second, 10)
    os.close(second)
    eventually(lambda: not pollers() and open_descriptors() == before, "nothing is left")


def test_who_stops_waiting_closes_the_descriptor(*, pidfds: bool) -> None:
    before = open_descriptors()
    with sleeper() as process:
        descriptors = [ends.open_end(identify(process.pid)) for _ in range(3)]
        assert len(pollers()) == (0 if pidfds else 1)
        for descriptor in descriptors:
            os.close(descriptor)
        eventually(lambda: not pollers(), "nobody looks any more")
        again = ends.open_end(identify(process.pid))
        process.kill()
        assert is_readable(again, 10)
        os.close(again)
    eventually(lambda: open_descriptors() == before, "nothing is left")


@pytest.mark.usefixtures("pidfds")
def test_what_is_waited_for_can_be_killed_and_who_has_its_pid_can_not() -> None:
    with sleeper() as process, sleeper() as other:
        identity = identify(process.pid)
        descriptor = ends.open_end(identity)
        ends.send(signal.SIGKILL, identity, descriptor)
        assert process.wait(10) == -signal.SIGKILL
        ends.send(signal.SIGKILL, dataclasses.replace(identity, pid=other.pid), descriptor)
        assert other.poll() is None
        os.close(descriptor)
        other.kill()
    eventually(lambda: not pollers(), "nobody looks any more")


@pytest.mark.usefixtures("pidfds")
def test_what_is_no_living_process_has_no_end_to_wait_for() -> None:
    before = open_descriptors()
    me = identify(os.getpid())
    with sleeper() as process:
        dead = identify(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        for identity in (dead, ProcessIdentity(me.boot_id, me.pid, me.start_ticks - 1)):
            with pytest.raises(ProcessLookupError):
                ends.open_end(identity)
    with pytest.raises(ProcessLookupError):
        ends.open_end(dead)
    assert open_descriptors() == before


@pytest.mark.usefixtures("pidfds")
def test_a_thread_is_no_process() -> None:
    done, ids = threading.Event(), []

    def run() -> None:
        ids.append(threading.get_native_id())
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        eventually(lambda: ids, "it runs")
        with pytest.raises(OSError, match=r"ended|Invalid|No such"):
            ends.open_end(identify(ids[0]))
    finally:
        done.set()
        thread.join()


def test_any_other_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(OSError, match="Too many"):
        ends.open_end(identify(os.getpid()))


def test_a_crowd_is_watched_and_each_end_told_to_those_who_wait_for_it(*, pidfds: bool) -> None:
    with sleeper() as one, sleeper() as other:
        watched = {ends.open_end(identify(process.pid)): process for process in (one, other) for _ in range(50)}
        one.kill()
        for descriptor, process in watched.items():
            if process is one:
                assert is_readable(descriptor, 10)
        assert not any(is_readable(descriptor) for descriptor, process in watched.items() if process is other)
        assert len(pollers()) == (0 if pidfds else 1)
        for descriptor in watched:
            os.close(descriptor)
    eventually(lambda: not pollers(), "nobody looks any more")
