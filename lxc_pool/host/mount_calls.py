"""The system calls of mounts that Python's standard library does not have; nothing more is imported than they need.

Source: open_tree(2), mount_setattr(2), move_mount(2), umount2(2), statx(2); numbers from Linux include/uapi.
"""

from __future__ import annotations

import ctypes
import os
import struct

RDONLY, NOSUID, NODEV = 1, 2, 4
"""Attributes of a mount, to `set_attributes` and to `mount`."""

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
REC, PRIVATE, SLAVE = 0x4000, 0x40000, 0x80000
DETACH = 2

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
"""The same on all architectures since they were added after the tables were unified."""

_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_MOUNT_ATTR_IDMAP = 0x00100000
_AT_EMPTY_PATH = 0x1000
_AT_FDCWD = -100
_STATX_MNT_ID = 0x1000

_STATX = struct.Struct("=I140xQ104x")
"""stx_mask and stx_mnt_id of a struct statx, which has 256 bytes."""

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def clone_tree(path: str | bytes = b"", directory: int = _AT_FDCWD) -> int:
    """Return a descriptor of a new mount, which is nowhere yet, of what is at *path*; of *directory* if that is empty.

    What is mounted below is not in it.

    Raises:
        OSError: The kernel refused.
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (0 if path else _AT_EMPTY_PATH)
    return _call(_OPEN_TREE, directory, os.fsencode(path), flags, path=path)


def set_attributes(tree: int, attributes: int = 0, *, propagation: int = 0, user_namespace: int | None = None) -> None:
    """Change a mount.

    Args:
        tree: Its descriptor.
        attributes: To be set: `RDONLY`, `NOSUID`, `NODEV`.
        propagation: `PRIVATE` or `SLAVE`; 0: as it is.
        user_namespace: A descriptor of the user namespace through whose ids it is seen from now on.

    Raises:
        OSError: The kernel or the file system can't.
    """
    if user_namespace is not None:
        attributes |= _MOUNT_ATTR_IDMAP
    values = _MountAttr(attributes, 0, propagation, user_namespace or 0)
    _call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(values), ctypes.sizeof(values))


def attach_tree(tree: int, path: str | bytes = b"", directory: int = _AT_FDCWD) -> None:
    """Mount what `clone_tree` returned on *path*; on *directory* if that is empty.

    Raises:
        OSError: The kernel refused.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (0 if path else _MOVE_MOUNT_T_EMPTY_PATH)
    _call(_MOVE_MOUNT, tree, b"", directory, os.fsencode(path), flags, path=path)


def mount(kind: str, target: str | bytes, options: str = "", flags: int = 0) -> None:
    """Do what `mount(2)` does: mount a new file system, or change the propagation of an old one.

    Raises:
        OSError: The kernel refused.
    """
    _check(_libc.mount(kind.encode(), os.fsencode(target), kind.encode(), flags, options.encode()), target)


def unmount(target: str | bytes, flags: int = 0) -> None:
    """Take the topmost mount off *target*; with `DETACH`, it goes once nobody uses it any more.

    Raises:
        OSError: There is none, or the kernel refused.
    """
    _check(_libc.umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    """Give the calling thread namespaces of its own.

    Raises:
        OSError: The kernel refused.
    """
    _check(_libc.unshare(flags), "unshare")


def mount_id(descriptor: int) -> int:
    """Return the number, as in mountinfo, of the mount that a descriptor was opened on (Linux 5.8).

    Raises:
        OSError: The kernel can't say.
    """
    buffer = ctypes.create_string_buffer(_STATX.size)
    _check(_libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_MNT_ID, buffer), "statx")
    mask, number = _STATX.unpack(buffer.raw)
    if not mask & _STATX_MNT_ID:
        raise OSError(38, "the kernel does not number mounts: Linux 5.8 does")
    return int(number)


def _call(number: int, *arguments: object, path: str | bytes | None = None) -> int:
    return _check(_libc.syscall(number, *arguments), path)


def _check(result: int, what: str | bytes | None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result
