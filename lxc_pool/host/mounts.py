"""Mount calls that Python's standard library does not have.

Source: open_tree(2), mount_setattr(2), move_mount(2), umount2(2); numbers from Linux include/uapi.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
"""System calls; the same on all architectures since they were added after the tables were unified."""

_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_EMPTY_PATH = 0x1000
_AT_FDCWD = -100
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_MOUNT_ATTR_IDMAP = 0x00100000
_MNT_DETACH = 2
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
MS_NODEV = 4
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def enter_private_namespace() -> None:
    """Give the calling thread a mount namespace of its own: what it mounts, nobody else sees; what others do, it does.

    Raises:
        OSError: The kernel refused.
    """
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None), "mount")


def mount_idmapped(source: Path, target: Path, user_namespace: int) -> None:
    """Mount *source* at *target*, read-only and seen through the ids of a user namespace.

    Raises:
        OSError: The kernel or the file system can't (Linux 5.12, and 5.19 under an overlay).
    """
    attributes = _MountAttr(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    tree = _call(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC, path=source)
    try:
        _call(
            _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), ctypes.sizeof(attributes), path=source
        )
        _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH, path=target)
    finally:
        os.close(tree)


def mount(kind: str, target: Path, options: str, flags: int = 0) -> None:
    """Mount a new file system at *target*.

    Raises:
        OSError: The kernel refused.
    """
    _check(_libc.mount(kind.encode(), os.fsencode(target), kind.encode(), flags, options.encode()), f"{kind} {target}")


@contextmanager
def mounted(kind: str, target: Path, options: str) -> Iterator[None]:
    """Have a new file system at *target*, and whatever is mounted in it meanwhile, for the time of a `with`.

    Raises:
        OSError: The kernel refused.
    """
    mount(kind, target, options)
    try:
        yield
    finally:
        unmount(target)


def unmount(target: Path) -> None:
    """Take the topmost mount off *target*, and what is mounted in it; they go once nobody uses them any more.

    Raises:
        OSError: There is none, or the kernel refused.
    """
    _check(_libc.umount2(os.fsencode(target), _MNT_DETACH), f"umount {target}")


def make_user_namespace(first: int, size: int) -> int:
    """Return a descriptor of a new user namespace that maps 0 to *first*, and so on; it lives as long as that is open.

    To be called from a process of one thread: it forks.

    Raises:
        OSError: The kernel refused.
    """
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover  # a process without anything of ours, that coverage can't see
        os.close(done_write)
        os.write(ready_write, bytes([_libc.unshare(_CLONE_NEWUSER) & 0xFF]))
        os.read(done_read, 1)
        os._exit(0)
    os.close(done_read)
    try:
        if os.read(ready_read, 1) != b"\0":
            raise OSError(errno.EPERM, "can't make a user namespace")
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{kind}").write_text(f"0 {first} {size}", encoding="ascii")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (ready_read, ready_write, done_write):
            os.close(descriptor)
        os.waitpid(pid, 0)


def _call(number: int, *arguments: object, path: Path) -> int:
    return _check(_libc.syscall(number, *arguments), str(path))


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
