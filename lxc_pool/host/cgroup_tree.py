"""What is in a cgroup and below it, told from what can't be looked into, as when no descriptor is left."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV})
"""What a cgroup says that was removed meanwhile, or never was."""


def directories(path: str | os.PathLike[str], *, topdown: bool = True) -> Iterator[str]:
    """Go through the cgroup *path* and those below it; through none if it is not there.

    Raises:
        OSError: One can't be looked into.
    """
    for directory, _, _ in os.walk(path, topdown=topdown, onerror=_unless_gone):
        yield directory


def children(path: str) -> list[str]:
    """Return the cgroups right below the cgroup *path*; none if it is not there.

    Raises:
        OSError: It can't be looked into.
    """
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        _unless_gone(error)
        return []


def pids(path: str | os.PathLike[str]) -> set[int]:
    """Return the processes in the cgroup *path* and in those below it; none if it is not there.

    Raises:
        OSError: It can't be looked into.
    """
    found: set[int] = set()
    for directory in directories(path):
        found |= own_pids(directory)
    return found


def own_pids(path: str | os.PathLike[str]) -> set[int]:
    """Return the processes in the cgroup *path*; none if it is not there.

    Zombies are not in it (measured on both versions), nor are processes that this pid namespace can't see.

    Raises:
        OSError: It can't be looked into.
    """
    try:
        with open(os.path.join(path, "cgroup.procs"), "rb") as file:
            return set(map(int, file.read().split())) - {0}
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # threaded: the cgroup above lists its processes
            _unless_gone(error)
        return set()


def _unless_gone(error: OSError) -> None:
    if error.errno not in _GONE:
        raise error
