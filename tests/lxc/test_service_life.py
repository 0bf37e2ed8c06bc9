"""How a real service begins, ends, and takes up what a killed one has left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

from lxc_pool import LeaseExpired, PoolClosed, PoolManager, PoolTimeout, ServiceUnavailable, State
from lxc_pool.host import cgroups
from tests.support.real_service import ROOT, Service
from tests.support.sleeps import Sleeps
from tests.support.starter import Starter
from tests.support.waiting import ends, eventually, pidfd


def serve(service: Service, host_dir: Path, state_dir: Path) -> subprocess.CompletedProcess[str]:
    """Try to run a second service."""
    config = service.directory / "lxc-pool.toml"
    command = [*service.command("serve", "--config", config, "--state-dir", state_dir), "--host-dir", str(host_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def test_a_second_service_on_the_same_directories_is_refused_with_the_pid_of_the_first(service: Service) -> None:
    pool = service.start(size=1)
    for host_dir, state_dir, shared in (
        (service.host_dir, service.directory / "other-state", f"host dir {service.host_dir}"),
        (service.directory / "other-host", service.state_dir, f"state dir {service.state_dir}"),
    ):
        refused = serve(service, host_dir, state_dir)
        assert (refused.returncode, refused.stdout) == (5, "")
        assert f"the {shared} is in use by the service with pid {service.pid};" in refused.stderr
    with pool.lease("x") as container:
        container.run(["true"], check=True)


def test_systemd_hears_when_it_accepts_connections(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        service.launch(size=1)
        assert systemd.recv(100) == b"READY=1"
        service.connect().wait_ready()
        service.await_ready()
        children = [pid for pid in service.marked() if pid != service.pid]
        assert children
        assert all(b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes() for pid in children)


def test_neither_beginning_nor_end_sleeps_in_any_of_its_processes(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps = Sleeps(tmp_path)
    for name, value in sleeps.environment.items():
        monkeypatch.setenv(name, value)
    pool = service.start(size=2)
    pool.wait_ready()
    with pool.lease("x") as container:
        container.run(["true"], check=True)
        container.push(__file__, "/tmp/file")
    service.stop()
    programs = sleeps.programs()
    for program in ("'serve'", "multiprocessing.forkserver", "lxc_pool.execution.agent"):
        assert [line for line in programs.values() if program in line], f"{program} was not looked at"
    # An init that is about to be executed, and a program whose output has ended, are looked at again in a millisecond.
    brief = ("lxc.engine._await_init", "subprocess._communicate < subprocess.communicate < subprocess.run")
    found = [
        f"{callers}: {seconds:g} s"
        for callers, seconds in sleeps.slept()
        if seconds > 0.002 or not any(words in callers for words in brief)
    ]
    assert not found, "\n".join(found)


@pytest.mark.host
def test_it_serves_in_a_pid_namespace_whose_init_is_in_a_cgroup_of_its_own(service: Service) -> None:
    """There liblxc makes containers' cgroups below that one, where the hierarchy is of version 1."""
    memory = next((tree for tree in cgroups.hierarchies() if "memory" in tree.controllers), None)
    if memory is None:
        pytest.skip("needs a version 1 hierarchy: in one of version 2, a cgroup with processes gives no controllers")
    cgroup = memory.mount_point / f"lxc-pool-test-{os.getpid()}"
    script = """
        echo 0 >"$1/cgroup.procs"
        shift
        host_dir=$1 state_dir=$2 config=$3
        shift 3
        "$@" --host-dir "$host_dir" serve --state-dir "$state_dir" --config "$config" --size 1 | {
            read -r ready socket
            "$@" --host-dir "$host_dir" run -- hostname
            "$@" --host-dir "$host_dir" stop
        }
    """
    service.config_path.touch()
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script, "init"]
    places = map(str, (cgroup, service.host_dir, service.state_dir, service.config_path))
    cgroup.mkdir()
    try:
        done = subprocess.run(
            [*unshare, *places, sys.executable, "-m", "lxc_pool"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert re.match(r"lxp-[0-9a-f]{6}-", done.stdout), done.stderr
        # liblxc's own: it moves a monitor that ends there.
        assert {path.name for path in cgroup.iterdir() if path.is_dir()} <= {"lxc.pivot"}
    finally:
        for path in (cgroup / "lxc.pivot", cgroup):
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_all_that_is_warm(service: Service, number: signal.Signals) -> None:
    pool = service.start(size=2)
    pool.wait_ready()
    inits = [info.init_pid for info in pool.containers()]
    assert len(inits) == 2
    service.stop(number)
    assert not any(Path(f"/proc/{pid}").exists() for pid in inits)


def test_a_signal_to_all_its_processes_at_once_ends_it_in_order_too(service: Service) -> None:
    pool = service.start(size=3)
    pool.wait_ready()
    os.killpg(service.pid, signal.SIGTERM)  # as systemd does it; a terminal's Ctrl-C goes to all as well
    assert service.wait().status == 0
    service.assert_clean()


def test_a_signal_that_comes_while_it_starts_ends_it_too(service: Service) -> None:
    service.launch(size=2)
    eventually((service.host_dir / "pool.sock").exists, "it listens", timeout=30)
    service.stop()


def test_it_ends_in_order_though_its_host_dir_was_removed(service: Service) -> None:
    service.start(size=2).wait_ready()
    shutil.rmtree(service.host_dir)
    service.stop()


def test_leases_have_their_grace_and_waiters_and_new_ones_are_turned_away(service: Service, starter: Starter) -> None:
    pool = service.start(size=1, path=[starter.directory])
    container = pool.get("x", 30)
    assert container is not None
    with starter.holding(), ThreadPoolExecutor() as threads:
        taken = pool.get("y", 0)  # what may have come up meanwhile
        waiter = threads.submit(pool.get, "z", None)
        eventually(lambda: pool.status().waiting == 1, "one waits")
        os.kill(service.pid, signal.SIGTERM)
        with pytest.raises(PoolClosed):
            waiter.result(10)
        with pytest.raises(PoolClosed):
            pool.get("z", 10)
        assert not pool.status().running
        container.run(["true"], check=True)
    container.release()
    if taken is not None:
        taken.release()
    began = time.monotonic()
    assert service.wait().status == 0
    assert time.monotonic() - began < 5  # the grace is no longer than the last lease
    service.assert_clean()


def test_a_second_signal_ends_the_grace(service: Service) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as container, pidfd(container.init_pid) as init:
        os.kill(service.pid, signal.SIGTERM)
        eventually(lambda: not pool.status().running, "it is ending")
        with pytest.raises(PoolTimeout, match="ending"):
            pool.wait_ready()
        assert not ends(init, timeout=0.3)
        os.kill(service.pid, signal.SIGTERM)
        began = time.monotonic()
        assert service.wait().status == 0
        assert time.monotonic() - began < 5  # of 10
        assert ends(init, timeout=0)
        service.assert_clean()
        with pytest.raises(ServiceUnavailable, match=r"pool\.sock"):
            container.run(["true"])
        assert time.monotonic() - began < 10  # it ended in order: there is little to wait for
        container._released = True  # there is nobody to tell


def test_a_grace_that_is_over_ends_the_leases(service: Service) -> None:
    pool = service.start(size=1)
    container = pool.get("x", 30)
    assert container is not None
    with pidfd(container.init_pid) as init:
        pool.shutdown(grace=0.2)
        assert ends(init, timeout=0)
    container._released = True
    assert service.wait().status == 0
    service.assert_clean()


def test_shutdown_returns_to_all_who_ask_once_the_service_has_really_ended(service: Service) -> None:
    service.start(size=2).wait_ready()
    pools = [service.connect() for _ in range(3)]  # before the first one ends it
    with ThreadPoolExecutor() as threads, pidfd(service.pid) as process:
        asked = [threads.submit(pool.shutdown) for pool in pools]
        next(as_completed(asked)).result(30)
        assert ends(process, timeout=0)
        service.assert_clean()
        assert [future.result(30) for future in asked] == [None] * 3
    assert service.wait().status == 0


def test_it_ends_while_containers_are_being_made(service: Service, starter: Starter) -> None:
    with starter.holding():
        pool = service.start(size=3, path=[starter.directory])
        eventually(lambda: starter.held() == 2, "both lanes are at it")
        os.kill(service.pid, signal.SIGTERM)
        eventually(lambda: not pool.status().running, "it is ending")
    assert service.wait().status == 0
    service.assert_clean()


def test_leases_may_be_left_to_the_next_service(service: Service) -> None:
    pool = service.start(size=1)
    with pool.lease("x") as container, pidfd(container.init_pid) as init:
        pool.shutdown(keep_leases=True)
        assert service.wait().status == 0
        assert not ends(init, timeout=0)
        service.start(size=1)
        assert container.state is State.LEASED
        container.run(["true"], check=True)
        container.release()
        assert ends(init)


def test_after_a_kill_the_workers_are_gone_and_the_next_service_takes_up_the_rest(service: Service) -> None:
    pool = service.start(size=3)
    pool.wait_ready()
    with pool.lease("x") as container, pool.lease("y") as other:
        container.run(["sh", "-c", "echo here > /mine; sleep 1000 > /dev/null 2>&1 &"], check=True)
        pool.wait_ready()
        before = {info.name for info in pool.containers()}
        workers = len(service.marked())
        service.kill()
        # What is left belongs to the command that goes on: its user's supervisor.
        eventually(lambda: len(service.marked()) <= 1 < workers, "the workers have ended")
        assert (service.host_dir / "pool.sock").exists()
        service.start(size=3)
        # The same pool object, the same containers, with all that is in them.
        assert pool.echo("again") == "again"
        assert container.run(["cat", "/mine"], capture_output=True, text=True, check=True).stdout == "here\n"
        assert {info.name: info.id for info in pool.containers() if info.state is State.LEASED} == {
            container.name: "x",
            other.name: "y",
        }
        pool.wait_ready()
        assert {info.name for info in pool.containers()} == before
    service.stop()


def test_a_call_waits_for_a_killed_service_to_come_back(service: Service) -> None:
    pool = service.start(size=1)
    pool.wait_ready()
    service.kill()
    with ThreadPoolExecutor() as threads:
        leased = threads.submit(pool.get, "x", 30)
        service.start(size=1)
        container = leased.result(30)
    assert container is not None
    with container:
        container.run(["true"], check=True)


def test_an_owner_that_died_while_there_was_no_service_loses_its_containers(service: Service) -> None:
    service.start(size=1)
    script = "container = pool.get('x', 30); print(container.name, flush=True); sys.stdin.read()"
    with service.client(script) as client:
        assert client.stdout is not None
        name = client.stdout.readline().strip()
        service.kill()
    pool = service.start(size=1)
    eventually(lambda: name not in {info.name for info in pool.containers()}, "it is reaped")
    assert not service.has_traces(name)
    with pytest.raises(LeaseExpired, match="owner died"):
        pool.container(name)


def test_connecting_to_no_service_ends_when_its_time_is_up(service: Service) -> None:
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=str(service.host_dir)):
        PoolManager.connect(service.host_dir, timeout=0.2)
    assert 0.2 <= time.monotonic() - began < 20
