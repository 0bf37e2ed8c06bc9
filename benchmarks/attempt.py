"""One run of a benchmark program: what is said when it fails or is interrupted, and what it exits with."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.interrupts import Interrupted, Interrupts
from benchmarks.lab import LabError
from benchmarks.programs import ProgramFailed
from benchmarks.report import Report
from lxc_pool import LxcPoolError


def attempt(measure: Callable[[Interrupts], Report]) -> Report | int:
    """Measure; return the report, or the exit status once it has been said what happened."""
    interrupts = Interrupts()
    interrupts.install()
    try:
        return measure(interrupts)
    except Interrupted as interrupt:
        say("ended by a signal; everything has been cleaned up", *_notes(interrupt))
        return 128 + interrupt.signum
    except (LabError, ProgramFailed, LxcPoolError, OSError) as error:
        say(f"failed: {error}", *_notes(error))
        return 5


def say(*lines: str) -> None:
    """Tell whoever waits."""
    for line in lines:
        print(f"benchmarks: {line}", file=sys.stderr, flush=True)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
