"""Commands that find and remove what nothing owns: audit, cleanup.

What needs the `server` extra is imported where it is used: the program is the clients' too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lxc_pool.cli.options import add_state_dir
from lxc_pool.cli.output import print_json
from lxc_pool.config import DEFAULT_HOST_DIR, DEFAULT_STATE_DIR
from lxc_pool.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from lxc_pool.host.residue import Trace
    from lxc_pool.host.setup import Step
    from lxc_pool.service.audit import Report


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    audit = commands.add_parser("audit", parents=[common], help="list every trace of the service that nothing owns")
    audit.set_defaults(function=_audit)
    cleanup = commands.add_parser("cleanup", parents=[common], help="remove what `audit` lists")
    cleanup.add_argument("--execute", action="store_true", help="do it; without this, only say what would be removed")
    cleanup.add_argument(
        "--all", action="store_true", help="uninstall: live leases, images, the state dir and the host dir too"
    )
    cleanup.add_argument(
        "--older-than", type=_seconds, metavar="S", help="only what has been there for so many seconds; not with --all"
    )
    cleanup.set_defaults(function=_cleanup)
    for parser in (audit, cleanup):
        add_state_dir(parser)


def _audit(arguments: argparse.Namespace) -> int:
    from lxc_pool.service import audit

    try:
        report = audit.audit(arguments.state_dir.absolute(), arguments.host_dir.absolute())
    except BackendError as error:
        print(f"lxc-pool: {error}; nothing can be said of what is owned", file=sys.stderr)
        return 2
    if arguments.json:
        print_json({"clean": not report.findings, "findings": [_as_dict(trace) for trace in report.findings]})
    else:
        for trace in report.findings:
            print(f"{trace.kind} {trace.name}: {trace.detail}")
        if not report.findings:
            print("clean")
    return 1 if report.findings else 0


def _cleanup(arguments: argparse.Namespace) -> int:
    from lxc_pool.service import audit

    state_dir, host_dir = arguments.state_dir.absolute(), arguments.host_dir.absolute()
    if arguments.all and arguments.older_than is not None:
        raise ConfigError("--all removes everything, however young: leave --older-than out")
    try:
        report = audit.audit(state_dir, host_dir, everything=arguments.all)
    except BackendError as error:
        print(f"lxc-pool: {error}; nothing was removed", file=sys.stderr)
        return 2
    if arguments.all:
        audit.refuse_if_running(state_dir, host_dir)
    if arguments.older_than is not None:
        report = audit.only_older(report, arguments.older_than)
    if not arguments.execute:
        return _say_what_would_go(arguments, report)
    removals = audit.clean(report, state_dir)
    problems = [f"{removal.finding.detail}: {removal.problem}" for removal in removals if removal.problem]
    gone = len(removals) - len(problems)
    steps: list[Step] = []
    if arguments.all and not problems:
        problems += audit.uninstall(state_dir, host_dir)
        steps += _setup_of(state_dir, host_dir, execute=True)
    if arguments.json:
        findings = [{**_as_dict(removal.finding), "problem": removal.problem} for removal in removals]
        changed = [dataclasses.asdict(step) for step in steps]
        print_json({"clean": not problems, "findings": findings, "problems": problems, "setup": changed})
    else:
        for removal in removals:
            outcome = f"NOT removed: {removal.problem}" if removal.problem else "removed"
            print(f"{removal.finding.kind} {removal.finding.name}: {removal.finding.detail}: {outcome}")
        for step in steps:
            print(f"{step.name} {step.target}: {step.detail}")
        for problem in problems:
            print(f"lxc-pool: {problem}", file=sys.stderr)
        print(f"{gone} removed, {len(problems)} not" if removals or problems else "clean")
    return 5 if problems else 0


def _say_what_would_go(arguments: argparse.Namespace, report: Report) -> int:
    if arguments.json:
        print_json({"clean": not report.findings, "findings": [_as_dict(trace) for trace in report.findings]})
        return 1 if report.findings else 0
    for trace in report.findings:
        print(f"would remove {trace.kind} {trace.name}: {trace.detail}")
    if arguments.all:
        print(f"would remove {arguments.state_dir} and {arguments.host_dir}")
        for step in _setup_of(arguments.state_dir.absolute(), arguments.host_dir.absolute(), execute=False):
            print(f"{step.name} {step.target}: {step.detail}")
    print("clean" if not report.findings else "add --execute to do it")
    return 1 if report.findings else 0


def _setup_of(state_dir: Path, host_dir: Path, *, execute: bool) -> Iterator[Step]:
    """Remove what `setup` has made for the service of these directories, if that is the host's own one."""
    from lxc_pool.host import setup

    if (state_dir, host_dir) == (DEFAULT_STATE_DIR, DEFAULT_HOST_DIR):
        yield from setup.remove(setup.Site(execute=execute))


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"must be 0 or more seconds, not {text!r}")


def _as_dict(trace: Trace) -> dict[str, object]:
    return {"kind": trace.kind, "name": trace.name, "detail": trace.detail}
