"""Other programs: run in the cheapest way that there is, so that what they are compared with gets no gift."""

from __future__ import annotations

import os
import signal
import time

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class ProgramFailed(Exception):
    """A program that is measured did not do its work."""


def run(*argv: str) -> float:
    """Run a program with its streams at /dev/null; return the seconds from its spawning to its being reaped.

    Its process group is its own: a Ctrl-C is for this process to handle, which may not kill a start half-way.

    Raises:
        ProgramFailed: It did not end with 0.
        FileNotFoundError: There is no such program.
    """
    actions = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    return _timed(argv, actions)


def run_inheriting(*argv: str) -> float:
    """Run a program with this process's streams, as a shell does; otherwise as `run`."""
    return _timed(argv, [])


def _timed(argv: tuple[str, ...], actions: list[tuple[int, int, str, int, int]]) -> float:
    begin = time.perf_counter()
    # posix_spawn is a vfork and an exec: nothing of this process is copied.
    pid = os.posix_spawnp(
        argv[0], argv, ENVIRONMENT, file_actions=actions, setpgroup=0, setsigmask=(), setsigdef=(signal.SIGPIPE,)
    )
    status = os.waitpid(pid, 0)[1]
    seconds = time.perf_counter() - begin
    if status != 0:
        raise ProgramFailed(f"`{' '.join(argv)}` ended with {os.waitstatus_to_exitcode(status)}")
    return seconds
