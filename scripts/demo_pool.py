"""Lease 20 warm containers in a row, do the same work cold beside it, and leave the host as it was.

```
 demo_pool ── lxc-pool serve ── its containers            host dir /run/lxc-pool-demo.ID
     └─────── lxc-copy, lxc-start, … ── cold containers   state dir /var/lib/lxc-pool-demo.ID
```

The children are in sessions of their own: Ctrl-C reaches this process alone, and it decides what ends in which order.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from lxc_pool import ContainerId, LxcPoolError, PoolManager, PoolServiceProxy
from scripts.demo_site import COLD_BASE, LXC_POOL, STEP_TIMEOUT, Failed, Site, lxc, say

COMMAND = ["sh", "-c", "hostname; id -u"]

START_TIMEOUT = 120.0
"""Seconds until the service must be ready, its image built. A guess: the image takes 0.35 s (measured)."""


class Interrupted(BaseException):
    """A signal asks this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`, but not within a shield; later ones are ignored."""

    def __init__(self) -> None:
        self._shields = 0
        self._pending: int | None = None
        self.armed = True

    def install(self) -> None:
        """Take over the signals, save those that the caller had ignored (nohup)."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._receive)

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Put a signal off until the block has ended, so that what it makes is known before anything is undone."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
            if not self._shields and self.armed and self._pending is not None:
                self.armed = False
                raise Interrupted(self._pending)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        if not self.armed:
            return
        if self._shields:
            self._pending = signum
            return
        self.armed = False
        raise Interrupted(signum)


@dataclasses.dataclass
class Row:
    """One line of the table; times in seconds."""

    name: str
    lease_id: str
    hostname: str
    get: float
    run: float
    cold_get: float = 0.0
    cold_run: float = 0.0


def main() -> int:
    """Run the demonstration; return its exit status."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Lease warm LXC containers, beside cold ones.")
    parser.add_argument("--count", type=int, default=20, help="containers to lease (default: 20)")
    parser.add_argument("--size", type=int, default=5, help="warm containers that the pool keeps (default: 5)")
    options = parser.parse_args()
    signals = Signals()
    signals.install()
    site = Site.of_this_process()
    status = 0
    try:
        try:
            for other in Site.abandoned():
                with signals.shield():
                    say(f"removing what an earlier run left in {other.state_dir} and {other.host_dir}")
                    other.undo()
                    other.sweep()
            demonstrate(site, options.count, options.size, signals)
        finally:
            signals.armed = False
    except Interrupted as interrupt:
        status = 128 + interrupt.signum
        say(f"ended by {signal.Signals(interrupt.signum).name}; cleaning up")
    except (Failed, LxcPoolError, OSError, subprocess.SubprocessError) as error:
        status = 5
        say(f"failed: {error}", sys.stderr)
    finally:
        # No signal gets here any more.
        site.undo()
        left = site.residue()
        site.sweep()
    for line in left:
        say(f"was left, and has been removed by force: {line}", sys.stderr)
    if not left:
        say("the host is clean: no process, cgroup, mount, directory or lock file of this run is left")
    return status or (1 if left else 0)


def demonstrate(site: Site, count: int, size: int, signals: Signals) -> None:
    """Start the service, lease, compare, print, stop."""
    begin = time.perf_counter()
    service = start_service(site, size, signals)
    with PoolManager.connect(site.host_dir) as pool:
        pool.wait_ready(timeout=STEP_TIMEOUT)
        say(f"ready with {size} warm containers after {time.perf_counter() - begin:.2f} s")
        make_cold_base(site)
        rows = []
        for number in range(count):
            # Neither side is measured while the pool refills.
            pool.wait_ready(timeout=STEP_TIMEOUT)
            row = lease_warm(pool, site, number)
            pool.wait_ready(timeout=STEP_TIMEOUT)
            row.cold_get, row.cold_run = run_cold(site, number, signals)
            rows.append(row)
        print_table(rows)
        begin = time.perf_counter()
        for number in range(count):
            lease_warm(pool, site, count + number)
        each = (time.perf_counter() - begin) / count
        say(f"{count} more without a pause, while the pool refills: {each * 1e3:.1f} ms each, get, run and release")
        site.names |= {info.name for info in pool.containers()}
    begin = time.perf_counter()
    subprocess.run(
        [LXC_POOL, "--host-dir", str(site.host_dir), "stop"], check=True, timeout=STEP_TIMEOUT, start_new_session=True
    )
    status = service.wait(STEP_TIMEOUT)
    say(f"lxc-pool stop: the service and its containers are gone after {time.perf_counter() - begin:.2f} s")
    if status != 0:
        raise Failed(f"the service ended with {status}")


def start_service(site: Site, size: int, signals: Signals) -> subprocess.Popen[bytes]:
    """Start `lxc-pool serve` and wait until it accepts connections."""
    with signals.shield():
        site.state_dir.mkdir(mode=0o755)
        # A configuration of its own, and an empty one: the machine's is for the machine's service.
        config = site.state_dir / "lxc-pool.toml"
        config.touch()
        places = ["--host-dir", str(site.host_dir), "--state-dir", str(site.state_dir), "--config", str(config)]
        service = subprocess.Popen(
            [LXC_POOL, "serve", *places, "--size", str(size)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        site.sessions.add(service.pid)
    say(f"started lxc-pool serve, pid {service.pid}, host dir {site.host_dir}, state dir {site.state_dir}")
    assert service.stdout is not None
    if not select.select([service.stdout], [], [], START_TIMEOUT)[0]:
        raise Failed(f"the service did not get ready in {START_TIMEOUT:.0f} s")
    line = service.stdout.readline().decode(errors="replace")
    if not line.startswith("ready "):
        raise Failed(f"the service did not get ready; it said {line!r}")
    return service


def lease_warm(pool: PoolServiceProxy, site: Site, number: int) -> Row:
    """Lease one container, run the command in it as a test would, give it back."""
    lease_id = ContainerId.create(f"demo-{number}")
    begin = time.perf_counter()
    container = pool.get(lease_id, 30)
    got = time.perf_counter()
    if container is None:
        raise Failed(f"no container came free in 30 s: {pool.status()}")
    site.names.add(container.name)
    with container:
        result = container.run(COMMAND, capture_output=True, text=True, timeout=10, check=True)
        ran = time.perf_counter()
        hostname, uid = result.stdout.split()
    if uid != "0":
        raise Failed(f"the command ran as uid {uid} in {container.name}, not as the container's root")
    return Row(container.name, str(lease_id), hostname, got - begin, ran - got)


def make_cold_base(site: Site) -> None:
    """Make a container to copy from, of the very image that the pool clones."""
    images = sorted((site.state_dir / "images" / "busybox").glob("*/rootfs"), key=lambda path: path.stat().st_mtime)
    if not images:
        raise Failed(f"there is no busybox image in {site.state_dir / 'images'}")
    base = site.cold_dir / COLD_BASE
    base.mkdir(parents=True)
    settings = {
        "lxc.rootfs.path": f"dir:{images[-1]}",
        "lxc.uts.name": COLD_BASE,
        "lxc.net.0.type": "empty",
        "lxc.autodev": "1",
        "lxc.tty.max": "0",
        "lxc.mount.auto": "proc:mixed sys:mixed cgroup:mixed",
    }
    (base / "config").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()), encoding="ascii")


def run_cold(site: Site, number: int, signals: Signals) -> tuple[float, float]:
    """Copy, start and use one container with LXC's own programs; return the seconds to get it and to run in it."""
    name = site.cold_name(number)
    site.names.add(name)
    here = ["-P", str(site.cold_dir)]
    # As a whole: a starter that is killed can leave a container that comes up with nobody knowing.
    with signals.shield():
        begin = time.perf_counter()
        lxc("lxc-copy", *here, "-n", COLD_BASE, "-N", name, "-s", "-B", "overlay")
        lxc("lxc-start", *here, "-n", name, "-d")
        got = time.perf_counter()
        output = lxc("lxc-attach", *here, "-n", name, "--clear-env", "--", *COMMAND)
        ran = time.perf_counter()
        lxc("lxc-stop", *here, "-n", name, "-k")
        lxc("lxc-destroy", *here, "-n", name)
    if output.split() != [name, "0"]:
        raise Failed(f"the cold container {name} answered {output!r}")
    return got - begin, ran - got


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows, the medians, and how many times faster warm is than cold."""
    widths = [max(len(getattr(row, field)) for row in rows) for field in ("name", "lease_id", "hostname")]
    labels = [f"{label:{width}}" for label, width in zip(("container", "id", "hostname inside"), widths, strict=True)]
    widths = [max(width, len(label)) for width, label in zip(widths, labels, strict=True)]
    columns = ("get", "run", "cold get", "cold run")
    print()
    print("  ".join(labels), *(f"{label + ' ms':>12}" for label in columns))
    for row in rows:
        cells = [f"{text:{width}}" for text, width in zip((row.name, row.lease_id, row.hostname), widths, strict=True)]
        print("  ".join(cells), *(f"{value * 1e3:12.3f}" for value in (row.get, row.run, row.cold_get, row.cold_run)))
    medians = [
        statistics.median(getattr(row, field) for row in rows) for field in ("get", "run", "cold_get", "cold_run")
    ]
    print(f"{'median':{sum(widths) + 4}}", *(f"{value * 1e3:12.3f}" for value in medians))
    print()
    get, run, cold_get, cold_run = medians
    print(f"get:        {cold_get / get:6.0f} times as fast as lxc-copy + lxc-start")
    print(f"run:        {cold_run / run:6.1f} times as fast as lxc-attach")
    print(f"get + run:  {(cold_get + cold_run) / (get + run):6.1f} times as fast", flush=True)
    print()


if __name__ == "__main__":
    try:
        exit_status = main()
        sys.stdout.flush()
    except OSError:
        # The reader of our output, a terminal or a pipe, has gone; Python would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_status = 5
    sys.exit(exit_status)
