"""What one run of the demonstration makes on the host: where it is, how it is undone, and what is left of it.

Every path and name follows from the run's id, which is its process (pid and start time): so the next run finds what a
killed one left. Nothing here needs the service's help; where that has ended in order, there is little to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

LXC_POOL = Path(sys.executable).with_name("lxc-pool")

COLD_BASE = "busybox"
"""What the cold containers are copied from. The image's path must contain it. Source: storage.c of liblxc 5.0.2."""

_PREFIX = "lxc-pool-demo."
_STATE_PARENT = Path("/var/lib")
_HOST_PARENT = Path("/run")
_LXC_LOCKS = Path("/run/lxc/lock")
_CGROUPS = Path("/sys/fs/cgroup")

STEP_TIMEOUT = 60.0
"""Seconds that one command of LXC's, or the service's end, may take. A guess: each takes milliseconds."""

_KILL_TIMEOUT = 10.0
"""Seconds from a signal to the end of the processes that it was sent to. A guess."""


class Failed(Exception):
    """The demonstration did not come off; the message says why."""


@dataclasses.dataclass
class Site:
    """The things of one run.

    Attributes:
        run_id: `PID-STARTTICKS` of the run's process.
        names: The containers that have existed, as far as is known; their cgroups are looked for.
        sessions: The session ids of the services that have been started.
    """

    run_id: str
    names: set[str] = dataclasses.field(default_factory=set)
    sessions: set[int] = dataclasses.field(default_factory=set)

    @classmethod
    def of_this_process(cls) -> Site:
        """Return the site that belongs to the calling process."""
        return cls(f"{os.getpid()}-{_stat(os.getpid())[_START_TICKS]}")

    @classmethod
    def abandoned(cls) -> Iterator[Site]:
        """Yield the sites of runs that were killed."""
        found = {path.name for parent in (_STATE_PARENT, _HOST_PARENT) for path in parent.glob(f"{_PREFIX}*")}
        for name in sorted(found):
            run_id = name.removeprefix(_PREFIX)
            if match := re.fullmatch(r"(\d+)-(\d+)", run_id):
                stat = _stat(int(match[1]))
                if not stat or stat[_START_TICKS] != match[2]:
                    yield cls(run_id)

    @property
    def state_dir(self) -> Path:
        """The service's state dir; the cold containers are in it too."""
        return _STATE_PARENT / f"{_PREFIX}{self.run_id}"

    @property
    def host_dir(self) -> Path:
        """The service's host dir."""
        return _HOST_PARENT / f"{_PREFIX}{self.run_id}"

    @property
    def cold_dir(self) -> Path:
        """The lxcpath of the cold containers."""
        return self.state_dir / "cold"

    @property
    def lock_dir(self) -> Path:
        """Where liblxc keeps its lock files for everything below the state dir."""
        return _LXC_LOCKS / self.state_dir.relative_to("/")

    def cold_name(self, number: int) -> str:
        """Return the name of a cold container. It names the run: cgroups of all lxcpaths are side by side."""
        return f"demo-{self.run_id}-cold-{number}"

    def undo(self) -> None:
        """Stop and remove everything of the site; go on past each failure and report it."""
        lxcpaths = (self.state_dir / "containers", self.cold_dir)
        _attempt("stop the service", self._stop_service)
        for lxcpath in lxcpaths:
            _attempt(f"destroy the containers in {lxcpath}", partial(self._destroy_containers, lxcpath))
        # liblxc never removes any. Those of the pool's containers are the service's to remove: they stay to be seen.
        _attempt("remove the cold containers' lock files", partial(_remove_tree, self.lock_dir / "cold"))
        for directory in (self.lock_dir / "containers", self.lock_dir):
            with contextlib.suppress(OSError):
                directory.rmdir()
        for directory in (self.state_dir, self.host_dir):
            _attempt(f"remove {directory}", partial(_remove_tree, directory))

    def sweep(self) -> None:
        """Remove by force what `undo` has left, so that it is told but does not stay."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in self._cgroups():
            _attempt(f"remove {path}", partial(_remove_cgroup, path))
        _attempt(f"remove {self.lock_dir}", partial(_remove_tree, self.lock_dir))

    def residue(self) -> list[str]:
        """Return a line for each trace of the site that is on the host."""
        marks = (str(self.state_dir), str(self.host_dir))
        found = [f"process {pid}: {line}" for pid, line in self.processes().items()]
        found += [f"cgroup {path}" for path in self._cgroups()]
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found += [f"mount {line}" for line in mounts if any(mark in line for mark in marks)]
        found += [f"directory {path}" for path in (self.state_dir, self.host_dir) if path.exists()]
        found += [f"lock {path}" for path in (self.lock_dir, *self.lock_dir.rglob("*")) if path.exists()]
        return found

    def processes(self) -> dict[int, str]:
        """Return the processes that name the site's paths or are in a service's session, with their command lines."""
        found = {}
        for pid in [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]:
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
                # A zombie has no command line.
                ours = str(self.state_dir) in line or str(self.host_dir) in line
                if line and (ours or int(_stat(pid)[_SESSION]) in self.sessions):
                    found[pid] = line.strip()
        return found

    def _stop_service(self) -> None:
        """End the service as its administrator would, else by signals."""
        if not self.processes():
            return
        if (self.host_dir / "pool.sock").exists():
            # No grace: a lease that is left is our own, and nobody uses it any more.
            command: list[str | Path] = [LXC_POOL, "--host-dir", str(self.host_dir), "stop", "--grace", "0"]
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run(command, check=True, capture_output=True, timeout=STEP_TIMEOUT, start_new_session=True)
        for signum in (signal.SIGTERM, signal.SIGKILL):
            # Not the containers' monitors: their turn comes when nobody starts new ones.
            pids = [pid for pid, line in self.processes().items() if not line.startswith("[lxc monitor]")]
            pidfds = []
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    pidfds.append(os.pidfd_open(pid))
                    signal.pidfd_send_signal(pidfds[-1], signum)
            _await_end(pidfds)

    def _destroy_containers(self, lxcpath: Path) -> None:
        deadline = time.monotonic() + _KILL_TIMEOUT
        # Again, while a start that was cut short brings one up behind our back.
        while time.monotonic() < deadline:
            directories = [path for path in lxcpath.glob("*") if path.is_dir() and path != self.cold_dir / COLD_BASE]
            self.names |= {path.name for path in directories}
            monitors = [line for line in self.processes().values() if line.startswith(f"[lxc monitor] {lxcpath} ")]
            if not directories and not monitors:
                return
            for name in {path.name for path in directories} | {line.split()[-1] for line in monitors}:
                if (lxcpath / name / "config").exists():
                    lxc("lxc-destroy", "-P", str(lxcpath), "-n", name, "-f")
                else:
                    _remove_tree(lxcpath / name)
        raise Failed(f"it took more than {_KILL_TIMEOUT:.0f} s")

    def _cgroups(self) -> list[Path]:
        """Return the containers' cgroups, in every hierarchy, each with what is below it."""
        # liblxc appends -1, -2 … where a name is taken.
        wanted = re.compile(r"lxc\.(?:payload|monitor|pivot)\.(.+?)(?:-[0-9]+)?")
        found = []
        for directory, children, _files in os.walk(_CGROUPS):
            for child in children:
                match = wanted.fullmatch(child)
                if match and (match[1] in self.names or child.split(".", 2)[2] in self.names):
                    found.append(Path(directory, child))
        return found


