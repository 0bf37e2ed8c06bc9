"""How long a command in a container takes, beside `lxc-attach`.

Timed, in turns and in reversed order every other time, on one leased container that has run a command before:

- run: `container.run(["true"])`.
- lxc-attach: `lxc-attach -P … -n … --clear-env -- true` on the same container, spawned by vfork and waited for: what a
  shell does once it has read the line, only cheaper.
- from a shell: `sh -c "lxc-attach …"`, spawned in the same way.

All inherit the same streams, which are /dev/null here: what either side makes of a terminal or a file is not timed.
Beside these, without a target: both with their output captured (`capture_output=True`; for lxc-attach by
`subprocess.run`), both with their output going to a file, as under pytest, and the first command in a container.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import programs
from benchmarks.lab import Lab, Service
from benchmarks.plan import Plan
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import ratio_of_medians
from lxc_pool import Container

_SIZE = 2
_LIMIT = 1.3
_FIRST_SHARE = 5
"""One first command for so many rounds: each takes a container."""


def measure(lab: Lab, plan: Plan) -> Outcome:
    """Measure it; see the module."""
    with lab.service(_SIZE) as service:
        with service.pool.lease("run", 30) as container:
            service.pool.wait_ready()
            attach = _attach(service, container)
            with _streams_to(Path(os.devnull)):
                plain = _in_turns(
                    {
                        "run": lambda: _timed(lambda: container.run(["true"], check=True)),
                        "attach": lambda: programs.run_inheriting(*attach),
                        "shell": lambda: programs.run_inheriting("sh", "-c", " ".join(attach)),
                    },
                    plan,
                )
            captured = _in_turns(
                {
                    "run": lambda: _timed(lambda: container.run(["true"], check=True, capture_output=True)),
                    "attach": lambda: _timed(
                        lambda: subprocess.run(attach, check=True, capture_output=True, env=programs.ENVIRONMENT)
                    ),
                },
                plan,
            )
            with _streams_to(lab.directory / "output"):
                filed = _in_turns(
                    {
                        "run": lambda: _timed(lambda: container.run(["true"], check=True)),
                        "attach": lambda: programs.run_inheriting(*attach),
                    },
                    plan,
                )
        first, first_attach = _first(service, max(1, plan.rounds // _FIRST_SHARE))
    return Outcome(
        claims=(
            Claim.of_ratio(
                'run(["true"]), in lxc-attaches', Sense.AT_MOST, _LIMIT, ratio_of_medians(plain["run"], plain["attach"])
            ),
            Claim.of_ratio(
                'run(["true"]), in lxc-attaches from sh -c',
                Sense.AT_MOST,
                _LIMIT,
                ratio_of_medians(plain["run"], plain["shell"]),
            ),
        ),
        figures=(
            Figure.of_seconds('run(["true"])', plain["run"]),
            Figure.of_seconds("lxc-attach, spawned by vfork", plain["attach"]),
            Figure.of_seconds("lxc-attach, from sh -c", plain["shell"]),
            Figure.of_seconds("run, output captured", captured["run"]),
            Figure.of_seconds("lxc-attach by subprocess.run, output captured", captured["attach"]),
            Figure.of_seconds("run, output to a file", filed["run"]),
            Figure.of_seconds("lxc-attach, output to a file", filed["attach"]),
            Figure.of_seconds("run, the first in its container", first),
            Figure.of_seconds("lxc-attach, the first in its container", first_attach),
        ),
    )


def _first(service: Service, rounds: int) -> tuple[list[float], list[float]]:
    """Return the durations of a container's first command, with run and with lxc-attach, in a new one each time."""
    ours, theirs = [], []
    with _streams_to(Path(os.devnull)):
        for _ in range(rounds):
            service.rest()
            with service.pool.lease("first", 30) as container:
                service.pool.wait_ready()
                ours.append(_timed(lambda: container.run(["true"], check=True)))
            service.rest()
            with service.pool.lease("first", 30) as container:
                service.pool.wait_ready()
                theirs.append(programs.run_inheriting(*_attach(service, container)))
    return ours, theirs


def _attach(service: Service, container: Container) -> list[str]:
    lxcpath = service.state_dir / "containers"
    return ["lxc-attach", "-P", str(lxcpath), "-n", container.name, "--clear-env", "--", "true"]


def _in_turns(calls: dict[str, Callable[[], float]], plan: Plan) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {name: [] for name in calls}
    orders = itertools.cycle((list(calls), list(reversed(calls))))
    for number in range(-plan.warmup, plan.rounds):
        for name in next(orders):
            seconds = calls[name]()
            if number >= 0:
                series[name].append(seconds)
    return series


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _streams_to(path: Path) -> Iterator[None]:
    """Let this process's stdin be /dev/null, its stdout and stderr *path*, for a while."""
    saved = [os.dup(fd) for fd in (0, 1, 2)]
    null = os.open(os.devnull, os.O_RDWR)
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for fd, target in zip((0, 1, 2), (null, output, output), strict=True):
            os.dup2(target, fd)
        yield
    finally:
        for fd, before in zip((0, 1, 2), saved, strict=True):
            os.dup2(before, fd)
        for fd in (*saved, null, output):
            os.close(fd)
