"""What processes, and the kernel for them, take of CPU and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

_CPUCLOCK_SCHED = 2
"""The clock of a process's CPU time, to the nanosecond. Source: Linux include/linux/posix-timers_types.h."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trees:
    """The processes of a service and of its containers.

    Attributes:
        service: The service process alone.
        helpers: Its lanes' workers, the server they are forked from, the agent that runs commands.
        monitors: liblxc's, one a container.
        inits: The containers' own processes.
    """

    service: tuple[int, ...]
    helpers: tuple[int, ...]
    monitors: tuple[int, ...]
    inits: tuple[int, ...]

    @classmethod
    def of(cls, service_pid: int, init_pids: Iterable[int]) -> Trees:
        """Find them: helpers are the service's descendants, a monitor is an init's parent."""
        helpers = tuple(sorted(child.pid for child in psutil.Process(service_pid).children(recursive=True)))
        monitors, inits = [], []
        for pid in init_pids:
            init = psutil.Process(pid)
            monitors.append(init.ppid())
            inits += [pid, *(child.pid for child in init.children(recursive=True))]
        return cls((service_pid,), helpers, tuple(monitors), tuple(inits))


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time, user's and system's, that living processes have taken, all threads included.

    Source: clock_getcpuclockid(3); a process's clock id is `~pid << 3 | 2`. /proc/PID/stat counts in steps of 10 ms.
    """
    return sum(time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED) for pid in pids)


def pss(pids: Iterable[int]) -> int:
    """Return the bytes of memory of living processes, each shared page divided among those that share it."""
    total = 0
    for pid in pids:
        # A kernel may have no smaps for a process that is just ending; that is none of those measured.
        with contextlib.suppress(ProcessLookupError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def kernel_memory() -> dict[str, int]:
    """Return the fields of /proc/meminfo, in bytes."""
    fields = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _colon, rest = line.partition(":")
        words = rest.split()
        fields[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return fields
