"""How long a test waits for a warm container, beside a cold one, and beside the cheapest call that there is.

Timed, each in one call on one connection, and each only when the pool is full and nothing is being built or removed,
and after both processes have slept for 10 ms: CPUs and caches are as for a test that did something else before.

- get: `pool.get(id, 30)`, which asks, is offered a container, and confirms it. Its release is not timed.
- echo: `pool.echo("x")`: there and back through the service, which does nothing.
- cold: `lxc-copy -s -B overlay` and `lxc-start`, each spawned by vfork, of a container with the same image and the
  same kind of configuration. Its removal is not timed.

- get, awake: a get right after an echo: client and service have just been at work, as in a session of tests.

A round has one of each; every other round goes in reverse order, so that each comes as often after each other. Both
gets are held to the target; what is between them is the waking of two processes and cold caches, of which an echo has
as much. Beside these, without a target: echoes one right after another; and as many gets as are warm, one right after
another, while the lanes already make new containers.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable

from benchmarks.cold import ColdContainers
from benchmarks.lab import Lab, LabError, Service
from benchmarks.plan import Plan
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import ratio_of_medians
from lxc_pool import ContainerId

_SIZE = 5
"""Warm containers: the default."""


def measure(lab: Lab, plan: Plan) -> Outcome:
    """Measure it; see the module."""
    with lab.service(_SIZE) as service:
        cold = ColdContainers(lab)
        cold.prepare(service.image)
        calls = {
            "echo": lambda: _echo(service),
            "get": lambda: _get(service),
            "cold": cold.copy_and_start,
            "get, awake": lambda: _get_awake(service),
        }
        series = _in_turns(service, calls, plan)
        service.rest()
        echoes_in_a_row = [_echo(service) for _ in range(plan.rounds)]
        bursts = [seconds for _ in range(max(1, plan.rounds // _SIZE)) for seconds in _burst(service)]
    in_gets = ratio_of_medians(series["cold"], series["get"])
    in_gets_awake = ratio_of_medians(series["cold"], series["get, awake"])
    in_echoes = ratio_of_medians(series["get"], series["echo"])
    return Outcome(
        claims=(
            Claim.of_ratio("lxc-copy + lxc-start, in warm gets after a rest", Sense.AT_LEAST, 50, in_gets),
            Claim.of_ratio("lxc-copy + lxc-start, in warm gets of who is awake", Sense.AT_LEAST, 50, in_gets_awake),
            Claim.of_ratio("a warm get, in echoes", Sense.AT_MOST, 6, in_echoes),
        ),
        figures=(
            Figure.of_seconds("get and confirm, warm", series["get"]),
            Figure.of_seconds("get and confirm, right after an echo", series["get, awake"]),
            Figure.of_seconds("echo", series["echo"]),
            Figure.of_seconds("lxc-copy + lxc-start", series["cold"]),
            Figure.of_seconds("echo, one right after another", echoes_in_a_row),
            Figure.of_seconds(f"get and confirm, {_SIZE} one right after another, the pool refilling", bursts),
        ),
    )


def _in_turns(service: Service, calls: dict[str, Callable[[], float]], plan: Plan) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {name: [] for name in calls}
    orders = itertools.cycle((list(calls), list(reversed(calls))))
    for number in range(-plan.warmup, plan.rounds):
        for name in next(orders):
            service.rest()
            seconds = calls[name]()
            if number >= 0:
                series[name].append(seconds)
    return series


def _echo(service: Service) -> float:
    begin = time.perf_counter()
    service.pool.echo("x")
    return time.perf_counter() - begin


def _get_awake(service: Service) -> float:
    service.pool.echo("x")
    return _get(service)


def _burst(service: Service) -> list[float]:
    service.rest()
    with contextlib.ExitStack() as leases:
        seconds = []
        for _ in range(_SIZE):
            begin = time.perf_counter()
            container = service.pool.get("burst", 30)
            seconds.append(time.perf_counter() - begin)
            if container is not None:
                leases.enter_context(container)
        return seconds


def _get(service: Service) -> float:
    name = ContainerId.create("handout")
    begin = time.perf_counter()
    container = service.pool.get(name, 30)
    seconds = time.perf_counter() - begin
    if container is None:
        raise LabError(f"no container came free in 30 s: {service.pool.status()}")
    container.release()
    return seconds
