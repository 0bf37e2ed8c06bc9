"""What isolation costs: this tree beside an older one, in turns: `python -m benchmarks.before`, as root.

```
 before ─┬─ before_worker ── service, containers      of `git archive REVISION`: by default the last one whose
         │                                            containers ran as the host's root
         └─ before_worker ── service, containers      of this tree
```

A round asks each for one start of a container (made, started and probed by the functions that the lanes call) and for
one warm `get` after a rest, as `measures.handout` has it; every other round goes in reverse order.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.attempt import attempt
from benchmarks.interrupts import Interrupts
from benchmarks.lab import ROOT, Lab, LabError
from benchmarks.machine import describe
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import ratio_of_medians

DOCS = ROOT / "docs" / "performance.md"

REVISION = "3d08b8d"
"""The last one whose containers were all privileged, without seccomp, quotas and an audit trail."""

_SIZE = 5
_WARMUP = 10


@dataclasses.dataclass
class Side:
    """One tree's worker, and what it measured, in seconds."""

    process: subprocess.Popen[str]
    starts: list[float] = dataclasses.field(default_factory=list)
    removals: list[float] = dataclasses.field(default_factory=list)
    gets: list[float] = dataclasses.field(default_factory=list)

    def ask(self, *words: str) -> list[float]:
        """Let it do something; return the numbers that it answers.

        Raises:
            LabError: It has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if words:
            print(*words, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise LabError(f"a worker ended with {self.process.wait()}")
        return [] if line == "ready\n" else [float(word) for word in line.split()]

    def measure(self, number: int) -> None:
        """Take part in a round; the first ones do not count."""
        up, gone = self.ask("start", f"before-{number + _WARMUP}")
        (get,) = self.ask("get", f"before-{number + _WARMUP}")
        if number >= 0:
            self.starts.append(up)
            self.removals.append(gone)
            self.gets.append(get)


def measure(lab: Lab, revision: str, rounds: int) -> Outcome:
    """Measure it; see the module."""
    older = lab.directory / "tree"
    older.mkdir()
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise LabError(f"there is no revision {revision}: {archive.stderr.decode(errors='replace').strip()}")
    subprocess.run(["tar", "-x", "-C", str(older)], input=archive.stdout, check=True)
    with _side(lab, "before", older) as before, _side(lab, "now", ROOT) as now:
        for number in range(-_WARMUP, rounds):
            for side in (before, now) if number % 2 else (now, before):
                # Both are at rest: one that refills later than the other would have it measured with its work.
                before.ask("rest")
                now.ask("rest")
                side.measure(number)
    starts, gets = ratio_of_medians(now.starts, before.starts), ratio_of_medians(now.gets, before.gets)
    return Outcome(
        claims=(
            Claim.of_ratio("a warm get, in those of before", Sense.AT_MOST, 1.25, gets),
            Claim.of_ratio("start of a container, in those of before", Sense.AT_MOST, 1.2, starts),
        ),
        figures=tuple(
            Figure.of_seconds(f"{what}, {when}", seconds)
            for what, when, seconds in (
                ("get and confirm", "before", before.gets),
                ("get and confirm", "now", now.gets),
                ("make, start, probe", "before", before.starts),
                ("make, start, probe", "now", now.starts),
                ("stop, remove", "before", before.removals),
                ("stop, remove", "now", now.removals),
            )
        ),
    )


@contextlib.contextmanager
def _side(lab: Lab, name: str, tree: Path) -> Iterator[Side]:
    lab.lxcpath(f"{name}/state/containers")
    place = lab.directory / name
    config = place / "lxc-pool.toml"
    config.touch()
    worker = Path(__file__).with_name("before_worker.py")
    argv = [sys.executable, worker, tree, place / "host", place / "state", config, _SIZE]
    with (
        (place / "log").open("wb") as log,
        subprocess.Popen(
            list(map(str, argv)),
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process alone
        ) as process,
    ):
        side = Side(process)
        try:
            side.ask()
            yield side
        except LabError as error:
            raise LabError(f"{error}; {name}: {(place / 'log').read_text(errors='replace')[-1000:]}") from error
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]  # a pipe was asked for
            process.wait()


def main() -> int:
    """Run the program; return its exit status."""
    parser = _parser()
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("containers are made by root: run it as root")
    if options.write_docs and (options.rounds < 100 or options.revision != REVISION):
        parser.error("--write-docs is for 100 rounds at least, and the default revision")
    result = attempt(lambda interrupts: _measure(options, interrupts))
    if isinstance(result, int):
        return result
    print(result.text())
    if options.json:
        options.json.write_text(json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.write_docs:
        report.write_docs(DOCS, result.markdown(), "benchmarks.before")
    return 1 if options.check and not result.met else 0


def _measure(options: argparse.Namespace, interrupts: Interrupts) -> report.Report:
    began, begin = dt.datetime.now(dt.UTC), time.monotonic()
    machine = describe(options.directory) | {"before": options.revision}
    with Lab(options.directory, interrupts) as lab:
        outcome = measure(lab, options.revision, options.rounds)
    return report.Report(
        began=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - begin,
        machine=machine,
        plan={"quick": options.rounds < 100, "rounds": options.rounds},
        outcomes={"before": outcome},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before", description=__doc__.splitlines()[0])
    parser.add_argument("--revision", default=REVISION, metavar="REV", help="to compare with (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--write-docs", action="store_true", help="renew the table in docs/performance.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
