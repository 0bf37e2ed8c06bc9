"""Upper layers on the state dir's own file system, where that has project quotas to bound them.

```
 DIRECTORY/layer    a directory with a project id of its own, which all that is made in it inherits
            ├─ delta, work, image, rootfs    as they would be in a tmpfs; see `rootfs`
```

The project id is the first of the container's range of ids: whoever has the range has the project, and both are free
again when nothing of either is left. The directory bears the id before limits are written down, and until they are
taken away: no record is ever without one that says whose it is.

A layer is on a tmpfs instead if
 - the container is privileged: its root could change ids and pass limits, as the host's can;
 - the file system has no project quotas, or does not enforce them;
 - there is too little room for all layers to be filled up to their limits: the ledger is on that file system, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lxc_pool.host import idranges, quota

log = logging.getLogger(__name__)

LAYER = "layer"

_BYTES_PER_INODE = 16384
"""A layer may have as many files as a file system of its size would. Source: mke2fs.conf(5), inode_ratio."""

_LEAST_INODES = 1024
"""So that a small one can boot. A guess: busybox takes some ten."""

_SPARE = 256 << 20
_SPARE_INODES = 10_000
"""Bytes and inodes that layers leave to the service, were they all full. Guesses; the first is `min_free`'s default."""

TMPFS, PROJECT_QUOTA = "tmpfs", "project quota"


def path(directory: Path) -> Path:
    """Return where the layer of the container in *directory* is, if it is on this file system."""
    return directory / LAYER


def in_use(lxcpath: Path, project: int) -> bool:
    """Return whether a project id is somebody's already, on the file system of the containers or by /etc/projid."""
    with opened(lxcpath) as place:
        if not quota.enforced(place):
            return False
        return not quota.of_project(place, project).blank or project in quota.named()


def bound(place: Path) -> tuple[str, str]:
    """Return what would bound the layer of a container made now, and more about it, for people.

    Args:
        place: A directory on the file system that they are on.
    """
    try:
        with opened(place) as descriptor:
            if not quota.enforced(descriptor):
                return TMPFS, "no project quotas are enforced there"
            lacking = _shortage(descriptor)
    except OSError as error:
        return TMPFS, f"can't look there: {error.strerror}"
    return (TMPFS, lacking) if lacking else (PROJECT_QUOTA, "of unprivileged containers; a tmpfs of privileged ones")


def make(directory: Path, project: int, disk: int) -> bool:
    """Make the layer of a container, if it can be bounded by a quota; return whether it is.

    Args:
        directory: The container's.
        project: The id that it gets.
        disk: Bytes that it may take.

    Raises:
        OSError: It can't be made, nor what was made of it be undone.
    """
    with opened(directory) as place:
        if not quota.enforced(place):
            return False
        layer = path(directory)
        layer.mkdir(mode=0o755)
        try:
            with opened(layer) as descriptor:
                quota.mark(descriptor, project)
            quota.limit(place, project, disk, max(_LEAST_INODES, disk // _BYTES_PER_INODE))
            lacking = _shortage(place)  # its own limit is counted: two that are made at once both see each other's
        except OSError as error:
            lacking = f"the kernel refuses a project quota: {error.strerror}"
        if lacking is None:
            return True
        log.warning("%s: its upper layer is on a tmpfs: %s", directory.name, lacking)
        with contextlib.suppress(OSError):
            quota.limit(place, project, 0, 0)
        layer.rmdir()
        return False


def forget(lxcpath: Path, name: str) -> None:
    """Take away the limits of a container's project if its layer has been removed by somebody else.

    Raises:
        OSError: The kernel refused.
    """
    with contextlib.suppress(FileNotFoundError), opened(lxcpath) as place:
        if quota.enforced(place):
            for file, who in idranges.held():
                project = int(file.name)
                if who == str(lxcpath / name) and not quota.of_project(place, project).inodes:
                    quota.limit(place, project, 0, 0)


def _shortage(place: int) -> str | None:
    """Return what there is too little of, were every layer filled up to its limit; None if nothing."""
    status = os.fstatvfs(place)
    size, inodes = status.f_bavail * status.f_frsize, status.f_favail
    for project in idranges.taken():
        record = quota.of_project(place, project)
        size -= max(0, record.limit - record.used)
        inodes -= max(0, record.inodes_limit - record.inodes)
    if size < _SPARE:
        return f"too few bytes are free there: {(_SPARE - size) >> 20} MiB more, if all layers are to be filled"
    if status.f_files and inodes < _SPARE_INODES:
        return f"too few inodes are free there: {_SPARE_INODES - inodes} more, if all layers are to be filled"
    return None


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Have a descriptor of a directory that is no link, for the time of a `with`.

    Raises:
        OSError: It is not there, or none.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
