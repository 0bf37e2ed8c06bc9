"""Lock files that say whether, and which, service uses a directory; asking does not disturb whoever wants the lock.

Locks of the open file description, not flock(2): with that one, to find out whether a lock is held takes trying to
hold it, and a service that starts at just that moment would be told that another one runs. Source: fcntl(2),
F_OFD_SETLK.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("@hhqqi")
"""`struct flock`: type, whence, start, length (0: to the end), pid. Source: Linux include/uapi/asm-generic/fcntl.h."""


def take(descriptor: int) -> bool:
    """Hold the lock of an open file for as long as it stays open; return False if somebody else has it.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _padded(fcntl.F_WRLCK))
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the file system likes it
        return False
    return True


def is_held(path: Path) -> bool:
    """Return whether somebody holds the lock of the file *path*; False if there is no such file.

    Raises:
        OSError: It can't be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _padded(fcntl.F_WRLCK))
    finally:
        os.close(descriptor)
    return bool(_FLOCK.unpack_from(answer)[0] != fcntl.F_UNLCK)


def _padded(kind: int) -> bytes:
    """Return the structure with the padding at its end that C adds."""
    data = _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)
    return data + bytes(-len(data) % 8)
