"""How many containers a second the service makes, hands out and removes, beside what the machine can do without one.

- ours: threads of this process, four for each lane, lease and release at once, over and over, from a pool of 10.
  Counted are life cycles: the mean of containers made and containers removed between two moments.
- bare: as many processes as the service has lanes; each makes, starts, probes, stops and removes one container after
  another by the functions that the lanes call, with no service. Counted are whole cycles.

Both have the same image, file system and number of processes that work on containers. Blocks alternate, as ours, bare,
bare, ours …; each begins with a time that does not count, in which ours uses up what is warm and finds its pace. The
bare processes wait in a read while ours works; the service has a full pool and is at rest while the bare loop works.
What the threads that lease take of the CPUs is on our account.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import NamedTuple

from benchmarks import processes
from benchmarks.bare import BareLoop
from benchmarks.lab import Lab, Service
from benchmarks.plan import Plan
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import Summary, ratio_of_medians
from lxc_pool import LxcPoolError, PoolServiceProxy

_SIZE = 10
_CLIENTS_PER_LANE = 4
"""Enough that somebody always waits. A guess; twice as many changed nothing."""


class Block(NamedTuple):
    """What one block of ours came to.

    Attributes:
        rate: Life cycles a second.
        service_cpu: Seconds of CPU that the service process took for one cycle.
        client_cpu: The same for this process.
    """

    rate: float
    service_cpu: float
    client_cpu: float


def measure(lab: Lab, plan: Plan) -> Outcome:
    """Measure it; see the module."""
    with lab.service(_SIZE) as service:
        lanes = service.pool.status().worker_count
        with BareLoop(lab, service.image, lanes) as bare:
            ours: list[Block] = []
            bares: list[float] = []
            for pair in range(plan.blocks):
                for side in ("ours", "bare") if pair % 2 == 0 else ("bare", "ours"):
                    if side == "ours":
                        ours.append(_ours(service, lanes * _CLIENTS_PER_LANE, plan))
                    else:
                        bares.append(bare.block(plan.settle_seconds, plan.block_seconds))
                    service.rest()
            creations, removals = bare.durations()
    rates = [block.rate for block in ours]
    return Outcome(
        claims=(
            Claim.of_ratio(
                f"refill with {lanes} lanes, in bare loops", Sense.AT_LEAST, 0.85, ratio_of_medians(rates, bares)
            ),
        ),
        figures=(
            Figure("containers leased and released, with the service", "1/s", Summary.of(rates)),
            Figure("the bare loop's cycles", "1/s", Summary.of(bares)),
            Figure.of_seconds("the bare loop: make, start, probe", creations),
            Figure.of_seconds("the bare loop: stop, remove", removals),
            Figure(
                "CPU time of the service process, per container",
                "ms",
                statistics.median(block.service_cpu for block in ours) * 1e3,
            ),
            Figure(
                "CPU time of the leasing process, per container",
                "ms",
                statistics.median(block.client_cpu for block in ours) * 1e3,
            ),
        ),
    )


def _ours(service: Service, clients: int, plan: Plan) -> Block:
    load = Load(service.pool, clients)
    load.start()
    try:
        time.sleep(plan.settle_seconds)  # until the load has found its pace
        cpu = processes.cpu_seconds([service.process.pid]), time.process_time()
        begin, made, removed = _balance(service, load)
        time.sleep(plan.block_seconds)  # the time that is counted
        end, made_then, removed_then = _balance(service, load)
        cpu_then = processes.cpu_seconds([service.process.pid]), time.process_time()
    finally:
        load.stop()
    cycles = max((made_then - made + removed_then - removed) / 2, 0.5)
    return Block(cycles / (end - begin), (cpu_then[0] - cpu[0]) / cycles, (cpu_then[1] - cpu[1]) / cycles)


def _balance(service: Service, load: Load) -> tuple[float, int, int]:
    """Return the time, and how many containers have been made and removed by then, each plus a constant."""
    status = service.pool.status()
    now, leases = time.monotonic(), load.count
    return now, leases + status.size + status.reserved + status.leased, leases - status.reaping


class Load:
    """Threads that lease and release. `count` is a sum of ints that one thread each writes."""

    def __init__(self, pool: PoolServiceProxy, clients: int) -> None:
        self._pool = pool
        self._counts = [0] * clients
        self._ending = threading.Event()
        self._error: LxcPoolError | None = None
        self._threads = [threading.Thread(target=self._lease, args=(index,)) for index in range(clients)]

    @property
    def count(self) -> int:
        """Leases ended so far."""
        return sum(self._counts)

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each thread end its lease, and wait for that.

        Raises:
            LxcPoolError: A lease failed meanwhile.
        """
        self._ending.set()
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _lease(self, index: int) -> None:
        try:
            while not self._ending.is_set():
                container = self._pool.get("refill", 1.0)
                if container is not None:
                    container.release()
                    self._counts[index] += 1
        except LxcPoolError as error:
            self._error = error
