"""How soon a container is reaped after its owner has died.

The owner is a process of its own that does nothing (`sleep`), the container a busybox one with an empty network, the
pool is full and at rest but for that lease. The owner is killed; timed from the moment at which its pidfd says that it
has died:

- begun: until the service says of the container that it is no longer leased (`pool.containers()`, over and over: the
  answer is as old as a round trip).
- init: until the pidfd of the container's init says that it has ended.
- gone: until the service has forgotten the container, and neither its directory nor a cgroup of it is there.

Looked at in turns, with a pause of a fifth of a millisecond, on the machine that does the work.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.lab import STEP_TIMEOUT, Lab, LabError, Service
from benchmarks.plan import Plan
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import percentile
from lxc_pool import Container, State
from lxc_pool.host import cgroups

_SIZE = 2
_BEGUN, _GONE = 50.0, 100.0
"""Milliseconds. Origin: what is asked for."""

_PAUSE = 0.0002


class Reaping(NamedTuple):
    """Seconds from an owner's death."""

    begun: float
    init: float
    gone: float


def measure(lab: Lab, plan: Plan) -> Outcome:
    """Measure it; see the module."""
    with lab.service(_SIZE) as service:
        reapings = [_reaping(lab, service) for _ in range(plan.warmup + plan.rounds)][plan.warmup :]
    begun, init, gone = ([getattr(reaping, field) for reaping in reapings] for field in Reaping._fields)
    return Outcome(
        claims=(
            _claim("from an owner's death until its reaping has begun", _BEGUN, begun),
            _claim("from an owner's death until its container is gone", _GONE, gone),
        ),
        figures=(
            Figure.of_seconds("owner's death to reaping begun", begun),
            Figure.of_seconds("owner's death to init ended", init),
            Figure.of_seconds("owner's death to directory and cgroups gone", gone),
        ),
    )


def _claim(what: str, limit: float, seconds: list[float]) -> Claim:
    return Claim(f"{what}, 95th percentile", Sense.AT_MOST, limit, "ms", percentile(seconds, 95) * 1e3)


def _reaping(lab: Lab, service: Service) -> Reaping:
    service.rest()
    with contextlib.ExitStack() as stack:
        with lab.interrupts.shield():
            owner = subprocess.Popen(["sleep", "infinity"], stdin=subprocess.DEVNULL, start_new_session=True)
            stack.callback(owner.wait)
            stack.callback(owner.kill)
        container = service.pool.get("reap", 30, owner=owner.pid)
        if container is None:
            raise LabError("no container came free")
        service.pool.wait_ready()
        death, init = (stack.enter_context(_pidfd(pid)) for pid in (owner.pid, container.init_pid))
        time.sleep(0.01)  # so that all sleep when the owner dies
        owner.send_signal(signal.SIGKILL)
        select.select([death], [], [])
        return _watch(service, container, init)


def _watch(service: Service, container: Container, init: int) -> Reaping:
    died = time.monotonic()
    directory = service.state_dir / "containers" / container.name
    begun = ended = 0.0
    while (elapsed := time.monotonic() - died) < STEP_TIMEOUT:
        state = next((info.state for info in service.pool.containers() if info.name == container.name), None)
        now = time.monotonic() - died
        if not begun and state is not State.LEASED:
            begun = now
        if not ended and select.select([init], [], [], 0)[0]:
            ended = now
        if state is None and ended and not directory.exists() and not cgroups.container_cgroups(container.name):
            return Reaping(begun, ended, time.monotonic() - died)
        time.sleep(_PAUSE)  # a directory and v1 cgroups that go have no event
    raise LabError(f"{container.name} is still there {elapsed:.0f} s after its owner's death")


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
