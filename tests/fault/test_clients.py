"""A client is killed or stopped, at each point of its life: its container is warm again or reaped, nobody else's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lxc_pool import PoolServiceProxy, State
from tests.support.faults import FaultyService
from tests.support.oracle import Footprint, assert_healed, assert_no_larger
from tests.support.reuse import occupied
from tests.support.starter import Starter
from tests.support.waiting import eventually

SIZE = 2
CONFIRM_TIMEOUT = 1.0

PHASES = ("waiting", "offered", "leased", "running", "releasing")

# The client says where it is, and goes on when it is told to; `child`: a forked one that keeps its connection open.
SCRIPT = """
    import os, time
    from lxc_pool.client.connection import Connection
    from lxc_pool.wire import messages

    def stop_here():
        print("here", flush=True)
        sys.stdin.readline()

    call = Connection.call

    def watched_call(self, message, deadline, descriptors=()):
        if PHASE == "offered" and isinstance(message, messages.Confirm):
            stop_here()
        if PHASE == "releasing" and isinstance(message, messages.Release):
            # Said, and the answer is not taken yet.
            self._channel.deadline = deadline
            self._channel.send_bytes(messages.encode_call(message))
            stop_here()
            return messages.decode_reply(message, self._channel.recv_bytes())
        return call(self, message, deadline, descriptors)

    Connection.call = watched_call
    child = os.fork() if CHILD else 0
    if CHILD and child == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # whoever reads us shall see our end
        time.sleep(1000)
    print(child, flush=True)
    if PHASE == "waiting":
        print("here", flush=True)
    container = pool.get("x", 60)
    if PHASE == "leased":
        stop_here()
    if PHASE == "running":
        container.run(["sh", "-c", "echo here; sleep SLEEP"], check=True)
    else:
        container.run(["true"], check=True) if PHASE != "releasing" else None
    container.release()
    print("done", flush=True)
"""


@dataclasses.dataclass
class World:
    """The service that all tests of this module share, and what it took before the first of them."""

    service: FaultyService
    pool: PoolServiceProxy
    starter: Starter


@pytest.fixture(scope="module")
def world(images: Path) -> Iterator[World]:
    service = FaultyService(images)
    try:
        with tempfile.TemporaryDirectory(prefix="lxp-test-") as directory:
            starter = Starter(Path(directory))
            config = f"[pool]\nsize = {SIZE}\nworkers = 2\nconfirm_timeout = {CONFIRM_TIMEOUT}\n"
            pool = service.start(config=config, path=[starter.directory])
            with pool.lease("first") as container:  # the agent that runs commands comes with it
                container.run(["true"], check=True)
            assert_healed(service, pool)
            before = Footprint.of(service.pid)
            yield World(service, pool, starter)
            assert_healed(service, pool)
            assert_no_larger(service.pid, before)
    finally:
        service.close()


@contextlib.contextmanager
def client_at(
    world: World, phase: str, *, child: bool = False, sleep: str = "1000", gate: contextlib.ExitStack | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Have a client that is at a point of its life; whatever it has forked is killed at the end.

    For one that waits, nothing comes up until *gate* is closed, or the block ends.
    """
    script = f"    PHASE, CHILD = {phase!r}, {child}\n" + SCRIPT.replace("SLEEP", sleep)
    forked = 0
    with contextlib.ExitStack() as stack:
        if phase == "waiting":
            gate = stack.enter_context(gate or contextlib.ExitStack())
            gate.enter_context(world.starter.holding())
            taken = [stack.enter_context(world.pool.lease("taken", 10)) for _ in range(SIZE)]
            assert len(taken) == SIZE
        client = stack.enter_context(world.service.client(script))
        assert client.stdout is not None
        try:
            forked = int(client.stdout.readline())
            assert client.stdout.readline().strip() == "here"
            if phase == "waiting":
                eventually(lambda: world.pool.status().waiting == 1, "it waits")
            yield client
        finally:
            if forked:
                os.kill(forked, signal.SIGKILL)


