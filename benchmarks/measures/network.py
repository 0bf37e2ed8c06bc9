"""Whether a bridge makes a get or a release slower, beside the same profile without a network.

A pool with two profiles that differ by `network` alone; its bridge has no NAT, so that nothing of the machine's own
network is touched. Timed, in turns, each only when the pool is full and at rest:

- get: `pool.get(id, 30, profile=…)`, as in `handout`.
- release: `container.release()` of what that returned, until the service has taken note of it. The container, and its
  connection to the bridge, are removed after that; how long until all of it is gone is a figure without a target.
"""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

from benchmarks.lab import Lab, LabError, Service
from benchmarks.plan import Plan
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import Ratio, ratio_of_medians
from lxc_pool import ContainerId

_SIZE = 3
"""Warm containers of each profile."""

_CONFIG = f"""\
[network]
nat = false
dns = []
[profile.default]
size = {_SIZE}
[profile.bridge]
size = {_SIZE}
network = "bridge"
"""

_PROFILES = {"empty": "default", "bridge": "bridge"}


class Turn(NamedTuple):
    """One container's life with a client, in seconds."""

    get: float
    release: float
    removal: float


def measure(lab: Lab, plan: Plan) -> Outcome:
    """Measure it; see the module."""
    turns: dict[str, list[Turn]] = {network: [] for network in _PROFILES}
    orders = itertools.cycle((list(_PROFILES), list(reversed(_PROFILES))))
    with lab.service(config=_CONFIG) as service:
        for number in range(-plan.warmup, plan.rounds):
            for network in next(orders):
                turn = _turn(service, _PROFILES[network])
                if number >= 0:
                    turns[network].append(turn)
    gets, releases, removals = (
        {network: [turn[step] for turn in turns[network]] for network in _PROFILES} for step in range(3)
    )
    return Outcome(
        claims=(
            Claim.of_ratio("a get with a bridge, in gets without", Sense.AT_MOST, 1.1, _ratio(gets)),
            Claim.of_ratio("a release with a bridge, in releases without", Sense.AT_MOST, 1.1, _ratio(releases)),
        ),
        figures=tuple(
            Figure.of_seconds(f"{what}, network {network}", series[network])
            for what, series in (("get and confirm", gets), ("release", releases), ("release to gone", removals))
            for network in _PROFILES
        ),
    )


def _ratio(seconds: dict[str, list[float]]) -> Ratio:
    return ratio_of_medians(seconds["bridge"], seconds["empty"])


def _turn(service: Service, profile: str) -> Turn:
    service.rest()
    begin = time.perf_counter()
    container = service.pool.get(ContainerId.create("network"), 30, profile=profile)
    got = time.perf_counter()
    if container is None:
        raise LabError(f"no container came free in 30 s: {service.pool.status()}")
    service.rest(leased=1)  # its successor is there: the lanes have nothing else to do
    release = time.perf_counter()
    container.release()
    released = time.perf_counter()
    while container.name in {info.name for info in service.pool.containers()}:
        time.sleep(0.0005)  # there is no event; 0.5 ms are little beside what is measured
    return Turn(got - begin, released - release, time.perf_counter() - release)
