"""What one more warm container takes of the memory.

The pool is made larger by `resize` and smaller again, several times; it is measured when it has been at rest for a
while, with few and with many containers:

- monitor and init: their PSS (proportional set size: a page that several processes share is divided among them), the
  mean over all containers when there are many; the median of all times.
- the service: the growth of its PSS and of its helpers' (the lanes' workers, the server they are forked from, the
  agent), for each container; from the first time, since what Python has once taken it keeps for the next time.
- the kernel: the growth of SUnreclaim (/proc/meminfo), for each container; the median of all times. It is the whole
  machine's: measure when nothing else runs.

The target is for the sum. Beside it, without a target: what else grows of the kernel's (the cgroups' data for each CPU,
kernel stacks, page tables), and files in memory (the containers' /dev and /dev/shm).
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

from benchmarks.lab import Lab, Service
from benchmarks.plan import Plan
from benchmarks.processes import Trees, kernel_memory, pss
from benchmarks.report import Claim, Figure, Outcome, Sense

_LIMIT = 2.0
_MIB = 2**20

_KERNEL = ("SUnreclaim", "Percpu", "KernelStack", "PageTables", "Shmem")

_SAMPLES = 9
"""Looks at the kernel's memory for one value, their median."""


class Level(NamedTuple):
    """Bytes in use at one size of the pool."""

    service: int
    monitors: int
    inits: int
    kernel: dict[str, float]


def measure(lab: Lab, plan: Plan) -> Outcome:
    """Measure it; see the module."""
    with lab.service(plan.few) as service:
        with service.pool.lease("memory", 30) as container:
            container.run(["true"], check=True)
        swings = []
        for _ in range(plan.swings):
            low = _level(service, plan.few, plan)
            swings.append((low, _level(service, plan.many, plan)))
    added = plan.many - plan.few
    monitor, init = (
        statistics.median(getattr(high, field) for _low, high in swings) / plan.many / _MIB
        for field in ("monitors", "inits")
    )
    share = (swings[0][1].service - swings[0][0].service) / added / _MIB
    kernel = {
        name: statistics.median(high.kernel[name] - low.kernel[name] for low, high in swings) / added / _MIB
        for name in _KERNEL
    }
    sums = monitor + init + share + kernel["SUnreclaim"]
    return Outcome(
        claims=(Claim("memory of one warm busybox container", Sense.AT_MOST, _LIMIT, "MiB", sums),),
        figures=(
            Figure("PSS of its monitor", "MiB", monitor),
            Figure("PSS of its processes", "MiB", init),
            Figure("growth of the service's PSS", "MiB", share),
            *(Figure(f"growth of {name}", "MiB", kernel[name]) for name in _KERNEL),
            Figure(f"PSS of the service and its helpers, {plan.few} containers", "MiB", swings[0][0].service / _MIB),
        ),
    )


def _level(service: Service, size: int, plan: Plan) -> Level:
    service.pool.resize(size)
    service.rest()
    time.sleep(plan.settle_seconds)  # the kernel frees late, and does not tell
    trees = Trees.of(
        service.process.pid, [info.init_pid for info in service.pool.containers() if info.init_pid is not None]
    )
    looks = []
    for _ in range(_SAMPLES):
        time.sleep(plan.settle_seconds / _SAMPLES)  # between looks that are to be independent
        looks.append(kernel_memory())
    kernel = {name: statistics.median(look[name] for look in looks) for name in _KERNEL}
    return Level(pss([*trees.service, *trees.helpers]), pss(trees.monitors), pss(trees.inits), kernel)
