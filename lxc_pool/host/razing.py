"""Remove a tree that an enemy has made: in little memory, with three descriptors, however deep or wide it is.

```
 TOP/0/a/b/c/…   ──►  TOP/0 without its files;  TOP/1 (what was a)   ──►  TOP/1 without its files;  TOP/2 (what was b) …
```

A directory in the top one is emptied: what is no directory is removed, and what is one becomes a neighbour of its own,
by rename, unless it is empty. So nothing is deeper than two, no path has more than two names, and nothing has to be
remembered: whoever is killed in the middle begins again with what is there.

No link is followed and no mount entered. Whoever made the tree must not be able to change it any more, and must never
have been able to name anything in the top directory itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import stat
import struct
from collections.abc import Iterator
from typing import Protocol

from lxc_pool.execution.namespaces import open_on_same_mount

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_BATCH = 1000
"""Names of the top directory that are held at a time. A guess: some ten kilobytes."""

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_UNCHANGEABLE = 0x10 | 0x20
"""Immutable, append-only. Source: ioctl_iflags(2)."""


def empty(top: int) -> None:
    """Remove all that is in a directory; it stays.

    Args:
        top: A descriptor of it, which is good for reading.

    Raises:
        OSError: Something can't be removed; all else is gone. With its path, from the top directory on.
    """
    numbers = itertools.count()
    failed: set[str] = set()
    first: OSError | None = None
    while names := _some_names(top, failed):
        for name in names:
            try:
                _remove(top, name, numbers)
            except OSError as error:
                failed.add(name)
                first = first or error
    if first is not None:
        raise first


def _some_names(top: int, failed: set[str]) -> list[str]:
    """Return some names in the top directory, but those that could not be removed."""
    with os.scandir(top) as entries:
        return list(itertools.islice((entry.name for entry in entries if entry.name not in failed), _BATCH))


def _remove(top: int, name: str, numbers: Iterator[int]) -> None:
    """Remove one entry of the top directory; directories in it become entries of that."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
        _insist(os.unlink, top, name)
        return
    directory = open_on_same_mount(top, os.fsencode(name), _DIRECTORY)
    try:
        _flatten(top, name, directory, numbers)
    finally:
        os.close(directory)
    _insist(os.rmdir, top, name)


def _flatten(top: int, name: str, directory: int, numbers: Iterator[int]) -> None:
    """Empty one directory of the top one, as far as that goes.

    Raises:
        OSError: The first that went wrong.
    """
    first: OSError | None = None
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                if not entry.is_dir(follow_symlinks=False):
                    _insist(os.unlink, directory, entry.name)
                elif not _remove_if_empty(directory, entry.name):
                    _lift(directory, entry.name, top, numbers)
            except OSError as error:
                first = first or OSError(error.errno, error.strerror, f"{name}/{entry.name}")
    if first is not None:
        raise first


def _remove_if_empty(directory: int, name: str) -> bool:
    try:
        _insist(os.rmdir, directory, name)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _lift(directory: int, name: str, top: int, numbers: Iterator[int]) -> None:
    """Make a directory one of the top directory's, under a number that none there has."""
    for number in numbers:
        try:
            _insist(functools.partial(_rename, top, str(number)), directory, name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return


def _rename(top: int, new: str, old: str, *, dir_fd: int) -> None:
    os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=top)


class _Act(Protocol):
    def __call__(self, name: str, /, *, dir_fd: int) -> None: ...


def _insist(act: _Act, directory: int, name: str) -> None:
    """Remove or rename an entry of a directory, if need be by making both changeable.

    Root of a container can't make anything unchangeable (it takes CAP_LINUX_IMMUTABLE in the initial user namespace);
    the host's root, who may have looked at a failed test, can.
    """
    try:
        act(name, dir_fd=directory)
    except PermissionError:
        _make_changeable(directory)
        kind = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if stat.S_ISDIR(kind) or stat.S_ISREG(kind):  # opening anything else may do something
            entry = open_on_same_mount(directory, os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                _make_changeable(entry)
            finally:
                os.close(entry)
        act(name, dir_fd=directory)


def _make_changeable(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without flags has none to take off
        flags = struct.unpack("i", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(4)))[0]
        if flags & _UNCHANGEABLE:
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("i", flags & ~_UNCHANGEABLE))
