"""What is done on both sides to directories by descriptor: finding a place for something new, and removing it again.

No link is followed below a descriptor. Which links lead to it is the business of whose file system it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

MAX_DEPTH = 256
"""Directories in one another, each of which takes two descriptors. Origin: a guess; a process may have 1024 of them."""

_TEMPORARY = b".lxc_pool-"

Own = Callable[[int], None]
"""Gives the file or directory behind a descriptor its owner."""


class Place(NamedTuple):
    """Where something new will be.

    Attributes:
        directory: A descriptor (O_PATH) of the directory that it will be in.
        name: Its name there.
        path: Both, for people.
    """

    directory: int
    name: bytes
    path: bytes

    def type(self) -> int:
        """Return the S_IFMT part of what is there already, links not followed; 0 if nothing is."""
        try:
            return stat.S_IFMT(os.stat(self.name, dir_fd=self.directory, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return 0


def find_place(destination: bytes, name: bytes, *, parents: bool, own: Own | None = None) -> Place:
    """Find where *destination* is, as cp(1) does: in it, if it is a directory, else it itself.

    Args:
        destination: A path. With a slash, or `.` or `..`, at its end it has to be a directory.
        name: What the new thing will be called in a directory.
        parents: Whether missing directories are made.
        own: What gives those their owner; None: they are this process's.

    Raises:
        ValueError: *name* is empty, but *destination* a directory.
        OSError: There is no such directory, or not of the right kind.
    """
    inside = os.path.basename(destination) in (b"", b".", b"..")
    if not inside and destination:
        try:
            inside = stat.S_ISDIR(os.stat(destination).st_mode)
        except OSError as exc:
            # a link that leads nowhere, or in a circle, is replaced like a file
            if exc.errno not in (errno.ENOENT, errno.ELOOP):
                raise
    if not destination:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), b"")
    if inside:
        directory, final = destination, name
    else:
        directory, final = os.path.split(destination)
    try:
        fd = _find_directory(directory or b".")
    except FileNotFoundError:
        if not parents:
            raise
        _make_directories(directory, own)
        fd = _find_directory(directory)
    if not final:
        os.close(fd)
        raise ValueError(f"what is copied into {os.fsdecode(destination)!r} has no name of its own: name it there")
    return Place(fd, final, os.path.join(directory, final))


def temporary_name() -> bytes:
    """Return a name that nothing else has."""
    return _TEMPORARY + os.urandom(8).hex().encode()


def is_temporary(name: bytes) -> bool:
    """Tell whether `temporary_name` made *name*, or a path of it."""
    return _TEMPORARY in name


def rename(directory: int, old: bytes, new: bytes) -> None:
    """Give a file or tree its final name.

    An overlay that may set no extended attributes, as one that was mounted in a user namespace, does not let a new
    directory into one that is merged (EXDEV): then what is in it is moved into another new one, name by name.
    Source: fs/overlayfs/dir.c of Linux 6.1, ovl_rename.

    Raises:
        OSError: It can't be; what had been moved by then is removed.
    """
    try:
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        _move(directory, old, new)


def _move(directory: int, old: bytes, new: bytes) -> None:
    os.mkdir(new, 0o700, dir_fd=directory)
    fds: list[int] = []
    try:
        fds.append(source := _open_directory(old, directory))
        fds.append(target := _open_directory(new, directory))
        status = os.fstat(source)
        for name in os.listdir(source):
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        os.fchown(target, status.st_uid, status.st_gid)
        os.fchmod(target, stat.S_IMODE(status.st_mode))
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
        os.rmdir(old, dir_fd=directory)
    except BaseException:
        remove(directory, new)
        raise
    finally:
        for fd in fds:
            os.close(fd)


def remove(directory: int, name: bytes) -> None:
    """Remove a file or tree that was not completed; what can't be is left.

    In a container others may be at it meanwhile: each directory is read once, so that it comes to an end.
    """
    with contextlib.suppress(OSError):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            _remove_directory(directory, name)


def _remove_directory(directory: int, name: bytes) -> None:
    levels = [(directory, b"", iter([name]))]
    try:
        while levels:
            above, own_name, names = levels[-1]
            entry = next(names, None)
            if entry is None:
                levels.pop()
                if levels:
                    os.close(above)
                    with contextlib.suppress(OSError):
                        os.rmdir(own_name, dir_fd=levels[-1][0])
                continue
            with contextlib.suppress(OSError):
                try:
                    os.unlink(entry, dir_fd=above)
                except IsADirectoryError:
                    fd = _open_directory(entry, above)
                    try:
                        listed = [os.fsencode(child) for child in os.listdir(fd)]
                    except BaseException:
                        os.close(fd)
                        raise
                    levels.append((fd, entry, iter(listed)))
    finally:
        for fd, _, _ in levels[1:]:
            os.close(fd)


def _find_directory(path: bytes) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _open_directory(name: bytes, above: int | None = None) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)


def _make_directories(path: bytes, own: Own | None) -> None:
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path.rstrip(b"/"))
    for directory in reversed(missing):
        try:
            os.mkdir(directory, 0o755)
        except FileExistsError:  # `a/..` of a missing a; or somebody else was quicker
            continue
        if own is not None:
            fd = _open_directory(directory)
            try:
                own(fd)
            finally:
                os.close(fd)