def say(message: str, stream: TextIO | None = None) -> None:
    """Print a line, if anybody still listens: a terminal that has gone must not stop the cleaning up."""
    with contextlib.suppress(OSError, ValueError):
        print(f"demo: {message}", file=stream or sys.stdout, flush=True)


def lxc(*argv: str) -> str:
    """Run one of LXC's programs and return what it printed.

    Raises:
        Failed: It ended with an error, or not at all.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=STEP_TIMEOUT,
            # Ctrl-C is for this process alone: a starter that is killed may leave a container that nobody knows.
            start_new_session=True,
        )
    except subprocess.CalledProcessError as error:
        raise Failed(f"{' '.join(argv)} ended with {error.returncode}: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(argv)} has not ended in {STEP_TIMEOUT:.0f} s") from error
    return done.stdout


_START_TICKS = 19
"""Index of the start time in what `_stat` returns. Source: proc_pid_stat(5), field 22; the first is field 3."""

_SESSION = 3
"""The same for the session id, field 6."""


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; none if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _await_end(pidfds: list[int]) -> None:
    """Wait until the processes have ended, and close their pidfds."""
    deadline = time.monotonic() + _KILL_TIMEOUT
    for pidfd in pidfds:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(pidfd)


def _attempt(what: str, action: Callable[[], None]) -> None:
    try:
        action()
    except (Failed, OSError, subprocess.SubprocessError) as error:
        say(f"could not {what}: {error}", sys.stderr)


def _remove_tree(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _remove_cgroup(path: Path) -> None:
    for directory, _children, _files in os.walk(path, topdown=False):
        os.rmdir(directory)
