"""The whole service as a process of its own, with real workers: how it begins, and each way in which it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

from lxc_pool import Container, PoolManager, PoolServiceProxy, hostdir
from lxc_pool.errors import HostDirError, LeaseExpired, ServiceUnavailable
from lxc_pool.host.processes import identify
from lxc_pool.model import State
from tests.support.processes import open_descriptors

SOON = 30.0

SERVE = """
import logging, sys
from pathlib import Path
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import LxcPoolError
from lxc_pool.service.daemon import serve
from tests.support.process_backend import ProcessBackend

logging.basicConfig(level=logging.INFO)
directory = Path(sys.argv[1])
config = Config((ProfileConfig("default", 2),), workers=2, group="no such group")
(directory / "containers").mkdir(exist_ok=True)
try:
    serve(
        config,
        ProcessBackend(directory / "containers"),
        host_dir=directory / "host",
        state_dir=directory / "state",
        ready=lambda path: print("ready", path, flush=True),
    )
except LxcPoolError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Daemon:
    """One service, of its own process; `with` ends it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host_dir = directory / "host"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()

    def end(self) -> int:
        """Wait for its end and return its status."""
        return self.process.wait(SOON)

    def containers(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "containers").iterdir())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes its pipes
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SOON)
            self.process.kill()


@pytest.fixture
def directory() -> Iterator[Path]:
    before = open_descriptors()
    with tempfile.TemporaryDirectory(prefix="lxp-test-") as path:
        yield Path(path)
        left = [process.pid for process in psutil.process_iter(["cmdline"]) if path in str(process.info["cmdline"])]
        assert left == []
    assert open_descriptors() == before


@pytest.fixture
def daemon(directory: Path) -> Iterator[Daemon]:
    with Daemon(directory) as daemon:
        assert daemon.line == f"ready {hostdir.socket_path(daemon.host_dir)}"
        yield daemon


@pytest.fixture
def pool(daemon: Daemon) -> Iterator[PoolServiceProxy]:
    with PoolManager.connect(daemon.host_dir, timeout=SOON) as pool:
        pool.wait_ready(timeout=SOON)
        yield pool


def lives(pid: int) -> bool:
    try:
        return bool(identify(pid))
    except ProcessLookupError:
        return False


def lease(pool: PoolServiceProxy) -> Container:
    container = pool.get("x", SOON)
    assert container is not None
    return container


def test_shutdown_returns_when_process_and_containers_are_gone(daemon: Daemon, pool: PoolServiceProxy) -> None:
    with pool.lease("x", SOON) as container:
        pid = container.init_pid
        assert pool.status().pid == daemon.process.pid
        pool.shutdown(grace=0)
        assert not lives(daemon.process.pid)
        assert not lives(pid)
        assert daemon.containers() == []
        container._released = True
    assert daemon.end() == 0
    assert not hostdir.socket_path(daemon.host_dir).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(daemon: Daemon, pool: PoolServiceProxy, number: signal.Signals) -> None:
    assert len(daemon.containers()) == 2
    daemon.process.send_signal(number)
    assert daemon.end() == 0
    assert daemon.containers() == []
    with pytest.raises(ServiceUnavailable):
        pool.echo("x")


def test_a_second_signal_ends_the_grace_of_leases(daemon: Daemon, pool: PoolServiceProxy) -> None:
    container = lease(pool)
    daemon.process.send_signal(signal.SIGTERM)
    while pool.status().running or pool.status().reaping:
        pass
    assert container.state is State.LEASED
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.end() == 0
    assert daemon.containers() == []
    container._released = True


def test_a_second_service_on_the_same_directories_is_refused_with_the_pid_of_the_first(
    daemon: Daemon, pool: PoolServiceProxy
) -> None:
    with Daemon(daemon.directory) as second:
        assert second.line == ""
        assert second.end() == 1
        assert second.process.stderr is not None
        words = second.process.stderr.read()
    assert HostDirError.__name__ in words
    assert f"pid {daemon.process.pid}" in words
    assert pool.echo("x") == "x"


def test_one_that_can_tell_nobody_that_it_is_ready_leaves_no_container(directory: Path) -> None:
    script = SERVE.replace(
        'ready=lambda path: print("ready", path, flush=True)', "ready=lambda path: fail_once_one_is_made()"
    ).replace(
        "try:\n    serve(",
        "def fail_once_one_is_made():\n"
        "    while not any((directory / 'containers').iterdir()):\n"
        "        pass\n"
        "    raise BrokenPipeError\n"
        "try:\n    serve(",
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert b"BrokenPipeError" in done.stderr
    assert done.returncode == 1
    assert os.listdir(directory / "containers") == []


def test_leases_survive_a_killed_service_and_the_next_one_takes_them_up(daemon: Daemon, pool: PoolServiceProxy) -> None:
    container = lease(pool)
    workers = psutil.Process(daemon.process.pid).children(recursive=True)
    daemon.process.kill()
    daemon.end()
    with Daemon(daemon.directory):
        assert container.state is State.LEASED
        assert lives(container.init_pid)
        container.release()
        with pytest.raises(LeaseExpired):
            _ = container.state
        pool.wait_ready(timeout=SOON)
        pool.shutdown(0)
    assert daemon.containers() == []
    assert [worker for worker in workers if worker.is_running() and lives(worker.pid)] == []


def test_leases_are_left_to_the_next_service_if_that_is_asked_for(daemon: Daemon, pool: PoolServiceProxy) -> None:
    container = lease(pool)
    pool.shutdown(keep_leases=True)
    assert daemon.containers() == [container.name]
    with Daemon(daemon.directory):
        assert container.state is State.LEASED
        container.release()
        pool.shutdown(0)
    assert os.listdir(daemon.directory / "containers") == []
