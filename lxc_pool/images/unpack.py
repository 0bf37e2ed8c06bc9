"""Write foreign files into a root file system, so that none ends up, or changes anything, outside of it.

Every path is walked one component at a time from an open directory, and a component that is a link ends it: what an
earlier file of the same source has made never leads a later one astray. Device nodes are never made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from lxc_pool.errors import ImageError
from lxc_pool.images.program import check_room

_MOST_DEPTH = 256
"""Directories in each other. A guess: Debian has 12, and what walks a tree afterwards may be recursive."""

_MOST_ENTRIES = 5_000_000
"""Files of one image. A guess: Debian has 10 000."""

_ENTRY_SIZE = 4096
"""Bytes that an entry counts beside its content: about an inode and a name, or a directory."""

_CHUNK = 1 << 20
_LOOK_EVERY = 64 << 20
"""Bytes written between two looks at the disk: others write to it as well."""

_LATEST = 1 << 33
"""Seconds since the epoch: later times are not kept. The year 2242, which every file system takes."""

_NO_ID = 2**32 - 1
"""chown(2) takes it for "leave it as it is"."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """What a file has beside its content.

    Attributes:
        mode: Permissions, setuid and the like among them; the type is not looked at.
        mtime: Seconds since the epoch.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: float = 0.0


