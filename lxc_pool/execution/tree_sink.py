"""Making a file or tree of the frames that come.

Something new is made under another name beside its place, and renamed once all of it is there; where a tree is merged
into one that exists, each file is. Every name is created relative to the descriptor of its directory, with O_EXCL
(or mkdir, symlink, rename, which follow none), so that neither what comes, nor who plants links meanwhile,
leads anything elsewhere. Permissions, owner and time are set by descriptor, and those of a directory at last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from lxc_pool.execution import trees
from lxc_pool.execution.frames import (
    DATA,
    DIRECTORY,
    DONE,
    END,
    FAILED,
    FILE,
    HOLE,
    LINK,
    SPECIAL,
    Entry,
    FrameError,
    FrameReader,
    read_entry,
    read_failure,
    read_length,
)

PERMISSIONS = 0o777
"""What is kept of a file's mode. Set-id bits are not: they mean its owner, who is another one here (as cp(1))."""

STICKY = 0o1000
"""What is kept of a directory's besides."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC  # O_EXCL follows no link either, open(2)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LATEST = 2**63 - 1


class Watch(Protocol):
    """Who counts, and may put an end to it by raising."""

    def moved(self, count: int) -> None:
        """*count* bytes more of a file, holes included, are about to be written."""
        ...

    def entered(self) -> None:
        """One file, directory or link more is about to be made."""
        ...

    def skipped(self, path: bytes) -> None:
        """A device, fifo or socket at *path*, relative to the tree, did not come."""
        ...


class Policy(NamedTuple):
    """How things are made.

    Attributes:
        owner: The uid and gid that they get; None: this process's.
        floor: Permissions that every new directory has at least.
        merge: Whether a directory may exist already.
        anonymous: Whether a single file is made without a name at first, where the file system can: then even SIGKILL
            leaves nothing. It needs /proc.
    """

    owner: tuple[int, int] | None = None
    floor: int = 0
    merge: bool = False
    anonymous: bool = False


class _Level(NamedTuple):
    """A directory that is being filled; *entry* is None for one that existed."""

    fd: int
    path: bytes
    entry: Entry | None
    existed: bool


class TreeSink:
    """Make what comes."""

    def __init__(self, place: trees.Place, frames: FrameReader, policy: Policy, watch: Watch) -> None:
        """Make it at *place* of *frames*."""
        self._place = place
        self._frames = frames
        self._policy = policy
        self._watch = watch
        self._levels: list[_Level] = []

    def receive(self) -> None:
        """Do it, or leave nothing of it.

        Raises:
            FrameError, StreamEnd: The stream is not as it should be.
            OSError, ValueError: The other side has failed.
            FileExistsError, IsADirectoryError, NotADirectoryError: What is there can't be replaced by what comes.
            OSError: It can't be made.
        """
        kind, body = self._frames.next()
        if kind == FAILED:
            raise read_failure(body)
        if kind not in (FILE, DIRECTORY):
            raise FrameError(f"neither a file nor a directory comes first, but {kind}")
        entry = read_entry(kind, body, root=True)
        self._watch.entered()
        try:
            if kind == FILE:
                self._receive_root_file(entry)
            else:
                self._receive_root_directory(entry)
        except OSError as exc:
            self._name(exc, self._place.name, self._place.path)
            raise

    # --- the root -----------------------------------------------------------------------------------------------------

    def _receive_root_file(self, entry: Entry) -> None:
        _require_replaceable(self._place, self._place.path)
        directory = self._place.directory
        temporary = trees.temporary_name()
        fd = self._anonymous_file() if self._policy.anonymous else -1
        named = fd < 0
        if named:
            fd = os.open(temporary, _NEW, 0o600, dir_fd=directory)
        try:
            with _closing(fd):
                self._fill(fd, entry)
                self._require_done()
                if not named:
                    source = f"/proc/self/fd/{fd}".encode()
                    os.link(source, temporary, dst_dir_fd=directory, follow_symlinks=True)
                    named = True
            _rename(directory, temporary, self._place.name, self._place.path)
        except BaseException:
            if named:
                trees.remove(directory, temporary)
            raise

    def _anonymous_file(self) -> int:
        """Return a file that has no name yet; -1 if there is no such thing here."""
        try:
            fd = os.open(b".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self._place.directory)
        except OSError:
            return -1
        if not os.path.exists(f"/proc/self/fd/{fd}"):
            os.close(fd)
            return -1
        return fd

    def _receive_root_directory(self, entry: Entry) -> None:
        place = self._place
        there = place.type()
        if there == stat.S_IFDIR and not self._policy.merge:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place.path)
        if there:  # a file or link is refused here
            fd = os.open(place.name, _DIRECTORY, dir_fd=place.directory)
            self._levels.append(_Level(fd, b"", None, existed=True))
            self._receive_entries()
            self._require_done()
            return
        temporary = trees.temporary_name()
        try:
            self._make_directory(place.directory, temporary, b"", entry)
            self._receive_entries()
            self._require_done()
            _rename(place.directory, temporary, place.name, place.path)
        except BaseException:
            trees.remove(place.directory, temporary)
            raise

    def _require_done(self) -> None:
        kind, body = self._frames.next()
        if kind == FAILED:
            raise read_failure(body)
        if kind != DONE:
            raise FrameError(f"more comes after the end: {kind}")

    # --- what is in a directory ---------------------------------------------------------------------------------------

    def _receive_entries(self) -> None:
        """Fill the directory that is open, until it ends."""
        try:
            while self._levels:
                kind, body = self._frames.next()
                if kind == END:
                    self._finish_directory()
                elif kind == FAILED:
                    raise read_failure(body)
                elif kind in (FILE, DIRECTORY, LINK, SPECIAL):
                    self._receive_entry(read_entry(kind, body, root=False))
                else:
                    raise FrameError(f"a frame of kind {kind} in a directory")
        finally:
            while self._levels:
                os.close(self._levels.pop().fd)

    def _receive_entry(self, entry: Entry) -> None:
        level = self._levels[-1]
        path = level.path + b"/" + entry.name
        self._watch.entered()
        try:
            if entry.kind == FILE:
                self._receive_file(level, entry, path)
            elif entry.kind == DIRECTORY:
                self._receive_directory(level, entry, path)
            elif entry.kind == LINK:
                self._receive_link(level, entry, path)
            else:
                self._watch.skipped(path)
        except OSError as exc:
            self._name(exc, entry.name, self._place.path + path)
            raise

    @staticmethod
    def _name(exc: OSError, name: bytes, path: bytes) -> None:
        """Let an error of ours say where; what the other side, or the watch, has failed at is named already."""
        if exc.filename in (None, name) or (isinstance(exc.filename, bytes) and trees.is_temporary(exc.filename)):
            exc.filename = path
        if exc.filename2 is not None:
            del exc.filename2

    def _receive_file(self, level: _Level, entry: Entry, path: bytes) -> None:
        name = entry.name
        if level.existed:
            _require_replaceable(trees.Place(level.fd, name, path), self._place.path + path)
            name = trees.temporary_name()
        fd = os.open(name, _NEW, 0o600, dir_fd=level.fd)
        try:
            with _closing(fd):
                self._fill(fd, entry)
            if level.existed:
                _rename(level.fd, name, entry.name, self._place.path + path)
        except BaseException:
            if level.existed:  # else the whole tree is removed
                trees.remove(level.fd, name)
            raise

    def _receive_directory(self, level: _Level, entry: Entry, path: bytes) -> None:
        if len(self._levels) >= trees.MAX_DEPTH:
            raise FrameError(f"more than {trees.MAX_DEPTH} directories in one another")
        if level.existed:
            try:
                fd = os.open(entry.name, _DIRECTORY, dir_fd=level.fd)
            except FileNotFoundError:
                pass
            else:
                self._levels.append(_Level(fd, path, None, existed=True))
                return
        self._make_directory(level.fd, entry.name, path, entry)

    def _make_directory(self, above: int, name: bytes, path: bytes, entry: Entry) -> None:
        os.mkdir(name, 0o700, dir_fd=above)
        fd = os.open(name, _DIRECTORY, dir_fd=above)
        self._levels.append(_Level(fd, path, entry, existed=False))

    def _receive_link(self, level: _Level, entry: Entry, path: bytes) -> None:
        name = entry.name
        if level.existed:
            _require_replaceable(trees.Place(level.fd, name, path), self._place.path + path)
            name = trees.temporary_name()
        os.symlink(entry.target, name, dir_fd=level.fd)
        try:
            if self._policy.owner is not None:
                os.chown(name, *self._policy.owner, dir_fd=level.fd, follow_symlinks=False)
            with contextlib.suppress(OSError):  # a time that the file system can't hold
                os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=level.fd, follow_symlinks=False)
            if level.existed:
                _rename(level.fd, name, entry.name, self._place.path + path)
        except BaseException:
            if level.existed:
                trees.remove(level.fd, name)
            raise

    def _finish_directory(self) -> None:
        level = self._levels.pop()
        with _closing(level.fd):
            if level.entry is not None:
                mode = level.entry.mode & (PERMISSIONS | STICKY) | self._policy.floor
                self._dress(level.fd, level.entry, mode)

    # --- files --------------------------------------------------------------------------------------------------------

    def _fill(self, fd: int, entry: Entry) -> None:
        """Write a file until it ends, and give it its attributes."""
        position = 0
        hole = False
        while True:
            kind, body = self._frames.next()
            if kind == DATA:
                self._watch.moved(len(body))
                position = _grow(position, len(body))
                _write(fd, body)
                hole = False
            elif kind == HOLE:
                length = read_length(body)
                self._watch.moved(length)
                position = _grow(position, length)
                os.lseek(fd, position, os.SEEK_SET)
                hole = True
            elif kind == END:
                break
            elif kind == FAILED:
                raise read_failure(body)
            else:
                raise FrameError(f"a frame of kind {kind} in a file")
        if hole:
            os.ftruncate(fd, position)
        self._dress(fd, entry, entry.mode & PERMISSIONS)

    def _dress(self, fd: int, entry: Entry, mode: int) -> None:
        if self._policy.owner is not None:
            os.fchown(fd, *self._policy.owner)
        os.fchmod(fd, mode)
        with contextlib.suppress(OSError):  # a time that the file system can't hold
            os.utime(fd, ns=(entry.mtime, entry.mtime))


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _require_replaceable(place: trees.Place, path: bytes) -> None:
    if place.type() == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _rename(directory: int, old: bytes, new: bytes, path: bytes) -> None:
    try:
        trees.rename(directory, old, new)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from None


def _grow(position: int, count: int) -> int:
    if position + count > _LATEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return position + count


def _write(fd: int, data: memoryview) -> None:
    written = os.write(fd, data)
    while written < len(data):  # a signal, or a disk that is almost full
        written += os.write(fd, data[written:])
