"""The benchmarks: each module has a `measure`, and says in its docstring what exactly is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from benchmarks.lab import Lab
from benchmarks.measures import handout, idle, memory, network, reap, refill, run
from benchmarks.plan import Plan
from benchmarks.report import Outcome

MEASURES: Mapping[str, Callable[[Lab, Plan], Outcome]] = MappingProxyType(
    {
        "handout": handout.measure,
        "refill": refill.measure,
        "run": run.measure,
        "network": network.measure,
        "reap": reap.measure,
        "idle": idle.measure,
        "memory": memory.measure,
    }
)
"""By name, in the order in which they run."""