def of_clients(world: World) -> set[State]:
    """Return what is being done with containers that are, or may be, the client's."""
    return {info.state for info in world.pool.containers() if info.id == "x" or info.state is State.RESERVED}


@pytest.mark.parametrize("child", [False, True], ids=["plain", "forked"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_is_killed_leaves_nothing(world: World, phase: str, child: bool) -> None:
    with client_at(world, phase, child=child) as client:
        client.kill()
        client.wait()
        began = time.monotonic()
        eventually(lambda: world.pool.status().waiting == 0, "it waits no more")
        eventually(lambda: not of_clients(world), "it has nothing any more")
        # Whether or not its connection lives on: it takes no timeout to notice.
        assert time.monotonic() - began < CONFIRM_TIMEOUT or os.getloadavg()[0] > os.cpu_count()  # type: ignore[operator]
        if phase != "waiting":
            assert_healed(world.service, world.pool)
    assert_healed(world.service, world.pool)


@pytest.mark.parametrize("phase", PHASES)
def test_a_process_that_gets_the_pid_of_a_killed_client_gets_nothing_else_of_it(world: World, phase: str) -> None:
    with client_at(world, phase) as client:
        client.kill()
        client.wait()
        with occupied(client.pid):
            eventually(lambda: world.pool.status().waiting == 0, "it waits no more")
            eventually(lambda: not of_clients(world), "it has nothing any more")
            if phase != "waiting":
                assert_healed(world.service, world.pool)
    assert_healed(world.service, world.pool)


def go_on(client: subprocess.Popen[str]) -> str:
    """Let a stopped client go on, and return its last word."""
    client.send_signal(signal.SIGCONT)
    return client.communicate("\n", timeout=30)[0].split()[-1]


STOPPED: dict[str, Callable[[World], bool]] = {
    "offered": lambda world: of_clients(world) == set(),  # not confirmed in time: it is warm again
    "leased": lambda world: of_clients(world) == {State.LEASED},
    "running": lambda world: of_clients(world) == {State.LEASED},
    "releasing": lambda world: of_clients(world) == set(),  # it had said so
}


@pytest.mark.parametrize("child", [False, True], ids=["plain", "forked"])
@pytest.mark.parametrize("phase", STOPPED)
def test_a_client_that_is_stopped_keeps_its_lease_and_holds_up_nobody(world: World, phase: str, child: bool) -> None:
    with client_at(world, phase, child=child, sleep="2") as client:
        client.send_signal(signal.SIGSTOP)
        eventually(lambda: STOPPED[phase](world), "it has what it should")
        with world.pool.lease("another", 10), world.pool.lease("and another", 10):
            time.sleep(0.2)
            assert STOPPED[phase](world)
        # It queues again, if what it was offered has been taken back.
        assert go_on(client) == "done"
    assert_healed(world.service, world.pool)


@pytest.mark.parametrize("child", [False, True], ids=["plain", "forked"])
def test_a_client_that_is_stopped_while_it_waits_holds_up_the_queue_for_one_timeout(world: World, child: bool) -> None:
    with contextlib.ExitStack() as stack:
        gate = contextlib.ExitStack()
        with client_at(world, "waiting", child=child, gate=gate) as client:
            client.send_signal(signal.SIGSTOP)
            other = stack.enter_context(world.service.client("pool.get('y', 30); print('got', flush=True)"))
            assert other.stdout is not None
            eventually(lambda: world.pool.status().waiting == 2, "another one waits behind it")
            gate.close()
            assert other.stdout.readline().strip() == "got"
            eventually(lambda: world.pool.status().waiting == 0, "both have been served")
            eventually(lambda: not of_clients(world), "what it was offered is taken back", 2 * CONFIRM_TIMEOUT + 5)
            assert go_on(client) == "done"
        other.communicate()
    assert_healed(world.service, world.pool)