class Unpacker:
    """Fills one directory, which nobody else changes meanwhile. Use it in a `with`.

    All paths are bytes and relative to the directory; a "./" before them does not matter. What is there already is
    replaced, but a directory only by a directory.

    Attributes:
        notes: What was left out, in words, with how often.
    """

    def __init__(self, root: Path) -> None:
        self.notes: dict[str, int] = {}
        self._path = root
        self._root = -1
        self._parent: tuple[tuple[bytes, ...], int] = ((), -1)
        self._times: list[tuple[bytes, float]] = []
        self._entries = 0
        self._budget = 0
        self._until_look = 0

    def __enter__(self) -> Self:
        self._root = os.open(self._path, _DIRECTORY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        os.close(self._root)

    def directory(self, path: bytes, attributes: Attributes) -> None:
        """Make a directory, or give an existing one other attributes; the root's own stay as they are.

        Raises:
            ImageError: The path is not acceptable, something else is there, or the disk is full.
        """
        with self._at(path) as (parent, name):
            if not name:
                return
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                self._own(descriptor, attributes)
                os.fchmod(descriptor, attributes.mode & 0o7777)
            finally:
                os.close(descriptor)
            self._times.append((path, attributes.mtime))

    def file(self, path: bytes, attributes: Attributes, content: BinaryIO, size: int) -> None:
        """Make a regular file with the next *size* bytes of *content*.

        Raises:
            ImageError: As for `directory`; or the content is shorter.
        """
        with self._at(path) as (parent, name):
            if size > self._room():
                raise ImageError(f"{_show(path)} has {size >> 20} MiB, more than the disk of {self._path} has left")
            self._clear(parent, name)
            descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
            with open(descriptor, "wb", buffering=0) as file:
                left = size
                while left:
                    chunk = content.read(min(_CHUNK, left))
                    if not chunk:
                        raise ImageError(f"{_show(path)} is cut short: {left} of its {size} bytes are missing")
                    self._spend(len(chunk))
                    left -= len(chunk)
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                self._own(descriptor, attributes)
                os.fchmod(descriptor, attributes.mode & 0o7777)  # after chown, which takes setuid away
                os.utime(descriptor, ns=_times(attributes.mtime))

    def symlink(self, path: bytes, target: bytes, attributes: Attributes) -> None:
        """Make a link to *target*, whatever that is: it is looked at in containers only.

        Raises:
            ImageError: As for `directory`.
        """
        with self._at(path) as (parent, name):
            self._clear(parent, name)
            os.symlink(target, name, dir_fd=parent)
            self._own_name(parent, name, attributes)

    def hard_link(self, path: bytes, target: bytes) -> None:
        """Give the file *target*, which was unpacked before, another name.

        Raises:
            ImageError: As for `directory`; or there is no such file or link.
        """
        wrong = ImageError(f"{_show(path)} is to be another name of {_show(target)}, which is no file of this image")
        with self._at(target, entries=0) as (parent, old):
            source = os.dup(parent)  # the next path may close it
        try:
            kind = os.lstat(old, dir_fd=source).st_mode if old else 0
            if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
                raise wrong
            if _components(path) == _components(target):
                return
            with self._at(path) as (parent, name):
                self._clear(parent, name)
                os.link(old, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise wrong from None
        finally:
            os.close(source)

    def fifo(self, path: bytes, attributes: Attributes) -> None:
        """Make a named pipe.

        Raises:
            ImageError: As for `directory`.
        """
        with self._at(path) as (parent, name):
            self._clear(parent, name)
            os.mkfifo(name, 0o600, dir_fd=parent)
            self._own_name(parent, name, attributes)
            # Nobody else is in this directory, and it was a pipe a moment ago: no link that chmod could follow.
            os.chmod(name, attributes.mode & 0o7777, dir_fd=parent)

    def leave_out(self, what: str) -> None:
        """Take note of something that is not made."""
        self.notes[what] = self.notes.get(what, 0) + 1

    def finish(self) -> None:
        """Set the times of directories, which everything made in them has changed."""
        for path, mtime in self._times:
            with self._at(path, entries=0) as (parent, name):
                os.utime(name, ns=_times(mtime), dir_fd=parent, follow_symlinks=False)

    @contextlib.contextmanager
    def _at(self, path: bytes, entries: int = 1) -> Iterator[tuple[int, bytes]]:
        """Open the directory of *path*, missing ones made; yield it and the last component, empty for the root."""
        components = _components(path)
        self._entries += entries
        if self._entries > _MOST_ENTRIES:
            raise ImageError(f"there are more than {_MOST_ENTRIES} files")
        self._spend(entries * _ENTRY_SIZE)
        try:
            if components:
                yield self._open(components[:-1]), components[-1]
            else:
                yield self._root, b""
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise ImageError(f"{_show(path)} goes through, or replaces, something that is no directory") from error
            raise ImageError(f"{_show(path)}: {error.strerror}") from error

    def _open(self, components: tuple[bytes, ...]) -> int:
        """Return the directory; it stays open until another one is asked for."""
        if self._parent[1] >= 0 and self._parent[0] == components:
            return self._parent[1]
        descriptor = os.dup(self._root)
        try:
            for name in components:
                try:
                    inner = os.open(name, _DIRECTORY, dir_fd=descriptor)
                except FileNotFoundError:
                    os.mkdir(name, 0o755, dir_fd=descriptor)
                    inner = os.open(name, _DIRECTORY, dir_fd=descriptor)
                    os.fchmod(inner, 0o755)  # whatever the umask
                os.close(descriptor)
                descriptor = inner
        except BaseException:
            os.close(descriptor)
            raise
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = (components, descriptor)
        return descriptor

    def _clear(self, parent: int, name: bytes) -> None:
        """Remove what has the name, if it is no directory."""
        if not name:
            raise ImageError("the root of the image is to be something other than a directory")
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except IsADirectoryError as error:
            raise ImageError(f"{_show(name)} replaces a directory") from error

    def _own(self, descriptor: int, attributes: Attributes) -> None:
        os.fchown(descriptor, *_ids(attributes))

    def _own_name(self, parent: int, name: bytes, attributes: Attributes) -> None:
        uid, gid = _ids(attributes)
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=_times(attributes.mtime), dir_fd=parent, follow_symlinks=False)

    def _room(self) -> int:
        if self._until_look <= 0:
            self._budget = check_room(self._path)
            self._until_look = _LOOK_EVERY
        return self._budget

    def _spend(self, size: int) -> None:
        if size > self._room():
            raise ImageError(f"the disk of {self._path} has no room for all of it")
        self._budget -= size
        self._until_look -= size


def _components(path: bytes) -> tuple[bytes, ...]:
    """Split *path* and check it.

    Raises:
        ImageError: It is absolute, goes up, has a NUL, or is too deep or too long.
    """
    if path.startswith(b"/"):
        raise ImageError(f"{_show(path)} is absolute")
    components = tuple(part for part in path.split(b"/") if part not in (b"", b"."))
    if b".." in components:
        raise ImageError(f"{_show(path)} goes up with '..'")
    if b"\0" in path:
        raise ImageError(f"{_show(path)} has a NUL in it")
    if len(components) > _MOST_DEPTH or len(path) > 4000:
        raise ImageError(f"{_show(path[:80])}… is deeper than {_MOST_DEPTH} directories, or too long")
    return components


def _ids(attributes: Attributes) -> tuple[int, int]:
    for number in (attributes.uid, attributes.gid):
        if not 0 <= number < _NO_ID:
            raise ImageError(f"{number} is no user or group id")
    return attributes.uid, attributes.gid


def _times(mtime: float) -> tuple[int, int]:
    """Return access and modification time in ns; times that are none are kept as near as can be."""
    nanoseconds = int(min(max(mtime, 0.0), _LATEST) * 1e9) if mtime == mtime else 0  # noqa: PLR0124  # NaN is not
    return nanoseconds, nanoseconds


def _show(path: bytes) -> str:
    return repr(os.fsdecode(path))
