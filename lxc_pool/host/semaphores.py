"""The named semaphores of one service: its lanes' executors have five each.

The standard library makes them, and counts them in a process of its own, which removes what its service has not. Killed
both at once, they stay: so their names, too, carry the instance id.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

DIRECTORY = Path("/dev/shm")  # noqa: S108  # not ours to choose
"""Where the C library keeps them. Source: sem_overview(7)."""


def name_prefix(prefix: str) -> str:
    """Return what the names of semaphores of the service begin with whose containers' names begin with *prefix*."""
    return f"/{prefix}sem"


def files(prefix: str) -> tuple[Path, ...]:
    """Return the files of that service's semaphores. What somebody else has put there is not among them.

    Args:
        prefix: What all names of the service's containers begin with.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(DIRECTORY)):
            if name.startswith(f"sem.{prefix}"):
                with contextlib.suppress(FileNotFoundError):  # its service has just removed it
                    status = os.lstat(DIRECTORY / name)
                    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                        found.append(DIRECTORY / name)
    return tuple(found)


def remove(prefix: str) -> None:
    """Remove all semaphores of that service, which does not run, or does not have any yet.

    Raises:
        OSError: One can't be removed.
    """
    for path in files(prefix):
        path.unlink(missing_ok=True)
