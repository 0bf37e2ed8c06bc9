"""`python -m benchmarks`: measure, print a table, keep it as JSON or in the documentation."""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.attempt import attempt, say
from benchmarks.interrupts import Interrupts
from benchmarks.lab import ROOT, Lab
from benchmarks.machine import describe
from benchmarks.measures import MEASURES
from benchmarks.plan import FULL, QUICK, Plan

DOCS = ROOT / "docs" / "performance.md"


def main() -> int:
    """Run the program; return its exit status."""
    parser = _parser()
    options = parser.parse_args()
    if options.write_docs and (options.quick or options.only):
        parser.error("--write-docs is for a full run of everything: not with --quick or --only")
    if os.geteuid() != 0:
        parser.error("containers are made by root: run it as root")
    result = attempt(lambda interrupts: _measure(options, interrupts))
    if isinstance(result, int):
        return result
    print(result.text())
    if options.json:
        options.json.write_text(json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.write_docs:
        report.write_docs(DOCS, result.markdown())
    return 1 if options.check and not result.met else 0


def _measure(options: argparse.Namespace, interrupts: Interrupts) -> report.Report:
    plan = _plan(options)
    began, begin = dt.datetime.now(dt.UTC), time.monotonic()
    machine = describe(options.directory)
    outcomes = {}
    with Lab(options.directory, interrupts) as lab:
        for name in options.only or MEASURES:
            say(f"{name} …")
            outcomes[name] = MEASURES[name](lab, plan)
    return report.Report(
        began=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - begin,
        machine=machine,
        plan=dataclasses.asdict(plan),
        outcomes=outcomes,
    )


def _plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else FULL
    if options.rounds is not None:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    if options.seconds is not None:
        plan = dataclasses.replace(plan, block_seconds=options.seconds)
    if options.idle_seconds is not None:
        plan = dataclasses.replace(plan, idle_seconds=options.idle_seconds)
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure lxc_pool on this machine, with services of the benchmarks' own. Needs root, and quiet.",
        epilog="Exit status: 0 measured; 1 with --check: a target is missed; 2 wrong use; 5 failed; 130 interrupted.",
    )
    parser.add_argument("--quick", action="store_true", help="only see that it works: the numbers mean nothing")
    parser.add_argument(
        "--only", action="append", choices=list(MEASURES), metavar="NAME", help=f"one of {', '.join(MEASURES)}; again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--write-docs", action="store_true", help="renew the tables in docs/performance.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--rounds", type=_positive_count, metavar="N", help="rounds of single calls")
    parser.add_argument("--seconds", type=_positive_seconds, metavar="S", help="length of a block of sustained work")
    parser.add_argument("--idle-seconds", type=_positive_seconds, metavar="S", help="how long to watch an idle service")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where to be while it lasts, on the file system to be measured (default: %(default)s)",
    )
    return parser


def _positive_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _positive_seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
