"""What is left of containers with layers on the disk: put aside at once, removed later.

```
 lane      containers/NAME ── rename ──► containers/.discarded/NAME
 sweeper    its layer; its quota; its range of ids, once nothing counts as the project's; the rest
```

Removing a layer may take minutes, which no lane has: its owner may have made a hundred thousand files in it. Each step
leaves what the next one needs to know, so that whoever is killed in between is followed by somebody else.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

from lxc_pool.backend.lxc import container_config, layers
from lxc_pool.host import idranges, quota, razing
from lxc_pool.host.residue import DISCARDED

_ROOM, _ROOM_INODES = 64 << 20, 1024
"""Bytes and inodes above what a layer takes that its removal may take for a while: renaming makes a directory larger.
Guesses."""

_PAUSE = 0.05
"""Seconds between two looks whether the kernel still counts a file."""


def put_aside(directory: Path) -> None:
    """Make a container's directory one that is to be removed.

    Raises:
        FileNotFoundError: It is not there.
        OSError: It can't be renamed.
    """
    aside = _place(directory.parent, directory.name)
    while True:
        aside.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            directory.rename(aside)
        except FileNotFoundError:
            if aside.parent.is_dir() and not directory.exists():
                raise
        else:
            return


def is_there(lxcpath: Path, name: str) -> bool:
    """Return whether the container *name* was put aside and is not removed yet."""
    return _place(lxcpath, name).is_dir()


def names(lxcpath: Path) -> tuple[str, ...]:
    """Return the containers that were put aside."""
    try:
        return tuple(sorted(os.listdir(lxcpath / DISCARDED)))
    except FileNotFoundError:
        return ()


def remove(lxcpath: Path, name: str, *, patience: float = 0.0) -> None:
    """Remove what was put aside of the container *name*; not an error if nothing was.

    Args:
        lxcpath: The directory of the containers.
        name: Which.
        patience: Seconds that the kernel may go on counting files that are removed: XFS does for a moment.

    Raises:
        OSError: Something of it is still there.
    """
    directory = _place(lxcpath, name)
    if not directory.is_dir():
        return
    project = _remove_layer(directory) or _project_of_removed(lxcpath, name)
    if project is not None:
        deadline = time.monotonic() + patience
        with layers.opened(directory) as place:
            while quota.enforced(place) and (left := quota.of_project(place, project)).inodes:
                if time.monotonic() >= deadline:
                    words = f"{left.inodes} removed files of it are still counted: some are open, maybe"
                    raise OSError(errno.EBUSY, words, str(directory))
                time.sleep(_PAUSE)  # nothing tells
    idranges.give_back(str(lxcpath / name))  # with its project, only now that nothing of either is left
    shutil.rmtree(directory)


def remove_place(lxcpath: Path) -> None:
    """Remove what they are put aside in, if nothing is in it."""
    try:
        (lxcpath / DISCARDED).rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _place(lxcpath: Path, name: str) -> Path:
    return lxcpath / DISCARDED / name


def _remove_layer(directory: Path) -> int | None:
    """Remove the layer in *directory*, and the limits of its project; return that; None if there is neither.

    Raises:
        OSError: It can't be removed.
    """
    layer = layers.path(directory)
    try:
        with layers.opened(layer) as descriptor:
            project = _project(descriptor)
            if project:
                taken = quota.of_project(descriptor, project)
                quota.limit(descriptor, project, taken.used + _ROOM, taken.inodes + _ROOM_INODES)
            razing.empty(descriptor)
            if project:
                quota.limit(descriptor, project, 0, 0)
    except FileNotFoundError:
        return None
    layer.rmdir()
    return project or None


def _project(descriptor: int) -> int:
    """Return the project of a layer; 0 if it has none, or if the file system has been mounted without quotas since."""
    return quota.project_of(descriptor) if quota.enforced(descriptor) else 0


def _project_of_removed(lxcpath: Path, name: str) -> int | None:
    """Return the project of a container whose layer is removed already; None if that is not known, or free already."""
    first_id = container_config.first_id(_place(lxcpath, name))
    return first_id if first_id is not None and idranges.holder(first_id) == str(lxcpath / name) else None
