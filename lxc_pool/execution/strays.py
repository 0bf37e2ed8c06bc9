"""Strays: processes that have left their command's cgroup, as a container's root can. How they are known, and ended.

Before any of the container's code runs in it, a command puts on a mark, a hard limit; all that comes of it inherits
that. Who raises a hard limit needs CAP_SYS_RESOURCE in the host's user namespace: root of an unprivileged container can
lower it and nothing else. A mark is the lower the later it is made. So a command's strays are what is in none of the
commands' cgroups with a limit that is not above its own mark; those of later commands are strays as well.

The limit is that of file locks, which the kernel does not look at (getrlimit(2): Linux 2.4.0 to 2.4.24 did).

Out of reach: root of a privileged container, who can raise the limit again; and what a command has another process do,
one that the container's init has started. Those end with the container.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
from collections.abc import Callable

from lxc_pool.execution import cgroups

_LIMIT = 10
"""RLIMIT_LOCKS, which `resource` lacks. Source: Linux include/uapi/asm-generic/resource.h; the same everywhere."""

_HIGHEST = 1 << 62
"""Above all marks for 146 years after the boot, and below RLIM_INFINITY, which processes have that are no command's."""

TIMEOUT = 1.0
"""Seconds that killed strays have to be gone in. Origin: the owner's."""

_ENDED = (ProcessLookupError, FileNotFoundError)
"""What system calls and /proc say of a process that has ended."""


def mark() -> int:
    """Return a mark: that of a command which begins now, or one above it if that begins later."""
    return _HIGHEST - time.monotonic_ns()


def put_on_mark() -> None:
    """Mark this process and all that will come of it."""
    ours = mark()
    resource.setrlimit(_LIMIT, (ours, ours))


class Hunt:
    """Kills the strays of a command bit by bit, for nobody may wait for a container."""

    def __init__(self, payload: str, highest: int, on_survivors: Callable[[], None]) -> None:
        """Look at nothing yet.

        Args:
            payload: The directory of their container's cgroup.
            highest: The command's mark, or one above it. Who has a lower one and is in no command's cgroup has strayed.
            on_survivors: Called if some go on for `TIMEOUT` while they are killed.
        """
        self._payload = payload
        self._highest = highest
        self._on_survivors = on_survivors
        self._deadline: float | None = None
        self._last_seen = float("-inf")

    def go_on(self) -> bool:
        """Kill the strays that there are just now; return whether that is all that has to be done."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline, self._last_seen = now + TIMEOUT, float("-inf")
        try:
            seen, sure = _kill(self._payload, self._highest)
        except OSError:  # no descriptor is left, say: what can't be looked for is not gone
            seen, sure = False, False
        if seen:
            self._last_seen = now
        elif sure:
            self._deadline = None
            return True
        if now < self._deadline:
            return False
        # Of a service that forks all the time nobody can be sure; it is none of them.
        survivors = self._last_seen > self._deadline - TIMEOUT / 2
        self._deadline = None
        if survivors:
            self._on_survivors()
        return True


def _kill(payload: str, highest: int) -> tuple[bool, bool]:
    """Kill the strays that there are just now.

    Returns:
        Whether there were any, and whether everything was looked at that there was.

    Raises:
        OSError: They can't be looked for.
    """
    if _is_marked(os.getpid(), highest):
        return False, True  # somebody limits file locks here: what init has started looks as a command does
    seen, sure = False, True
    pidfds: dict[int, int] = {}
    try:
        for pid in cgroups.pids_of_no_command(payload):
            try:
                if _is_marked(pid, highest):
                    seen = True
                    pidfds[os.pidfd_open(pid)] = pid
            except _ENDED:  # it may have forked just before
                sure = False
        # who is listed again after its pidfd was opened is in this container, and not a stranger with a reused pid
        still = cgroups.pids_of_no_command(payload) if pidfds else set()
        for pidfd, pid in pidfds.items():
            if pid in still:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    return seen, sure


def _is_marked(pid: int, highest: int) -> bool:
    """Tell whether a process has a mark, and that or a lower one.

    Raises:
        ProcessLookupError, FileNotFoundError: It has ended.
    """
    try:
        hard = resource.prlimit(pid, _LIMIT)[1]
    except PermissionError:  # of another user, and a container engine has left us no CAP_SYS_RESOURCE
        with open(f"/proc/{pid}/limits", encoding="ascii") as file:
            found = re.search(r"^Max file locks +\S+ +(\d+)", file.read(), re.MULTILINE)
        hard = int(found[1]) if found else resource.RLIM_INFINITY
    return hard <= highest and hard != resource.RLIM_INFINITY
