"""`python -m benchmarks.compare`: lxc_pool beside its peers, in tables, as JSON, as a picture."""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.attempt import attempt, say
from benchmarks.compare.measure import FULL, QUICK, measure, versions
from benchmarks.compare.peers import PEERS
from benchmarks.interrupts import Interrupts
from benchmarks.lab import ROOT, Lab
from benchmarks.machine import describe

DOCS = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "comparison.png"

NAME = "benchmarks.compare"
"""Between whose marks in the documentation the tables are."""


def main() -> int:
    """Run the program; return its exit status."""
    parser = _parser()
    options = parser.parse_args()
    if options.write_docs and (options.quick or set(options.peers) != set(PEERS)):
        parser.error("--write-docs is for a full run beside every peer: not with --quick or --peers")
    if options.write_docs:
        options.plot = options.plot or PICTURE
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("a picture is drawn by matplotlib, which is not there: pip install --group plot")
    if os.geteuid() != 0:
        parser.error("containers are made by root: run it as root")
    result = attempt(lambda interrupts: _measure(options, interrupts))
    if isinstance(result, int):
        return result
    print(result.text())
    if options.json:
        options.json.write_text(json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.plot:
        from benchmarks.compare import plot  # noqa: PLC0415  # matplotlib is for those who want the picture

        plot.draw(result, options.plot)
    if options.write_docs:
        text = f"{result.markdown()}\n\n![What a test takes, and how many are done in a second]({PICTURE.name})"
        report.write_docs(DOCS, text, NAME)
    return 1 if options.check and not result.met else 0


def _measure(options: argparse.Namespace, interrupts: Interrupts) -> report.Report:
    plan = QUICK if options.quick else FULL
    began, begin = dt.datetime.now(dt.UTC), time.monotonic()
    machine = {**describe(options.directory), **versions(options.peers)}
    with Lab(options.directory, interrupts) as lab:
        outcomes = measure(lab, plan, options.peers, say)
    return report.Report(
        began=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - begin,
        machine=machine,
        plan=dataclasses.asdict(plan),
        outcomes=outcomes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}",
        description="Run a pytest suite with lxc_pool and with its installed peers. Needs root, and quiet.",
        epilog="Exit status: 0 measured; 1 with --check: a target is missed; 2 wrong use; 5 failed; 130 interrupted.",
    )
    parser.add_argument("--quick", action="store_true", help="only see that it works: the numbers mean nothing")
    parser.add_argument(
        "--peers",
        type=_names,
        default=list(PEERS),
        metavar="NAME,NAME…",
        help=f"some of {', '.join(PEERS)}; each of them without",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as a picture, a PNG")
    parser.add_argument(
        "--write-docs", action="store_true", help=f"renew the tables in docs/{DOCS.name}, and docs/{PICTURE.name}"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where to be while it lasts, on the file system to be measured (default: %(default)s)",
    )
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return [name for name in PEERS if name in names]


if __name__ == "__main__":
    sys.exit(main())
