"""Thousands of lease cycles, and nothing grows: `python -m benchmarks.soak`, from the project's root, as root.

```
 soak ── 8 × soak_client: get, use, release at random times; 1 % of the cycles end in SIGKILL, another client goes on
   ├──── a thread for each client reads what it says
   └──── once a second: descriptors, threads and memory of the service and its helpers, mounts, cgroups
```

Clients arrive as a Poisson process, at a rate that the pool keeps up with. After a warm-up that does not count, what
was sampled in the first tenth of the cycles is compared with the last tenth, and so is the 99th percentile of the
time that `get` took. What follows the containers that there are just now (mounts, cgroups) is compared when all
clients have ended and the pool is at rest, with what it was before the first. liblxc's objects live in the lanes'
workers: one that is not freed holds a descriptor of its log file, and memory, so those of the workers are counted. A
worker also holds one descriptor for each range of ids that it has ever used, as many as there were containers at
once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from benchmarks import report
from benchmarks.interrupts import Interrupted, Interrupts
from benchmarks.lab import ROOT, Lab, LabError, Service
from benchmarks.machine import describe
from benchmarks.report import Claim, Figure, Outcome, Sense
from benchmarks.stats import percentile
from lxc_pool import LxcPoolError
from lxc_pool.host import cgroups
from lxc_pool.service import audit
from lxc_pool.service.directories import name_prefix

DOCS = ROOT / "docs" / "reliability.md"

_SIZE = 10
_PERIOD = 1.0
"""Seconds from one sample to the next."""

_GROWTH = 1.1
_SLOWER = 1.5
"""Most that the last tenth's median memory, and the 99th percentile of `get`, may be of the first's. Guesses at what
noise alone makes of something flat."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be done.

    Attributes:
        cycles: Leases that are to be had, of all clients together, beside the warm-up's.
        warmup: Leases before those.
        rate: Arrivals a second, of all clients together.
        killed: The share of cycles in which the client is killed.
    """

    cycles: int
    warmup: int
    clients: int
    rate: float
    killed: float
    seed: int
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is in use at one time: numbers, and bytes."""

    descriptors: int
    threads: int
    helpers_descriptors: int
    memory: int
    helpers_memory: int


@dataclasses.dataclass(frozen=True)
class Traces:
    """What is on the host, when the pool is at rest."""

    mounts: int
    cgroups: int
    descriptors: int
    threads: int
    helpers: int

    @classmethod
    def of(cls, service: Service) -> Traces:
        """Count them."""
        main = psutil.Process(service.process.pid)
        helpers = main.children(recursive=True)
        instance = (service.state_dir / "instance").read_text(encoding="ascii").strip()
        return cls(
            mounts=sum(_mounts(process.pid) for process in (main, *helpers)),
            cgroups=len(cgroups.cgroups_by_container(name_prefix(instance))),
            descriptors=main.num_fds(),
            threads=main.num_threads(),
            helpers=len(helpers),
        )


