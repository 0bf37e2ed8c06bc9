"""A busy service, its lanes and what runs its commands have no descriptors left, for moments; then they have again.

    LXC_POOL_FAULT_SEED=12345 LXC_POOL_FAULT_SECONDS=600 python -m pytest tests/fault/test_descriptors.py

Limits are lowered from outside, by prlimit(2), at moments that the seed gives. What they meet is up to the machine's
timing: each fault that a seed has found has a test of its own (`tests/unit/test_lanes.py`, `test_pool.py`,
`test_processes.py`).
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.faults import FaultyService
from tests.support.oracle import Footprint, assert_healed, assert_no_larger, becomes_ready
from tests.support.real_service import Service

SEEDS = [int(seed)] if (seed := os.environ.get("LXC_POOL_FAULT_SEED")) else [1, 2]
SECONDS = float(os.environ.get("LXC_POOL_FAULT_SECONDS") or 3)

CONFIG = "[pool]\nsize = 3\nworkers = 2\ncreate_timeout = 2\nconfirm_timeout = 0.5\n"

CLIENT = """
    import random, subprocess, time
    rng = random.Random({seed})
    while True:
        try:
            container = pool.get("x", rng.choice([0, 0.01, 1, 30]), ttl=rng.choice([None, 0.05, 5]))
            if container is None:
                continue
            with container:
                if rng.random() < 0.8:
                    script = rng.choice(["true", "sleep 0.1 & echo", "sleep 1000", "sleep 1000 & sleep 1000"])
                    container.run(["sh", "-c", script], capture_output=True, timeout=rng.choice([0.05, 1]))
        except subprocess.TimeoutExpired:
            pass
        except (LxcPoolError, OSError) as error:
            print(type(error).__name__, error, file=sys.stderr)
            time.sleep(0.02)
"""


def helpers(service: Service, words: str) -> list[int]:
    """Return the service's processes that have *words* in their command lines."""
    return [pid for pid in service.marked() if words in command_line(pid)]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


PARTS: dict[str, Callable[[Service], list[int]]] = {
    "service": lambda service: [service.pid],
    "lanes": lambda service: helpers(service, "forkserver"),
    "agent": lambda service: helpers(service, "lxc_pool.execution.agent"),
    "all of them": lambda service: service.marked(),
}


@contextlib.contextmanager
def short_of_descriptors(pids: list[int], rng: random.Random) -> Iterator[None]:
    """Let these processes have few descriptors more than they have now."""
    before = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            used = len(os.listdir(f"/proc/{pid}/fd"))
            before[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + rng.randrange(8), before[pid][1]))
    try:
        yield
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def raise_limits(service: Service) -> None:
    """Give back what those have inherited that were born meanwhile."""
    for pid in service.marked():
        with contextlib.suppress(OSError):
            _soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.timeout(SECONDS + 120)
def test_a_shortage_of_descriptors_leaves_nothing_when_it_is_over(service: FaultyService, seed: int) -> None:
    print(f"to repeat: LXC_POOL_FAULT_SEED={seed} LXC_POOL_FAULT_SECONDS={SECONDS:g}")  # noqa: T201  # shown with a failure
    rng = random.Random(seed)  # noqa: S311  # a plan, no secret
    pool = service.start(config=CONFIG)
    pool.wait_ready()
    with pool.lease("x") as container:
        container.run(["true"], check=True)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(service.client(CLIENT.replace("{seed}", str(rng.randrange(2**32))))) for _ in range(3)
        ]
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with short_of_descriptors(PARTS[rng.choice(list(PARTS))](service), rng):
                time.sleep(rng.expovariate(5))
            raise_limits(service)
            time.sleep(rng.expovariate(10))
        assert [client.poll() for client in clients] == [None] * 3  # nothing but declared errors came to them
    becomes_ready(pool)
    assert_healed(service, pool, within=30)  # a removal that failed again and again is tried again after 10 s
    with pool.lease("x") as container:
        container.run(["true"], check=True)
    assert_healed(service, pool)
    before = Footprint.of(service.pid)
    for number in range(5):
        with pool.lease(number, 10) as container:
            container.run(["true"], check=True)
    assert_healed(service, pool)
    assert_no_larger(service.pid, before)
