"""What a service with warm containers takes of the CPU when nobody asks it for anything.

After one command has been run, so that the agent that runs commands is there too, and the pool is full again and has
been at rest for a while, this process sleeps. Counted is the CPU time, user's and system's, by the kernel's clock of
each process, that has been added when it wakes: of the service and its helpers (the lanes' workers, the server they are
forked from, the agent), and apart from them, without a target, of the containers' monitors and of what runs in them.
"""

from __future__ import annotations

import time

from benchmarks.lab import Lab, LabError
from benchmarks.plan import Plan
from benchmarks.processes import Trees, cpu_seconds
from benchmarks.report import Claim, Figure, Outcome, Sense

_LIMIT = 0.2
"""Percent of one CPU."""


def measure(lab: Lab, plan: Plan) -> Outcome:
    """Measure it; see the module."""
    with lab.service(plan.idle_containers) as service:
        with service.pool.lease("idle", 30) as container:
            container.run(["true"], check=True)
        service.rest()
        time.sleep(plan.settle_seconds)  # until what the commands began has ended
        inits = [info.init_pid for info in service.pool.containers() if info.init_pid is not None]
        time.sleep(plan.settle_seconds)  # and from that question too
        trees = Trees.of(service.process.pid, inits)
        groups = (trees.service, trees.helpers, trees.monitors, trees.inits)
        begin, before = time.monotonic(), [cpu_seconds(pids) for pids in groups]
        time.sleep(plan.idle_seconds)  # it is what is measured
        elapsed, after = time.monotonic() - begin, [cpu_seconds(pids) for pids in groups]
        if Trees.of(service.process.pid, inits) != trees:
            raise LabError("the service was not idle: processes have come or gone")
    service_share, helpers, monitors, containers = (
        (now - then) / elapsed * 100 for then, now in zip(before, after, strict=True)
    )
    count = plan.idle_containers
    return Outcome(
        claims=(
            Claim(
                f"service and helpers, {count} warm containers, {elapsed:.0f} s",
                Sense.UNDER,
                _LIMIT,
                "% of a CPU",
                service_share + helpers,
            ),
        ),
        figures=(
            Figure("all CPU time of service and helpers before that, for comparison", "s", sum(before[:2])),
            Figure("the service process", "% of a CPU", service_share),
            Figure(f"its {len(trees.helpers)} helpers", "% of a CPU", helpers),
            Figure(f"the {len(trees.monitors)} monitors", "% of a CPU", monitors),
            Figure(f"the {len(trees.inits)} processes in containers", "% of a CPU", containers),
        ),
    )
