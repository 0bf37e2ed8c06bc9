"""Mounts for the making of containers, in a worker's mount namespace of its own; see `mount_calls`."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lxc_pool.host import mount_calls, mount_lock
from lxc_pool.host.mount_calls import CLONE_NEWNS, CLONE_NEWUSER, NODEV, RDONLY, REC, SLAVE


def enter_private_namespace() -> None:
    """Give the calling thread a mount namespace of its own: what it mounts, nobody else sees; what others do, it does.

    Raises:
        OSError: The kernel refused.
    """
    mount_calls.unshare(CLONE_NEWNS)
    mount_calls.mount("none", "/", flags=REC | SLAVE)


def mount_idmapped(source: Path, target: Path, user_namespace: int) -> None:
    """Mount *source* at *target*, read-only and seen through the ids of a user namespace.

    Raises:
        OSError: The kernel or the file system can't (Linux 5.12, and 5.19 under an overlay).
    """
    tree = mount_calls.clone_tree(os.fspath(source))
    try:
        mount_calls.set_attributes(tree, RDONLY | NODEV, user_namespace=user_namespace)
        mount_calls.attach_tree(tree, os.fspath(target))
    finally:
        os.close(tree)


def mount(kind: str, target: Path, options: str, flags: int = 0) -> None:
    """Mount a new file system at *target*.

    Raises:
        OSError: The kernel refused.
    """
    mount_calls.mount(kind, os.fspath(target), options, flags)


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


@contextmanager
def mounted_again(source: Path, target: Path) -> Iterator[None]:
    """Have the directory *source* at *target*, too, and whatever is mounted in it there, for the time of a `with`.

    Raises:
        OSError: The kernel refused.
    """
    tree = mount_calls.clone_tree(os.fspath(source))
    try:
        mount_calls.attach_tree(tree, os.fspath(target))
    finally:
        os.close(tree)
    try:
        yield
    finally:
        unmount(target)


def unmount(target: Path) -> None:
    """Take the topmost mount off *target*, and what is mounted in it; they go once nobody uses them any more.

    Raises:
        OSError: There is none, or the kernel refused.
    """
    mount_calls.unmount(os.fspath(target), mount_calls.DETACH)


def locked(tree: int, *, directory: bool) -> int:
    """Return a descriptor of a locked copy of the mount *tree*, of a *directory* or file; see `mount_lock`.

    To be called from a process of one thread: it forks.

    Raises:
        OSError: The kernel refused.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:  # pragma: no cover  # a process without anything of ours, that coverage can't see
        try:
            mount_lock.leave_hosts_mounts()
            mount_lock.put_in_scratch(tree, directory=directory)
            mount_calls.unshare(CLONE_NEWUSER)
            socket.send_fds(its, [b"x"], [mount_lock.take_locked_copy()])
        finally:
            os._exit(0)
    its.close()
    with ours:
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    os.waitpid(pid, 0)
    if not descriptors:
        raise OSError(errno.EPERM, "can't lock a mount by copying it into a user namespace")
    return descriptors[0]


def make_user_namespace(first: int, size: int, inside: tuple[int, int] = (0, 0)) -> int:
    """Return a descriptor of a new user namespace; it lives as long as that is open.

    To be called from a process of one thread: it forks.

    Args:
        first: The id outside that the first one inside is mapped to.
        size: How many are, one after the other.
        inside: The first uid and gid inside.

    Raises:
        OSError: The kernel refused.
    """
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover  # a process without anything of ours, that coverage can't see
        os.close(done_write)
        try:
            mount_calls.unshare(CLONE_NEWUSER)
            os.write(ready_write, b"\0")
            os.read(done_read, 1)
        finally:
            os._exit(0)
    os.close(done_read)
    os.close(ready_write)
    try:
        if os.read(ready_read, 1) != b"\0":
            raise OSError(errno.EPERM, "can't make a user namespace")
        for kind, begin in zip(("uid_map", "gid_map"), inside, strict=True):
            Path(f"/proc/{pid}/{kind}").write_text(f"{begin} {first} {size}", encoding="ascii")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (ready_read, done_write):
            os.close(descriptor)
        os.waitpid(pid, 0)
