"""Run the sessions, in turns, and tell what came of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.compare import session
from benchmarks.compare.peers import PEERS
from benchmarks.compare.peers.ready import Ready
from benchmarks.compare.session import Session, Timing
from benchmarks.lab import Lab, LabError, Service
from benchmarks.machine import output_of
from benchmarks.programs import ProgramFailed
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import Summary, ratio_of_medians
from lxc_pool import LxcPoolError

OURS = "lxc_pool"
OURS_SMALL = "lxc_pool, 5 warm"
"""The names of both pools: as large as a session, and of the default size."""

_SMALL = 5
_REASON_LENGTH = 200
_WORKERS = (1, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured; a full run has a hundred tests of each peer with each count of workers.

    Attributes:
        quick: Whether the numbers mean nothing but that everything works.
        tests: Tests that count in one session.
        rounds: Sessions of each peer with each count of workers.
    """

    quick: bool = False
    tests: int = 25
    rounds: int = 4


FULL = Plan()
QUICK = Plan(quick=True, tests=3, rounds=1)


def measure(lab: Lab, plan: Plan, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Outcome]:
    """Measure lxc_pool beside the peers *names*; return what came of each, also of one that can't be measured here."""
    reasons = {name: PEERS[name].missing for name in names}
    with contextlib.ExitStack() as stack:
        warm = stack.enter_context(lab.service(plan.tests + max(_WORKERS)))
        ready = {OURS: _pool(warm), OURS_SMALL: _pool(stack.enter_context(lab.service(_SMALL)))}
        for name in names:
            if not reasons[name]:
                say(f"starting {name} …")
                try:
                    ready[name] = stack.enter_context(PEERS[name].open(lab, warm.image))
                except (LabError, LxcPoolError, OSError) as error:
                    say(f"{name} is not measured: {'; '.join([str(error), *getattr(error, '__notes__', ())])}")
                    reasons[name] = f"it can't be made ready: {' '.join(str(error).split())[:_REASON_LENGTH]}"
        found = _in_turns(lab, plan, ready, say)
    ours = _seconds(found[OURS, 1])
    outcomes = {name: Outcome((), _figures(found, name)) for name in (OURS, OURS_SMALL)}
    for name in names:
        if reasons[name]:
            outcomes[name] = Outcome((), (), not_measured=reasons[name])
        else:
            ratio = ratio_of_medians(_seconds(found[name, 1]), ours)
            what = f"a test with {PEERS[name].title}, in tests with lxc_pool"
            claim = Claim.of_ratio(what, Sense.AT_LEAST, PEERS[name].target, ratio)
            outcomes[name] = Outcome((claim,), _figures(found, name))
    return outcomes


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return what those of the peers that are installed call themselves."""
    return {name: output_of(PEERS[name].version, "--version") for name in names if not PEERS[name].missing}


def _pool(service: Service) -> Ready:
    """Make lxc_pool ready: a service with warm containers, which is waited for until they are."""
    where = service.state_dir.with_name("host")
    return Ready(("--lxc-pool-host-dir", str(where), "--lxc-pool-require"), service.rest)


def _in_turns(
    lab: Lab, plan: Plan, ready: Mapping[str, Ready], say: Callable[[str], None]
) -> dict[tuple[str, int], list[Session]]:
    found: dict[tuple[str, int], list[Session]] = {(name, workers): [] for name in ready for workers in _WORKERS}
    orders = itertools.cycle((list(found), list(reversed(found))))
    for number in range(plan.rounds):
        say(f"round {number + 1} of {plan.rounds} …")
        for name, workers in next(orders):
            ready[name].rest()
            try:
                done = session.run(lab, ready[name].arguments, workers=workers, tests=plan.tests)
            except (LabError, ProgramFailed) as error:
                raise type(error)(f"{name}: {error}") from error
            found[name, workers].append(done)
            ready[name].rest()
    return found


def _figures(found: Mapping[tuple[str, int], Sequence[Session]], name: str) -> tuple[Figure, ...]:
    one, two = (found[name, workers] for workers in _WORKERS)
    tests = list(_tests(one))
    return (
        Figure.of_seconds("a test, -n 1", [test.seconds for test in tests]),
        Figure.of_seconds("its setup", [test.setup for test in tests]),
        Figure.of_seconds("its call", [test.call for test in tests]),
        Figure.of_seconds("its teardown", [test.teardown for test in tests]),
        Figure.of_seconds("a test, -n 2", _seconds(two)),
        Figure("tests a second, -n 1", "1/s", Summary.of([done.rate for done in one])),
        Figure("tests a second, -n 2", "1/s", Summary.of([done.rate for done in two])),
    )


def _seconds(sessions: Sequence[Session]) -> list[float]:
    return [test.seconds for test in _tests(sessions)]


def _tests(sessions: Sequence[Session]) -> Iterator[Timing]:
    return (test for done in sessions for test in done.tests)
