"""Reading a file or tree, and sending it as frames.

The path that the caller names may lead over links; below it none is followed, whatever happens to the tree meanwhile:
each name is opened relative to the descriptor of its directory, with O_NOFOLLOW. What vanishes before it is opened is
left out, as if it had vanished earlier. A file is sent at the length that it had when it was opened: one that grows for
ever comes to an end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from lxc_pool.execution.frames import CHUNK, DIRECTORY, FILE, LINK, SPECIAL, Entry, FrameWriter
from lxc_pool.execution.trees import MAX_DEPTH

UNSIZED = 16 * 1024 * 1024
"""Bytes that are read of a file that says it has none, as those of /proc do. Origin: a guess, more than any there."""

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # O_NONBLOCK: a FIFO may have taken the file's place


class Watch(Protocol):
    """Who wants to know how far it is."""

    def moved(self, count: int) -> None:
        """*count* bytes more of a file, holes included, have been sent."""
        ...

    def entered(self) -> None:
        """One file, directory or link more has been sent."""
        ...

    def skipped(self, path: bytes) -> None:
        """A device, fifo or socket has been left out."""
        ...


class _Level(NamedTuple):
    """A directory that is being read; the listing has a descriptor of its own."""

    fd: int
    names: Iterator[os.DirEntry[str]]
    end_listing: Callable[[], None]
    path: bytes

    def close(self) -> None:
        """Close both."""
        self.end_listing()
        os.close(self.fd)


def send(path: bytes, frames: FrameWriter, watch: Watch) -> None:
    """Send what *path* leads to: a file, or a directory with all that is in it.

    Raises:
        OSError: It, or something in it, can't be read; `filename` says what.
    """
    if not _is_sendable(os.stat(path).st_mode):
        raise OSError(errno.EOPNOTSUPP, "neither a file nor a directory", path)
    fd = os.open(path, _READ)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            root, fd = fd, -1  # it is closed there
            _Tree(frames, watch).send(root, path, status)
        elif stat.S_ISREG(status.st_mode):
            _send_file(fd, b"", status, frames, watch)
        else:
            raise OSError(errno.EOPNOTSUPP, "neither a file nor a directory", path)
    except OSError as exc:
        _name(exc, path)
        raise
    finally:
        if fd >= 0:
            os.close(fd)


class _Tree:
    """The walk through one tree."""

    def __init__(self, frames: FrameWriter, watch: Watch) -> None:
        self._frames = frames
        self._watch = watch
        self._levels: list[_Level] = []

    def send(self, fd: int, path: bytes, status: os.stat_result) -> None:
        """Send the directory behind *fd*, which is closed."""
        try:
            self._descend(fd, b"", path, status)
            while self._levels:
                level = self._levels[-1]
                entry = next(level.names, None)
                if entry is not None:
                    name = os.fsencode(entry.name)
                    self._send_entry(level, entry, name, level.path + b"/" + name)
                    continue
                self._frames.end()
                self._levels.pop().close()
        finally:
            for level in self._levels:
                level.close()

    def _send_entry(self, level: _Level, entry: os.DirEntry[str], name: bytes, path: bytes) -> None:
        try:
            if entry.is_symlink():
                self._send_link(level.fd, name)
            elif entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False):
                self._send_open(level.fd, name, path)
            else:
                self._skip(name, path)
        except FileNotFoundError:
            return
        except OSError as exc:
            # A link has just taken its place, or something has just taken a link's.
            if exc.errno == errno.ELOOP or (exc.errno == errno.EINVAL and entry.is_symlink()):
                self._skip(name, path)
                return
            _name(exc, path)
            raise

    def _send_link(self, directory: int, name: bytes) -> None:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        target = os.readlink(name, dir_fd=directory)
        self._watch.entered()
        self._frames.entry(Entry(LINK, name, 0o777, status.st_mtime_ns, target))

    def _send_open(self, directory: int, name: bytes, path: bytes) -> None:
        fd = os.open(name, _READ | os.O_NOFOLLOW, dir_fd=directory)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                if len(self._levels) >= MAX_DEPTH:
                    raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} directories in one another", path)
                inner, fd = fd, -1  # it is the level's
                self._descend(inner, name, path, status)
            elif stat.S_ISREG(status.st_mode):
                _send_file(fd, name, status, self._frames, self._watch)
            else:
                self._skip(name, path)
        finally:
            if fd >= 0:
                os.close(fd)

    def _descend(self, fd: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        """Send the head of a directory, and go on with what is in it; *fd* is the level's from now on."""
        try:
            names = os.scandir(fd)
        except BaseException:
            os.close(fd)
            raise
        self._levels.append(_Level(fd, names, names.close, path))
        self._watch.entered()
        self._frames.entry(Entry(DIRECTORY, name, stat.S_IMODE(status.st_mode), status.st_mtime_ns))

    def _skip(self, name: bytes, path: bytes) -> None:
        self._watch.skipped(path)
        self._frames.entry(Entry(SPECIAL, name, 0, 0))


def _send_file(fd: int, name: bytes, status: os.stat_result, frames: FrameWriter, watch: Watch) -> None:
    watch.entered()
    frames.entry(Entry(FILE, name, stat.S_IMODE(status.st_mode), status.st_mtime_ns))
    buffer = memoryview(bytearray(min(CHUNK, status.st_size or CHUNK)))
    size = status.st_size or UNSIZED
    sparse = 0 < status.st_blocks * 512 < status.st_size or (status.st_size and not status.st_blocks)
    position = 0
    while position < size:
        end = size
        if sparse:
            data = min(_next_data(fd, position), size)
            if data > position:
                frames.hole(data - position)
                watch.moved(data - position)
                position = data
                continue
            end = min(_next_hole(fd, position), size)
        while position < end:
            count = os.preadv(fd, [buffer[: end - position]], position)
            if not count:  # it has been truncated meanwhile, or says nothing of its size
                frames.end()
                return
            frames.data(buffer[:count])
            watch.moved(count)
            position += count
    frames.end()


def _next_data(fd: int, position: int) -> int:
    """Return where the next bytes are that are not a hole; a file system that can't tell has no holes."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as exc:
        return 2**63 - 1 if exc.errno == errno.ENXIO else position


def _next_hole(fd: int, position: int) -> int:
    try:
        return os.lseek(fd, position, os.SEEK_HOLE)
    except OSError:  # as above; or the file has been truncated, which reading will show
        return 2**63 - 1


def _name(exc: OSError, path: bytes) -> None:
    """Let an error say where; it may know the name in the directory, its descriptor, or nothing."""
    if not isinstance(exc.filename, bytes) or b"/" not in exc.filename:
        exc.filename = path


def _is_sendable(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
