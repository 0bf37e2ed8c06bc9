"""The kernel's project quotas: how much of a file system the files with one project id may take.

A directory's id, once marked as inherited, becomes that of whatever is made in it. Ids and limits can be changed from
the initial user namespace alone: not by root of a container that has one of its own.

The commands named after XFS serve every file system with quotas. Source: quotactl(2), Linux 6.1: fs/quota/quota.c,
fs/ioctl.c (fileattr_set_prepare), include/uapi/linux/{dqblk_xfs,fs}.h; quotactl_fd is Linux 5.14.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_QUOTACTL_FD = 443
"""The same on all architectures."""

_PROJECT = 2
_GET_QUOTA, _SET_LIMITS, _GET_STATE = 0x5803, 0x5804, 0x5805

_ACCOUNTED, _ENFORCED = 1 << 4, 1 << 5
"""Of project quotas, in the state's flags."""

_STATE = struct.Struct("@bH")
_STATE_ROOM = 256
"""Bytes; `struct fs_quota_stat` has 80, of which the flags are second."""

_RECORD = struct.Struct("@bbHIQQQQQQiiHHbbbbQQQiHh8x")
"""`struct fs_disk_quota`: version, flags, what is to be set, id, limits of blocks (hard, soft) and inodes, the counts
of both, and what is of no use here."""
_VERSION = 1
_SET_ALL = 0b1111
_BLOCK = 512
"""Bytes in a block of that structure, whatever the file system's are."""

_ATTRIBUTES = struct.Struct("@IIIII8x")
"""`struct fsxattr`: flags, two of no use here, the project id, another."""
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820
_INHERITED = 0x200

_NAMES, _PATHS = Path("/etc/projid"), Path("/etc/projects")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Quota:
    """What is written down about one project.

    Attributes:
        limit: Bytes that its files may take; 0: any number.
        inodes_limit: Files that it may have, of any kind; 0: any number.
        used: Bytes that they take.
        inodes: Files that it has.
    """

    limit: int
    inodes_limit: int
    used: int
    inodes: int

    @property
    def blank(self) -> bool:
        """Whether nobody has any use for it."""
        return self == Quota(0, 0, 0, 0)


def enforced(directory: int) -> bool:
    """Return whether limits of projects are in force on the file system that a descriptor is of."""
    room = ctypes.create_string_buffer(_STATE_ROOM)
    try:
        _quotactl(directory, _GET_STATE, 0, room)
    except OSError:
        return False  # it, or the kernel, has no quotas, or none of this kind
    flags = _STATE.unpack_from(room)[1]
    return bool(flags & _ACCOUNTED and flags & _ENFORCED)


def of_project(directory: int, project: int) -> Quota:
    """Return what the file system says of a project.

    Raises:
        OSError: It has no such quotas.
    """
    room = ctypes.create_string_buffer(_RECORD.size)
    try:
        _quotactl(directory, _GET_QUOTA, project, room)
    except FileNotFoundError:  # XFS; ext4 has a blank one for those that it does not know
        return Quota(0, 0, 0, 0)
    fields = _RECORD.unpack(room.raw)
    return Quota(fields[4] * _BLOCK, fields[6], fields[8] * _BLOCK, fields[9])


def limit(directory: int, project: int, size: int, inodes: int) -> None:
    """Limit what a project may take of a file system.

    Args:
        directory: A descriptor of anything on it.
        project: Its id.
        size: Bytes; 0: any number.
        inodes: Files of any kind; 0: any number.

    Raises:
        OSError: The kernel refused.
    """
    blocks = -(-size // _BLOCK)
    limits = (blocks, blocks, inodes, inodes, 0, 0)
    record = _RECORD.pack(_VERSION, 1 << (_PROJECT - 1), _SET_ALL, project, *limits, *([0] * 14))
    _quotactl(directory, _SET_LIMITS, project, ctypes.create_string_buffer(record, len(record)))


def mark(directory: int, project: int) -> None:
    """Give an empty directory a project id, which what is made in it inherits.

    Raises:
        OSError: The file system has no projects, or the kernel refused.
    """
    flags, extent, extents, _old, copied = _ATTRIBUTES.unpack(_attributes(directory))
    values = _ATTRIBUTES.pack(flags | _INHERITED, extent, extents, project, copied)
    fcntl.ioctl(directory, _SET_ATTRIBUTES, values)


def project_of(directory: int) -> int:
    """Return the project id of a file; 0: it has none.

    Raises:
        OSError: The file system has no projects.
    """
    return int(_ATTRIBUTES.unpack(_attributes(directory))[3])


def named(names: Path = _NAMES, paths: Path = _PATHS) -> Iterator[int]:
    """Go through the ids that the host's administrator has given to somebody. Source: projid(5), projects(5)."""
    yield from _numbers(names, field=1)
    yield from _numbers(paths, field=0)


def _numbers(file: Path, field: int) -> Iterable[int]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        fields = line.split("#")[0].split(":")
        if len(fields) > 1 and fields[field].strip().isdecimal():
            yield int(fields[field])


def _attributes(descriptor: int) -> bytes:
    return fcntl.ioctl(descriptor, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size))


def _quotactl(descriptor: int, command: int, project: int, room: ctypes.Array[ctypes.c_char]) -> None:
    whole = ctypes.c_uint(command << 8 | _PROJECT)
    if _libc.syscall(ctypes.c_long(_QUOTACTL_FD), ctypes.c_uint(descriptor), whole, ctypes.c_uint(project), room) < 0:
        number = ctypes.get_errno()
        if number == errno.ESRCH:  # quotas are off
            number = errno.ENOSYS
        raise OSError(number, f"quotactl {command:#x} of project {project}: {os.strerror(number)}")
