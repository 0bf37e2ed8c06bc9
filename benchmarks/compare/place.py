"""A peer's own place on the machine: its directory, daemons and cgroups, and how nothing of them is left.

```
 place ── daemon (dockerd, lxd)          in a session of its own: Ctrl-C reaches the benchmark alone
             └─ containerd, monitors …   found by the directory that their command lines name
                   └─ systems            found by their cgroups, which are named after the prefix
```

Whatever a peer has been doing when it is cut short, the order is: its systems are killed, its daemon ends in order,
what is left of either is killed, what is mounted in the directory is taken off, and cgroups and traces go. The
directory itself goes with the lab's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks import programs
from benchmarks.lab import STEP_TIMEOUT, Lab, LabError
from lxc_pool import LxcPoolError
from lxc_pool.host import cgroups, mounts
from lxc_pool.host.residue import mount_points

_READY_PAUSE = 0.1
"""Seconds between two looks whether a daemon answers, where it can't be waited for. A guess."""


class Place:
    """The place of one peer. `with` makes it, and removes every trace of it but the directory."""

    def __init__(self, lab: Lab, name: str, traces: Sequence[Path] = ()) -> None:
        """Choose where; nothing happens yet.

        Args:
            lab: Where the directory is.
            name: Of the peer.
            traces: Files and directories elsewhere that the peer makes whatever it is told, contents before the
                directory. Those that are not there yet are removed at the end, directories only if they are empty.
        """
        self.directory = lab.directory / name
        # It names this process: cgroups of all of a machine's benchmarks are side by side.
        self.prefix = f"lxpb-{os.getpid()}-{name}"
        self.environment: Mapping[str, str] = {**programs.ENVIRONMENT, "HOME": str(self.directory)}
        self._interrupts = lab.interrupts
        self._traces = tuple(trace for trace in traces if not trace.exists())
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.directory.mkdir(mode=0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._interrupts.shield():
            left = list(self._clear())
            if left and error is not None:
                error.add_note("; ".join(left))
            elif left:
                raise LabError("; ".join(left))

    def set(self, **variables: str) -> None:
        """Add variables to the peer's environment."""
        self.environment = {**self.environment, **variables}

    def start_daemon(self, *argv: str) -> None:
        """Start a daemon; what it says goes to `daemon.log`."""
        with self._interrupts.shield(), (self.directory / "daemon.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    argv,
                    cwd=self.directory,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def await_daemon(self, *argv: str) -> None:
        """Wait until a command succeeds.

        Raises:
            LabError: It does not in time, or the daemon has ended.
        """
        deadline = time.monotonic() + STEP_TIMEOUT
        while self._status(*argv) != 0:
            if any(daemon.poll() is not None for daemon in self._daemons) or time.monotonic() > deadline:
                log = (self.directory / "daemon.log").read_text(encoding="utf-8", errors="replace")
                raise LabError(f"{self._daemons[-1].args!r} does not get ready; its log ends: {log[-1000:].strip()}")
            time.sleep(_READY_PAUSE)  # these daemons tell nobody when they are ready

    def run(self, *argv: str) -> str:
        """Run a command of the peer's; return its output.

        Raises:
            LabError: It failed, or took too long.
        """
        try:
            done = subprocess.run(
                argv,
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=STEP_TIMEOUT,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"`{' '.join(argv)}` took more than {STEP_TIMEOUT:.0f} s") from None
        if done.returncode != 0:
            raise LabError(f"`{' '.join(argv)}` ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def _status(self, *argv: str) -> int:
        return subprocess.run(
            argv, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=STEP_TIMEOUT
        ).returncode

    def _clear(self) -> Iterator[str]:
        """Remove all of it; yield what could not be removed."""
        cgroups.kill(*self._cgroups(), timeout=STEP_TIMEOUT)
        for daemon in self._daemons:
            daemon.terminate()
            try:
                daemon.wait(STEP_TIMEOUT)
            except subprocess.TimeoutExpired:
                yield f"{daemon.args!r} did not end in {STEP_TIMEOUT:.0f} s and has been killed"
                daemon.kill()
                daemon.wait()
        # What a command that was cut short, or a daemon's last moment, has left.
        cgroups.kill(*self._cgroups(), timeout=STEP_TIMEOUT)
        self._kill_processes()
        yield from _tried(self._unmount)
        yield from _tried(lambda: cgroups.remove(*self._cgroups(), timeout=STEP_TIMEOUT))
        for trace in self._traces:
            with contextlib.suppress(OSError):  # not made, or somebody else uses it by now
                trace.unlink() if not trace.is_dir() else trace.rmdir()

    def _cgroups(self) -> tuple[Path, ...]:
        """Return the cgroups of the systems: below a parent, or liblxc's."""
        below = [tree.mount_point / self.prefix for tree in cgroups.hierarchies()]
        return (*below, *(path for _name, path in cgroups.cgroups_by_container(f"{self.prefix}-")))

    def _kill_processes(self) -> None:
        """Kill processes outside of those cgroups: shims and monitors, whose daemon may have left them alone."""
        place = f"{self.directory}/"
        found = [
            process for process in psutil.process_iter(["cmdline"]) if place in " ".join(process.info["cmdline"] or ())
        ]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, STEP_TIMEOUT)

    def _unmount(self) -> None:
        for mount in reversed(mount_points()):
            if Path(mount).is_relative_to(self.directory):
                mounts.unmount(Path(mount))


def _tried(step: Callable[[], None]) -> Iterator[str]:
    try:
        step()
    except (LxcPoolError, OSError) as error:
        yield str(error)
