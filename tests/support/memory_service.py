"""A complete service in this process: the real daemon on a temporary host dir, with containers that are mere processes.

```
 test ── real client ── socket ── real server, pool, watchdog, dispatcher, ledger ── ThreadLane ── LiveBackend
```
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self
from unittest import mock

from lxc_pool import hostdir
from lxc_pool.backend.memory import MemoryBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import LxcPoolError
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.model import State
from lxc_pool.service import daemon
from lxc_pool.service.jobs import Job, Outcome, perform
from lxc_pool.service.pool import Pool
from lxc_pool.service.server import PoolServer, listen
from lxc_pool.service.service import PoolService
from lxc_pool.wire import handshake, messages
from lxc_pool.wire.channel import Channel

SOON = 15.0
"""Seconds in which what should happen must have happened; it takes milliseconds."""


class LiveBackend(MemoryBackend):
    """A memory backend whose containers have a real process as init, and whose hangs end when told to."""

    def __init__(self) -> None:
        super().__init__(self._wait)
        self._go_on = threading.Event()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def create(self, blueprint: Blueprint) -> ProcessIdentity:
        super().create(blueprint)
        child = subprocess.Popen(["sleep", "infinity"], stdin=subprocess.DEVNULL)
        self._children[blueprint.name] = child
        self.running[blueprint.name] = identify(child.pid)
        return self.running[blueprint.name]

    def destroy(self, name: str, *, force: bool) -> None:
        super().destroy(name, force=force)
        if (child := self._children.pop(name, None)) is not None:
            child.kill()
            child.wait()

    def kill_init(self, name: str) -> None:
        """Let a container go down by itself."""
        self._children[name].kill()

    def go_on(self) -> None:
        """End all hangs and delays, now and later."""
        self._go_on.set()

    def _wait(self, seconds: float) -> None:
        self._go_on.wait(None if math.isinf(seconds) else seconds)


class ThreadLane:
    """A `Lane` whose worker is a thread for each job."""

    def __init__(self, backend: LiveBackend, _after_destroy: Callable[[], None]) -> None:
        self._backend = backend
        self._generation = 0
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        pass

    def start(self, job: Job, done: Callable[[Outcome], None]) -> None:
        thread = threading.Thread(target=self._work, args=(self._generation, job, done), name="lane")
        self._threads = [thread for thread in self._threads if thread.is_alive()] + [thread]
        thread.start()

    def replace(self) -> None:
        self._generation += 1

    def diagnose(self, job: Job) -> str:
        return f"a thread in {type(job).__name__}"

    def close(self) -> None:
        self._backend.go_on()
        for thread in self._threads:
            thread.join(SOON)

    def _work(self, generation: int, job: Job, done: Callable[[Outcome], None]) -> None:
        outcome: Outcome
        try:
            outcome = perform(self._backend, job)
        except LxcPoolError as error:
            outcome = error
        if generation == self._generation:
            done(outcome)


class MemoryService:
    """The service; `with` starts it and ends it. It can be restarted, on the same directories and containers.

    Attributes:
        directory: Where host dir and state dir are.
        backend: The engine, to be scripted.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        self.directory = directory
        self.host_dir = directory / "host"
        self.config = config
        self.backend = LiveBackend()
        self._servers: list[PoolServer] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._patches = contextlib.ExitStack()

    @property
    def server(self) -> PoolServer:
        return self._servers[-1]

    @property
    def pool(self) -> Pool:
        assert self.server._pool is not None
        return self.server._pool

    @property
    def service(self) -> PoolService:
        assert self.server._service is not None
        return self.server._service

    @property
    def socket_path(self) -> Path:
        return hostdir.socket_path(self.host_dir)

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        ready = threading.Event()

        def run() -> None:
            try:
                daemon.serve(
                    self.config,
                    self.backend,
                    host_dir=self.host_dir,
                    state_dir=self.directory / "state",
                    ready=lambda _path: ready.set(),
                )
            except BaseException as error:  # noqa: BLE001  # raised in the test's thread
                self._error = error
            finally:
                ready.set()

        self._thread = threading.Thread(target=run, name="service")
        self._thread.start()
        assert ready.wait(SOON)
        self._raise()

    def stop(self, *, grace: float = 0.0, keep_leases: bool = False) -> None:
        """End it in order; wait until it has ended."""
        if self._thread is None:
            return
        self.service._stop(grace, keep_leases)
        while self._thread.is_alive() and not self.pool._stock.closed:
            time.sleep(0.001)  # what hangs goes on only when it makes no difference any more
        self.backend.go_on()
        self._thread.join(SOON)
        assert not self._thread.is_alive()
        self._thread = None
        os.close(self.server._end)  # elsewhere it goes with the process
        self._raise()

    def restart(self) -> None:
        """End it, keeping the leases, and start it anew on the same containers."""
        self.stop(keep_leases=True)
        self.backend._go_on.clear()
        self.start()

    def reaches(self, **counts: int) -> None:
        """Wait until the pool has so many containers in each of these states, or waiters in the queue.

        Fails the test if it does not within a time.
        """
        deadline = time.monotonic() + SOON
        while True:
            census = self.pool.census()
            found = {field: census.total(field) for field in counts}
            if found == counts:
                return
            assert time.monotonic() < deadline, f"{found} is not {counts}"
            time.sleep(0.002)  # a test looks from outside, where there is no event

    def sessions(self, count: int) -> None:
        """Wait until so many connections are open."""
        deadline = time.monotonic() + SOON
        while len(self.server._sessions) != count:
            assert time.monotonic() < deadline, f"{len(self.server._sessions)} connections are not {count}"
            time.sleep(0.002)  # as in `reaches`

    def state_of(self, name: str) -> State | None:
        """Return what a container is doing; None if it is gone."""
        return next((info.state for info in self.pool.containers(None) if info.name == name), None)

    def raw(self) -> socket.socket:
        """Connect without a word."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(SOON)
        sock.connect(str(self.socket_path))
        return sock

    def channel(self) -> Channel:
        """Connect, prove the key and say hello: from here on anything may be said."""
        channel = Channel(self.raw())
        channel.deadline = time.monotonic() + SOON
        try:
            handshake.prove_to_service(channel, hostdir.read_key(self.host_dir))
            assert say(channel, messages.Hello(messages.PROTOCOL)) == messages.PROTOCOL
        except BaseException:
            channel.close()
            raise
        return channel

    def __enter__(self) -> Self:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._patches.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)

        def remember(host_dir: Path, key: bytes) -> PoolServer:
            self._servers.append(listen(host_dir, key))
            return self._servers[-1]

        for name, stand_in in {
            "ProcessLane": ThreadLane,
            "fork_server_in": lambda _directory, _prefix: contextlib.nullcontext(),
            "_signals": lambda *_: contextlib.nullcontext(),  # signals are the main thread's
            "listen": remember,
        }.items():
            self._patches.enter_context(mock.patch.object(daemon, name, stand_in))
        try:
            self.start()
        except BaseException:
            self._patches.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._patches:
            self.stop()
        assert self.backend.present == set()
        assert self.backend._children == {}

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def say(channel: Channel, call: messages.Call) -> object:
    """Make one call on a raw channel and return its result."""
    channel.send_bytes(messages.encode_call(call))
    return messages.decode_reply(call, channel.recv_bytes())


@contextlib.contextmanager
def memory_service(
    size: int = 2,
    *,
    workers: int = 1,
    confirm_timeout: float = 5.0,
    profiles: tuple[ProfileConfig, ...] = (),
    group: str = "no such group",
) -> Iterator[MemoryService]:
    """Run a service in a short directory that every user may enter; nothing is left of it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="lxp-test-"))
    directory.chmod(0o755)
    threads = set(threading.enumerate())
    try:
        config = Config(
            profiles=profiles or (ProfileConfig("default", size),),
            workers=workers,
            confirm_timeout=confirm_timeout,
            group=group,
        )
        with MemoryService(directory, config) as service:
            yield service
    finally:
        shutil.rmtree(directory)
    left = {thread for thread in set(threading.enumerate()) - threads if thread.is_alive()}
    assert not left