class Soak:
    """One run. The clients' threads share `_latencies` and `_left`, which `_lock` guards."""

    def __init__(self, lab: Lab, service: Service, order: Order) -> None:
        self._lab = lab
        self._service = service
        self._order = order
        self._lock = threading.Lock()
        self._left = order.cycles + order.warmup
        self._latencies: list[float] = []
        self._samples: list[tuple[int, Sample]] = []
        self._processes: set[subprocess.Popen[str]] = set()
        self._failed: list[str] = []
        self._stopping = False
        self.kills = 0

    def run(self) -> None:
        """Let all clients do their part, and watch."""
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(self._order.clients)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(_PERIOD)  # the sampling period
                sample = _sample(self._service)
                with self._lock:
                    if len(self._latencies) > self._order.warmup:
                        self._samples.append((len(self._latencies) - self._order.warmup, sample))
        finally:
            self._stopping = True
            for process in list(self._processes):
                process.kill()
            for thread in threads:
                thread.join()
        if self._failed:
            raise LabError(self._failed[0])

    def tenth(self, last: bool) -> tuple[list[Sample], list[float]]:
        """Return the samples and the latencies of the first or the last tenth of the cycles."""
        counted = self._latencies[self._order.warmup :]
        size = max(1, len(counted) // 10)
        samples = [
            sample for cycle, sample in self._samples if (cycle > len(counted) - size if last else cycle <= size)
        ]
        if not samples:
            samples = [self._samples[-1 if last else 0][1]]
        return samples, counted[-size:] if last else counted[:size]

    def _client(self, number: int) -> None:
        """Have clients of one number, one after the other, until all cycles are done."""
        generation = 0
        while not self._stopping:
            with self._lock:
                left = self._left
            if left <= 0:
                return
            generation += 1
            status = self._one_client(number + self._order.clients * generation, left)
            if status not in (0, -9):
                self._failed.append(f"a client ended with {status}: its error is above")
                return

    def _one_client(self, number: int, cycles: int) -> int:
        order = self._order
        argv = [
            self._service.state_dir.parent / "host",
            order.seed + number,
            cycles,
            order.rate / order.clients,
            order.killed,
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak_client", *map(str, argv)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._processes.add(process)
        done = False
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                with self._lock:
                    self._latencies.append(float(line.split()[1]))
                    self._left -= 1
                    done = self._left <= 0
                if done or self._stopping:
                    process.kill()
                    break
        self._processes.discard(process)
        if process.returncode == -9 and not done and not self._stopping:
            with self._lock:
                self.kills += 1
        return process.returncode


def measure(lab: Lab, order: Order) -> Outcome:
    """Measure it; see the module."""
    with lab.service(_SIZE) as service:
        with service.pool.lease("first", 30) as container:
            container.run(["true"], check=True)
        service.rest()
        soak = Soak(lab, service, dataclasses.replace(order, cycles=0))
        soak.run()
        service.rest()
        before = Traces.of(service)
        soak = Soak(lab, service, dataclasses.replace(order, warmup=0))
        began = time.monotonic()
        soak.run()
        seconds = time.monotonic() - began
        service.rest()
        after = _settled(service, before)
        findings = audit.audit(service.state_dir, service.state_dir.parent / "host").findings
        status = service.pool.status()
    return Outcome(
        claims=(*_claims(soak), *_growth(before, after), _none("findings of an audit", len(findings))),
        figures=(
            Figure("lease cycles", "cycles", order.cycles),
            Figure("arrivals", "cycles a second", order.cycles / seconds),
            Figure("clients killed", "clients", soak.kills),
            Figure("failed creations and removals", "errors", status.error_count),
            *(Figure.of_seconds(f"get, {name} tenth", soak.tenth(last)[1]) for name, last in _TENTHS),
        ),
    )


_TENTHS = (("first", False), ("last", True))


def _claims(soak: Soak) -> Iterator[Claim]:
    (first, early), (last, late) = soak.tenth(False), soak.tenth(True)
    for what, field, limit in (
        ("memory (RSS) of the service", "memory", _GROWTH),
        ("memory (RSS) of its helpers", "helpers_memory", _GROWTH),
        ("descriptors of the service", "descriptors", _GROWTH),
        ("threads of the service", "threads", _GROWTH),
        ("descriptors of its helpers", "helpers_descriptors", _GROWTH),
    ):
        value = _ratio([getattr(sample, field) for sample in last], [getattr(sample, field) for sample in first])
        yield Claim(f"{what}, last tenth to first", Sense.AT_MOST, limit, "×", value)
    slower = percentile(late, 99) / percentile(early, 99)
    yield Claim("99th percentile of get, last tenth to first", Sense.AT_MOST, _SLOWER, "×", slower)


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(above) / statistics.median(below)


def _growth(before: Traces, after: Traces) -> Iterator[Claim]:
    for field in dataclasses.fields(Traces):
        what = f"{field.name.replace('_', ' ')} more than before, at rest"
        yield _none(what, max(0, getattr(after, field.name) - getattr(before, field.name)))


def _none(what: str, value: float) -> Claim:
    return Claim(what, Sense.AT_MOST, 0, "", value)


def _settled(service: Service, before: Traces) -> Traces:
    """Return what is there once it is no more than *before*, or when there has been time enough for that."""
    deadline = time.monotonic() + 10.0
    while True:
        traces = Traces.of(service)
        grown = [claim for claim in _growth(before, traces) if not claim.met]
        if not grown or time.monotonic() > deadline:
            return traces
        time.sleep(0.2)  # what ends late says nothing


def _sample(service: Service) -> Sample:
    main = psutil.Process(service.process.pid)
    helpers = _living(main)
    return Sample(
        descriptors=main.num_fds(),
        threads=main.num_threads(),
        memory=main.memory_info().rss,
        helpers_descriptors=sum(_asked(helpers, lambda process: process.num_fds())),
        helpers_memory=sum(_asked(helpers, lambda process: process.memory_info().rss)),
    )


def _living(main: psutil.Process) -> list[psutil.Process]:
    """Return the helpers that stay: not the `lxc-start` of a moment."""
    agents = main.children()
    workers = [worker for agent in agents for worker in agent.children() if _stays(worker)]
    return [*agents, *workers]


def _stays(worker: psutil.Process) -> bool:
    try:
        return "python" in worker.name()
    except psutil.NoSuchProcess:  # it has not
        return False


def _asked(processes: Sequence[psutil.Process], question: Callable[[psutil.Process], int]) -> Iterator[int]:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            yield question(process)


def _mounts(pid: int) -> int:
    try:
        return len(Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return 0


def main() -> int:
    """Run the program; return its exit status."""
    parser = _parser()
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("containers are made by root: run it as root")
    if options.write_docs and options.cycles < 10_000:
        parser.error("--write-docs is for a run of 10000 cycles at least")
    order = Order(
        options.cycles,
        max(20, options.cycles // 20),
        options.clients,
        options.rate,
        options.killed,
        options.seed,
        quick=options.cycles < 5000,
    )
    interrupts = Interrupts()
    interrupts.install()
    began, begin = dt.datetime.now(dt.UTC), time.monotonic()
    machine = describe(options.directory)
    try:
        with Lab(options.directory, interrupts) as lab:
            outcome = measure(lab, order)
    except Interrupted as interrupt:
        print("soak: ended by a signal; everything has been cleaned up", file=sys.stderr)
        return 128 + interrupt.signum
    except (LabError, LxcPoolError, OSError) as error:
        print(f"soak: failed: {error}", *getattr(error, "__notes__", ()), file=sys.stderr)
        return 5
    result = report.Report(
        began.isoformat(timespec="seconds"),
        time.monotonic() - begin,
        machine | {"load_1min_after": round(os.getloadavg()[0], 2)},
        dataclasses.asdict(order),
        {"soak": outcome},
    )
    print(result.text())
    if options.json:
        options.json.write_text(json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.write_docs:
        report.write_docs(DOCS, result.markdown())
    return 1 if options.check and not result.met else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Lease and release for a long time, and see that nothing grows. Needs root.",
        epilog="Exit status: 0 measured; 1 with --check: something grew; 2 wrong use; 5 failed; 130 interrupted.",
    )
    parser.add_argument("--cycles", type=int, default=10_000, metavar="N", help="leases in all (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="clients at once (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=20.0, metavar="R", help="arrivals a second (default: %(default)s)"
    )
    parser.add_argument(
        "--killed", type=float, default=0.01, metavar="P", help="share of cycles that end in SIGKILL (default: 0.01)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the arrivals and deaths (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--write-docs", action="store_true", help="renew the tables in docs/reliability.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if something grew")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where to be while it lasts (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
