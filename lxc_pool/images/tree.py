"""Measure, check and remove whole directory trees without ever following a link out of them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from lxc_pool.errors import ImageError

_MOUNTINFO = "/proc/self/mountinfo"


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """What a tree amounts to.

    Attributes:
        checksum: `sha256:` and 64 hexadecimal digits over the canonical walk.
        size: Bytes in regular files; a file with several names counts once.
    """

    checksum: str
    size: int


def measure(root: Path, read: Callable[[int], None] = lambda _size: None) -> Measure:
    """Walk the tree under *root* in the order of its names and sum it up.

    The checksum covers each path, type, mode, owner, content, link target and device number: not the times, and not
    which names share an inode.

    Args:
        root: The tree.
        read: Called after each file with the bytes so far, which come to the `size`.

    Raises:
        OSError: Something in it can't be read, or vanished meanwhile.
    """
    total, size, seen = hashlib.sha256(), 0, set()
    for path, relative in _walk(os.fsencode(root)):
        status = os.lstat(path)
        fields = [oct(status.st_mode).encode(), b"%d" % status.st_uid, b"%d" % status.st_gid, b""]
        if stat.S_ISREG(status.st_mode):
            fields[-1] = _content(path)
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                size += status.st_size
                read(size)
        elif stat.S_ISLNK(status.st_mode):
            fields[-1] = os.readlink(path)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            fields[-1] = b"%d" % status.st_rdev
        # None of the fields can hold a NUL, so no two trees are written the same.
        total.update(b"\0".join([relative, *fields]) + b"\0")
    return Measure(f"sha256:{total.hexdigest()}", size)


def is_directory(path: Path) -> bool:
    """Tell whether *path* is a directory itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def remove(root: Path) -> None:
    """Remove *root* with all that is under it; nothing to do if it is not there.

    Raises:
        ImageError: Something is mounted below it: removing would empty the mounted tree, too.
        OSError: It can't be removed.
    """
    mounts = _mounts_below(root)
    if mounts:
        raise ImageError(f"{root} has mounts in it ({', '.join(mounts)}); unmount them, then try again")
    try:
        shutil.rmtree(root)
    except FileNotFoundError:
        if os.path.lexists(root):
            raise


def _walk(root: bytes, relative: bytes = b".") -> Iterator[tuple[bytes, bytes]]:
    """Yield each path of the tree and its name relative to the root, parents first, in byte order."""
    yield root, relative
    if not stat.S_ISDIR(os.lstat(root).st_mode):
        return
    for name in sorted(os.listdir(root)):
        yield from _walk(os.path.join(root, name), os.path.join(relative, name))


def _content(path: bytes) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()


def _mounts_below(root: Path) -> list[str]:
    """Return the mount points at or below *root* in this process's mount namespace.

    Source: proc_pid_mountinfo(5): the fifth field, with blanks written in octal.
    """
    real = os.path.realpath(root)
    points = []
    with open(_MOUNTINFO, encoding="utf-8", errors="surrogateescape") as mountinfo:
        for line in mountinfo:
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ", 5)[4])
            if point == real or point.startswith(real + "/"):
                points.append(point)
    return points
