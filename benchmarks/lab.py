"""Where benchmarks are made: a directory, services, and containers beside them, all of which is gone afterwards.

```
 benchmarks ── python -m lxc_pool serve ── its containers     LAB/N/host, LAB/N/state
      └─────── lxc-copy, lxc-start, … ──── cold containers    LAB/cold
```

The children are in sessions or process groups of their own: Ctrl-C reaches this process alone, and it decides what
ends in which order.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.interrupts import Interrupts
from lxc_pool import LxcPoolError, PoolManager, PoolServiceProxy, PoolStatus
from lxc_pool.backend.lxc import removal
from lxc_pool.images.store import Image, ImageStore
from lxc_pool.service.directories import read_instance
from lxc_pool.service.network import remove_network

ROOT = Path(__file__).resolve().parent.parent

STEP_TIMEOUT = 120.0
"""Seconds until a service must be ready, full, quiet, or gone. A guess: ten times what a busy machine needs."""

_QUIET_PAUSE = 0.01
"""Seconds between two looks whether the service is at rest, and from rest to what is timed. A guess."""

_LOCKS = Path("/run/lxc/lock")


class LabError(Exception):
    """The benchmarks can't be made here, or left something behind; the message says what."""


class Service:
    """A service of the benchmarks' own, with one connection to it."""

    def __init__(self, process: subprocess.Popen[bytes], pool: PoolServiceProxy, state_dir: Path) -> None:
        self.process = process
        self.pool = pool
        self.state_dir = state_dir

    @property
    def image(self) -> Image:
        """The busybox image that its containers are cloned from."""
        image = ImageStore(self.state_dir / "images").newest("busybox")
        assert image is not None, "a service with warm containers has an image"
        return image

    def rest(self, *, leased: int = 0) -> PoolStatus:
        """Wait until the pool is full and nothing is under way but so many leases, and a moment longer.

        Raises:
            PoolTimeout: The pool does not become full.
            LabError: It is full but does not come to rest.
        """
        deadline = time.monotonic() + STEP_TIMEOUT
        self.pool.wait_ready(timeout=STEP_TIMEOUT)
        while True:
            status = self.pool.status()
            time.sleep(_QUIET_PAUSE)  # nothing tells that all is at rest
            if (status.size, status.leased) == (status.capacity, leased) and not (
                status.building or status.reserved or status.reaping or status.stuck
            ):
                return status
            if time.monotonic() > deadline:
                raise LabError(f"the pool does not come to rest: {status}")

    def stop(self) -> None:
        """End the service in order, and wait until it is gone."""
        self.pool.close()
        if self.process.poll() is None:
            # The second signal ends the grace that leases have: they are ours, and nobody uses them any more.
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(STEP_TIMEOUT)


class Lab:
    """The place of one run. `with` makes it, and removes every trace of it."""

    def __init__(self, parent: Path, interrupts: Interrupts) -> None:
        """Choose where; nothing happens yet.

        Args:
            parent: The directory to be in, on the file system to be measured. A short path: sockets' have a limit.
            interrupts: What turns Ctrl-C into an exception.
        """
        self.interrupts = interrupts
        self._parent = parent
        self._directory: Path | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lxcpaths: list[Path] = []
        self._numbers = itertools.count(1)

    @property
    def directory(self) -> Path:
        """The lab's own directory."""
        if self._directory is None:
            raise LabError("the lab is not open")
        return self._directory

    def __enter__(self) -> Self:
        with self.interrupts.shield():
            self._directory = Path(tempfile.mkdtemp(prefix="lxpb-", dir=self._parent))
            # Containers' init may be another user, who has to get through.
            self._directory.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.interrupts.disarm()
        left = [*self._end_processes(), *self._remove_containers()]
        self._remove_networks()
        left += self._remove_directories()
        if left and error is not None:
            error.add_note("; ".join(left))
        elif left:
            raise LabError("; ".join(left))

    @contextlib.contextmanager
    def service(self, size: int | None = None, config: str = "") -> Iterator[Service]:
        """Have a service which is full and at rest.

        Args:
            size: Warm containers of the default profile; None: as the configuration says.
            config: The text of that. It is never the machine's, which is for the machine's service.
        """
        place = self.directory / f"s{next(self._numbers)}"
        place.mkdir(mode=0o755)
        file = place / "lxc-pool.toml"
        file.write_text(config, encoding="utf-8")
        host_dir, state_dir = place / "host", place / "state"
        self._lxcpaths.append(state_dir / "containers")
        log = place / "service.log"
        argv = [sys.executable, "-m", "lxc_pool", "serve", "--host-dir", str(host_dir), "--state-dir", str(state_dir)]
        with self.interrupts.shield(), log.open("wb") as stderr:
            process = subprocess.Popen(
                [*argv, "--config", str(file), *([] if size is None else ["--size", str(size)])],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
            self._processes.append(process)
        try:
            _await_ready(process, log)
            service = Service(process, PoolManager.connect(host_dir, timeout=STEP_TIMEOUT), state_dir)
            service.rest()
            yield service
            service.stop()
        except (LxcPoolError, LabError) as error:
            raise LabError(f"{error}; the service's log ends: {_tail(log)}") from error
        finally:
            if process.stdout is not None:
                process.stdout.close()

    def lxcpath(self, name: str) -> Path:
        """Make a directory for containers beside the service's; what is left in it at the end is removed."""
        path = self.directory / name
        path.mkdir(mode=0o755, parents=True)
        self._lxcpaths.append(path)
        return path

    def _end_processes(self) -> Iterator[str]:
        """Stop the services that still run."""
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.send_signal(signal.SIGTERM)
                    process.wait(STEP_TIMEOUT)
            if process.poll() is None:
                yield f"the service with pid {process.pid} did not end in {STEP_TIMEOUT:.0f} s and has been killed"
                family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
                for pid in reversed(family):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()

    def _remove_containers(self) -> Iterator[str]:
        """Remove what was cut short: cold containers, those of a bare loop, those of a service that was killed."""
        for container in [entry for path in self._lxcpaths if path.exists() for entry in path.iterdir()]:
            try:
                removal.remove(container.name, container.parent, force=True)
            except (LxcPoolError, OSError) as error:
                yield f"{container}: {error}"

    def _remove_networks(self) -> None:
        """Remove the bridge of a service that was killed; what can't be removed is in the log."""
        for lxcpath in self._lxcpaths:
            if (instance := read_instance(lxcpath.parent)) is not None:
                remove_network(instance)

    def _remove_directories(self) -> Iterator[str]:
        for directory in (self.directory, _LOCKS / self.directory.relative_to("/")):
            try:
                shutil.rmtree(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                yield f"{directory}: {error}"


def _await_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], STEP_TIMEOUT)[0]:
        raise LabError(f"the service did not get ready in {STEP_TIMEOUT:.0f} s")
    line = process.stdout.readline().decode(errors="replace")
    if not line.startswith("ready "):
        raise LabError(f"the service did not get ready: it said {line!r}; its log ends: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1000:].strip() or "(empty)"
