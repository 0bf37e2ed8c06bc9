"""Processes of the service's own that somebody has stopped: they outlive it, and are known for its own and removed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lxc_pool.host import own_processes
from lxc_pool.host.own_processes import VARIABLE
from lxc_pool.service import audit
from tests.support.faults import FaultyService
from tests.support.oracle import assert_healed
from tests.support.waiting import eventually


@contextlib.contextmanager
def stopped(service: FaultyService) -> Iterator[list[int]]:
    """Stop all that the service has, but for itself."""
    pids = [pid for pid in service.marked() if pid != service.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield pids


def found(service: FaultyService) -> set[int]:
    report = audit.audit(service.state_dir, service.host_dir)
    return {trace.process.pid for trace in report.findings if trace.process and trace.name.startswith("pid ")}


def parent(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("by", ["the next service", "cleanup"])
def test_what_was_stopped_outlives_the_service_is_named_and_removed(service: FaultyService, by: str) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as leased:
        leased.run(["true"], check=True)
        with stopped(service) as pids:
            os.kill(service.pid, signal.SIGKILL)
            service.wait()
            # The kernel kills the lanes' workers with the service, stopped or not.
            eventually(lambda: len(found(service)) == 4, "fork server, what counts semaphores, agent, supervisor")
            left = found(service)
            assert left <= set(pids)
            if by == "cleanup":
                said = service.cli("audit", "--state-dir", service.state_dir)
                assert said.returncode == 1
                assert all(f"process pid {pid}: {pid} " in said.stdout for pid in left)
                service.cli("cleanup", "--state-dir", service.state_dir)
                assert found(service) == left
                done = service.cli("cleanup", "--execute", "--state-dir", service.state_dir)
                assert done.returncode == 0, done
            else:
                service.start(size=1)
            assert not left & set(service.marked())
            assert not found(service)
        if service.process is None:
            service.start(size=1)
        leased.run(["true"], check=True)
        assert_healed(service, pool, leased=[leased.name])
    assert_healed(service, pool)


def test_a_stopped_supervisor_stays_as_long_as_its_lease(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as leased:
        process = leased.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        supervisor = parent(process.pid)
        os.kill(supervisor, signal.SIGSTOP)
        service.kill()
        eventually(lambda: not found(service), "the others end")
        service.start(size=1)
        assert supervisor in service.marked()
        assert_healed(service, pool, leased=[leased.name])
        os.kill(supervisor, signal.SIGCONT)
        assert process.communicate(b"on and on", timeout=10)[0] == b"on and on"
        process.close()
        eventually(lambda: supervisor not in service.marked(), "it ends with its last command")

        # And one whose container is gone.
        process = leased.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        supervisor = parent(process.pid)
        os.kill(supervisor, signal.SIGSTOP)
        service.kill()
        service.start(size=1)
        assert supervisor in service.marked()
        leased.release()
        eventually(lambda: found(service) == {supervisor}, "it serves nobody any more")
        assert service.cli("cleanup", "--execute", "--state-dir", service.state_dir).returncode == 0
        assert supervisor not in service.marked()
        process.close()
    assert_healed(service, pool)


def test_what_copies_out_of_a_leased_container_goes_on_with_the_next_service(
    service: FaultyService, tmp_path: Path
) -> None:
    """It is on the host, and no container's to see; it is known by the container's cgroup."""
    pool = service.start(size=1)
    begun, goes_on = threading.Event(), threading.Event()

    def wait(_bytes: int, _entries: int) -> None:
        begun.set()
        assert goes_on.wait(30)

    with pool.lease("x") as leased:
        leased.run(["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=8"], check=True, stderr=subprocess.DEVNULL)
        with ThreadPoolExecutor(1) as threads:
            copied = threads.submit(leased.pull, "/big", tmp_path / "big", progress=wait)
            try:
                assert begun.wait(30)
                service.kill()
                service.start(size=1)
                assert_healed(service, pool, leased=[leased.name])
            finally:
                goes_on.set()
            assert copied.result(30).byte_count == 8 << 20
    assert_healed(service, pool)


def test_a_service_ends_in_order_though_all_it_has_is_stopped(service: FaultyService) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as leased:
        leased.run(["true"], check=True)
    pool.drain()
    eventually(lambda: pool.containers() == (), "nothing is left for lanes to do")
    with stopped(service):
        service.stop()


def test_who_only_says_so_is_not_the_services(service: FaultyService) -> None:
    """Neither a user's process, nor one in a container, nor one with another mark."""
    pool = service.start(size=1)
    mark = f"{service.instance}:{service.pid}:1"  # of a process that has ended
    sleep = ["sleep", "infinity"]
    starts: list[Callable[[], subprocess.Popen[bytes]]] = [
        lambda: subprocess.Popen(sleep, env={VARIABLE: mark}, user=65534),
        lambda: subprocess.Popen(sleep, env={VARIABLE: mark[1:]}),
        lambda: subprocess.Popen(sleep, env={f"X{VARIABLE}": mark}),
    ]
    with contextlib.ExitStack() as stack, pool.lease("x") as leased:
        for start in starts:
            process = stack.enter_context(start())
            stack.callback(process.kill)
        inside = stack.enter_context(leased.popen(sleep, env={VARIABLE: mark}))
        assert own_processes.left(service.instance) == ()
        ours = stack.enter_context(subprocess.Popen(sleep, env={VARIABLE: mark}))
        stack.callback(ours.kill)
        eventually(lambda: found(service) == {ours.pid}, "it has the mark")
        inside.kill()
