"""One pytest session of the suite against one peer, in a process of its own, and what pytest measured in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import programs
from benchmarks.lab import ROOT, Lab, LabError
from benchmarks.programs import ProgramFailed

_SUITE = Path(__file__).with_name("suite")

_PASSED_ON = ("PYTHONDONTWRITEBYTECODE",)
"""Variables that a session has from this process: root leaves no bytecode in a tree where it was told so."""

_TIMEOUT = 900.0
"""Seconds for one session. A guess: thirty times what the slowest peer needs for 25 tests."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """One test, by pytest's own clock.

    Attributes:
        worker: The pytest-xdist worker that ran it.
        start, stop: When its setup began and its teardown had ended, in seconds since 1970.
        setup, call, teardown: Their durations, in seconds.
    """

    worker: str
    start: float
    stop: float
    setup: float
    call: float
    teardown: float

    @property
    def seconds(self) -> float:
        """How long it took, without what pytest does between the phases."""
        return self.setup + self.call + self.teardown


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """The tests that count, and how many of them were done in a second."""

    tests: tuple[Timing, ...]
    rate: float


def run(lab: Lab, arguments: Sequence[str], *, workers: int, tests: int) -> Session:
    """Run a session in which *tests* tests count.

    Args:
        lab: For a directory, and for Ctrl-C.
        arguments: What the suite has to know of the peer.
        workers: Of pytest-xdist.
        tests: How many tests there are, without the first of each worker.

    Raises:
        ProgramFailed: A test failed, or pytest did; the message has the end of its output.
        LabError: Too little was measured.
    """
    record, output = lab.directory / "record.json", lab.directory / "session.log"
    record.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "pytest", "-c", str(_SUITE / "pytest.ini"), "--rootdir", str(_SUITE)]
    argv += ["-p", "xdist", "-p", "lxc_pool.pytest_plugin"]
    argv += ["-n", str(workers), "--basetemp", str(lab.directory / "pytest"), "--record", str(record)]
    argv += ["--fresh", str(tests + workers), *arguments, str(_SUITE)]
    # No variables and no plugins that would change pytest's ways on this machine.
    environment = {**programs.ENVIRONMENT, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    with output.open("wb") as stream:
        with lab.interrupts.shield():
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            status = process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ProgramFailed(f"the session took more than {_TIMEOUT:.0f} s: {_tail(output)}") from None
        finally:
            _kill(process)
    if status != 0:
        raise ProgramFailed(f"the session ended with {status}: {_tail(output)}")
    return judged(json.loads(record.read_text(encoding="utf-8")), workers=workers)


def judged(phases: Sequence[Mapping[str, Any]], *, workers: int) -> Session:
    """Put the phases of tests together, and leave out the first test of each worker.

    The rate counts from when every worker has done its first test until the last test has ended, and those tests that
    began in between.

    Raises:
        LabError: Something is missing.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for phase in phases:
        found.setdefault(phase["test"], {})[phase["phase"]] = phase
    tests = sorted((_test(by_phase) for by_phase in found.values()), key=lambda test: test.start)
    first: dict[str, Timing] = {}
    for test in tests:
        first.setdefault(test.worker, test)
    counted = [test for test in tests if test is not first[test.worker]]
    if len(first) != workers or not counted:
        raise LabError(f"{len(first)} of {workers} workers ran {len(tests)} tests: too few")
    begin = max(test.stop for test in first.values())
    timed = [test for test in counted if test.start >= begin]
    if not timed:
        raise LabError(f"no test began after each of {workers} workers had done one: there are too few")
    return Session(tuple(counted), len(timed) / (max(test.stop for test in timed) - begin))


def _test(phases: Mapping[str, Mapping[str, Any]]) -> Timing:
    if phases.keys() != {"setup", "call", "teardown"}:
        raise LabError(f"a test has no more than {', '.join(phases)}")
    return Timing(
        worker=phases["setup"]["worker"],
        start=phases["setup"]["start"],
        stop=phases["teardown"]["stop"],
        setup=phases["setup"]["duration"],
        call=phases["call"]["duration"],
        teardown=phases["teardown"]["duration"],
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a session that was cut short, its workers and their commands at once: the peers clean up after them."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(output: Path) -> str:
    return output.read_text(encoding="utf-8", errors="replace")[-2000:].strip() or "(empty)"
