"""Faults at random, many at once, for as long as it is told to; the same seed makes the same plan.

    LXC_POOL_FAULT_SEED=12345 LXC_POOL_FAULT_SECONDS=600 python -m pytest tests/fault/test_random.py

What they meet is up to the machine's timing, so that a seed gives the same faults, and not always the same failure.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

from lxc_pool import LxcPoolError, PoolServiceProxy
from tests.support.faults import CREATION_STEPS, LEDGER_STEPS, REMOVAL_STEPS, FaultyService
from tests.support.oracle import Footprint, assert_healed, assert_no_larger, becomes_ready

SEED = int(os.environ.get("LXC_POOL_FAULT_SEED") or random.SystemRandom().randrange(2**32))
SECONDS = float(os.environ.get("LXC_POOL_FAULT_SECONDS") or 6)

CLIENTS = 4
CONFIG = "[pool]\nsize = 3\nworkers = 2\ncreate_timeout = 2\nconfirm_timeout = 0.5\n"

CLIENT = """
    import random, time
    rng = random.Random(SEED)
    while True:
        try:
            container = pool.get("x", rng.choice([0, 0.01, 1, 30]), ttl=rng.choice([None, 0.05, 5]))
            if container is None:
                continue
            with container:
                if rng.random() < 0.5:
                    container.run(["sh", "-c", "sleep 0.1 & echo"], capture_output=True)
                if rng.random() < 0.2:
                    container.keep(rng.choice([0.1, 1]))
                time.sleep(rng.expovariate(20))
        except LxcPoolError:
            time.sleep(0.05)
"""


class Chaos:
    """A busy service, and what can happen to it."""

    def __init__(self, service: FaultyService, rng: random.Random) -> None:
        self.service = service
        self.rng = rng
        self.clients: list[contextlib.AbstractContextManager[subprocess.Popen[str]]] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.happened: list[str] = []
        self.actions: dict[str, tuple[int, Callable[[], None]]] = {
            "kill a client": (6, self.kill_client),
            "stop a client": (3, lambda: self.signal_client(signal.SIGSTOP)),
            "let a client go on": (4, lambda: self.signal_client(signal.SIGCONT)),
            "kill what runs in or for a container": (4, self.kill_in_container),
            "kill a helper": (3, self.kill_helper),
            "let a lane die": (4, lambda: self.plan(CREATION_STEPS[1:] + REMOVAL_STEPS, "kill")),
            "let a lane hang": (1, lambda: self.plan(CREATION_STEPS[1:] + REMOVAL_STEPS, "hang")),
            "let a removal fail": (2, lambda: self.plan(REMOVAL_STEPS, "fail")),
            "kill the service": (1, self.kill_service),
            "let the service die at the ledger": (2, lambda: self.plan(LEDGER_STEPS, "kill")),
            "refuse writes for a moment": (1, self.refuse_writes),
        }

    def step(self) -> None:
        """Do one thing at random."""
        names = list(self.actions)
        name = self.rng.choices(names, [weight for weight, _act in self.actions.values()])[0]
        self.happened.append(name)
        self.actions[name][1]()
        self.tend()

    def tend(self) -> None:
        """Have as many clients as there should be, and a service."""
        if self.service.died():
            self.service.wait()
        if self.service.process is None:
            self.service.launch(config=CONFIG)
            # It may die again, at a step that was planned for it, before it is ready.
            with contextlib.suppress(AssertionError):
                self.service.await_ready()
        for process in [process for process in self.processes if process.poll() is not None]:
            self.processes.remove(process)
        while len(self.processes) < CLIENTS:
            client = self.service.client(f"    SEED = {self.rng.randrange(2**32)}\n{CLIENT}")
            self.clients.append(client)
            self.processes.append(client.__enter__())

    def end(self) -> None:
        """Kill all clients."""
        while self.clients:
            self.clients.pop().__exit__(None, None, None)

    def plan(self, steps: tuple[str, ...], kind: str) -> None:
        self.service.faults.plan(self.rng.choice(steps), kind)  # type: ignore[arg-type]  # one of three words

    def kill_client(self) -> None:
        self.rng.choice(self.processes).kill()

    def signal_client(self, number: signal.Signals) -> None:
        self.rng.choice(self.processes).send_signal(number)

    def kill_in_container(self) -> None:
        pids = [pid for path in self.service.cgroups() for pid in read_pids(path)]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(pids), signal.SIGKILL)

    def kill_helper(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            helpers = psutil.Process(self.service.pid).children(recursive=True)
            if helpers:
                self.rng.choice(helpers).kill()

    def kill_service(self) -> None:
        if not self.service.died():
            self.service.kill()

    def refuse_writes(self) -> None:
        self.service.faults.set_read_only(True)
        time.sleep(0.2)
        self.service.faults.set_read_only(False)


def read_pids(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs", encoding="ascii") as file:
            return [int(line) for line in file]
    except OSError:
        return []


def heal(chaos: Chaos, pool: PoolServiceProxy) -> None:
    """End all faults, and have a service whose pool is full."""
    chaos.end()
    chaos.service.faults.forget()
    if chaos.service.died():
        chaos.service.wait()
    if chaos.service.process is None:
        chaos.service.start(config=CONFIG)
    with contextlib.suppress(LxcPoolError):
        becomes_ready(pool)


@pytest.mark.timeout(SECONDS + 150)
def test_whatever_dies_in_whatever_order_the_pool_is_whole_again(service: FaultyService) -> None:
    print(f"to repeat: LXC_POOL_FAULT_SEED={SEED} LXC_POOL_FAULT_SECONDS={SECONDS:g}")  # noqa: T201  # shown with a failure
    rng = random.Random(SEED)  # noqa: S311  # a plan, no secret
    pool = service.start(config=CONFIG)
    chaos = Chaos(service, rng)
    try:
        chaos.tend()
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            chaos.step()
            time.sleep(rng.expovariate(5))
        heal(chaos, pool)
        try:
            assert_healed(service, pool, within=30)
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, after {chaos.happened}: {error}") from error
    finally:
        chaos.end()
        service.faults.forget()
    # And what it took meanwhile it has given back.
    with pool.lease("x") as container:
        container.run(["true"], check=True)
    assert_healed(service, pool)
    before = Footprint.of(service.pid)
    for number in range(10):
        with pool.lease(number, 10) as container:
            container.run(["true"], check=True)
    assert_healed(service, pool)
    assert_no_larger(service.pid, before)
