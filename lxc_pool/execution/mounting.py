"""Mounts into a running container: what is done outside, before it is entered, and what inside.

```
 host's mount namespace   seal ─ clone_tree ─ caller's ids, nosuid, nodev, ro ─ put_in_scratch
                            └─ fork: user namespace ─ take_locked_copy ─► tree
 container                attach ─ tree on its place
```

**Why twice.** The copy is what locks it, see `mount_lock`: not even root of a privileged container loosens it.

**Whose files.** The files are seen through that user namespace. It knows of the host's ids the caller's uid and gid
alone, as root of the container; all other owners are nobody, and nobody in the container has any power over their files
(Linux fs/inode.c, capable_wrt_inode_uidgid). It is made inside the container's: a mount may keep it (Linux before 6.2),
and it then counts among those that the container may have, so that mounts can't use up the host's.

What is mounted here is in namespaces of this process and of its child, and ends with them: nothing can be left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from lxc_pool.execution import namespaces, trees
from lxc_pool.host import mount_calls, mount_lock

TIMEOUT = 20
"""Seconds that all of it may take. A guess: it takes 3 ms; a file system that a user serves can hang."""

_MADE, _GO, _TREE, _FAILED = b"m", b"g", b"t", b"f"


class Owner(NamedTuple):
    """A uid and a gid, as the host numbers them."""

    uid: int
    gid: int


class Refusal(Exception):
    """It can't be mounted; the arguments are an errno, 0 if it is the caller's argument, and the words."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)
        self.number = number
        self.text = text


def limit_time() -> None:
    """End this process if it takes longer than `TIMEOUT`."""
    signal.alarm(TIMEOUT)


def seal(source: int, *, readonly: bool, caller: Owner, container: int | None) -> int:
    """Return a descriptor of a locked mount of what *source* was opened on; this process's mount namespace is changed.

    Args:
        source: The caller's descriptor (O_PATH).
        readonly: Whether nothing may be written by way of it.
        caller: Whose files are the container's root's.
        container: A pidfd of its init, if it has a user namespace of its own.

    Raises:
        Refusal: It is not what can be mounted, or where it could be.
        OSError: The kernel refused something that it does not refuse else.
    """
    mode = os.fstat(source).st_mode
    check_type(mode)
    tree, file_system = _clone(source)
    mount_lock.leave_hosts_mounts()
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        ours.close()
        _lock(its, caller, container)
    its.close()
    try:
        with ours:
            _receive(ours, _MADE)
            _see_through(tree, f"/proc/{pid}/ns/user", file_system, readonly=readonly)
            mount_lock.put_in_scratch(tree, directory=stat.S_ISDIR(mode))
            ours.send(_GO, socket.MSG_NOSIGNAL)
            (locked,) = _receive(ours, _TREE)
            return locked
    finally:
        os.close(tree)
        os.waitpid(pid, 0)  # once our end is closed, it ends


def check_type(mode: int) -> None:
    """Refuse what is neither a directory nor a regular file.

    Raises:
        Refusal: It is not.
    """
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        kinds = {
            stat.S_IFCHR: "a character device",
            stat.S_IFBLK: "a block device",
            stat.S_IFIFO: "a fifo",
            stat.S_IFSOCK: "a socket",
            stat.S_IFLNK: "a symbolic link",
        }
        what = kinds.get(stat.S_IFMT(mode), "something else")
        raise Refusal(0, f"only directories and regular files can be mounted, and this is {what}")


def attach(tree: int, destination: bytes) -> None:
    """Mount *tree* on *destination*, which is made if it is missing, its directories too; from inside the container.

    Raises:
        OSError: It can't be; `filename` is *destination*.
        ValueError: It is the container's root directory.
    """
    directory = stat.S_ISDIR(os.fstat(tree).st_mode)
    with _about(destination):
        place = _find_or_make(destination, directory=directory)
        try:
            status = os.fstat(place)
            if os.path.samestat(status, os.stat(b"/")):
                raise ValueError("nothing can be mounted on the container's root directory: name one below it")
            if stat.S_ISDIR(status.st_mode) is not directory:
                if directory:
                    raise NotADirectoryError(errno.ENOTDIR, "a directory can't be mounted on what is none")
                raise IsADirectoryError(errno.EISDIR, "a file can't be mounted on a directory: name the file itself")
            mount_calls.attach_tree(tree, directory=place)
        finally:
            os.close(place)
        # Where it has been mounted on a shared mount, as systemd's root directory is, it has become one.
        mount_calls.set_attributes(tree, propagation=mount_calls.PRIVATE)


def detach(mountinfo: bytes, destination: bytes) -> None:
    """Take away the topmost mount on *destination*, if it is one of `attach`; from inside the container.

    Args:
        mountinfo: The container's mounts: the text of its init's /proc/PID/mountinfo.
        destination: Where it is.

    Raises:
        OSError: It can't be; `filename` is *destination*. EBUSY: something inside uses it.
        ValueError: There is no mount, or not one of ours.
    """
    with _about(destination):
        place = os.open(destination, os.O_PATH | os.O_CLOEXEC)
        try:
            number = mount_calls.mount_id(place)
            is_root = os.path.samestat(os.fstat(place), os.stat(b"/"))
        finally:
            os.close(place)  # it would make the mount busy
        line = _line(mountinfo, number)
        # Nothing else in a container is: what is mounted there at its start is the image, and the kernel's own.
        if is_root or line is None or b"idmapped" not in line[5].split(b","):
            raise ValueError(f"nothing that mount() has mounted is at {os.fsdecode(destination)!r}")
        try:
            mount_calls.unmount(destination)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise OSError(
                    errno.EBUSY, "a process in the container has a file open there, or works there: end it first"
                ) from None
            if exc.errno == errno.EINVAL:
                raise ValueError(
                    f"{os.fsdecode(destination)!r} is not the place of a mount itself, or is one of the profile's, "
                    "which stay"
                ) from None
            raise


def _clone(source: int) -> tuple[int, str]:
    """Return a mount of the caller's directory or file, and the type of its file system."""
    with open("/proc/self/mountinfo", "rb") as file:
        line = _line(file.read(), mount_calls.mount_id(source))
    if line is None:
        raise Refusal(
            errno.EXDEV,
            "it is in a mount namespace that is not the service's, as those of containers and sandboxes are, or in no "
            "file system at all: copy it with push()",
        )
    try:
        return mount_calls.clone_tree(directory=source), os.fsdecode(line[line.index(b"-") + 1])
    except OSError as exc:
        text = f"the kernel does not let it be mounted a second time: {exc.strerror}"
        raise Refusal(exc.errno or errno.EINVAL, text) from None


def _see_through(tree: int, user_namespace: str, file_system: str, *, readonly: bool) -> None:
    attributes = mount_calls.NOSUID | mount_calls.NODEV | (mount_calls.RDONLY if readonly else 0)
    descriptor = os.open(user_namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mount_calls.set_attributes(tree, attributes, propagation=mount_calls.PRIVATE, user_namespace=descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP):
            raise
        # One that is seen through other ids already is refused, too: EPERM.
        raise Refusal(
            errno.EOPNOTSUPP,
            f"it is on a file system that can't be mounted with other owners ({file_system}), as ext4, xfs, "
            "btrfs and (since Linux 6.3) tmpfs can: copy it with push()",
        ) from None
    finally:
        os.close(descriptor)


def _lock(
    parent: socket.socket, caller: Owner, container: int | None
) -> NoReturn:  # pragma: no cover - a fork that can't be recorded
    """Be the child: own the user namespace, and send a copy of what is mounted in scratch, locked by being copied."""
    try:
        signal.alarm(TIMEOUT)  # it is not inherited
        try:
            _make_user_namespace(caller, container)
            namespaces.die_with_parent(signal.SIGKILL)  # a change of ids clears it
            parent.send(_MADE, socket.MSG_NOSIGNAL)
            _receive(parent, _GO)
            socket.send_fds(parent, [_TREE], [mount_lock.take_locked_copy()])
        except OSError as exc:
            parent.send(_FAILED + str(exc.errno or 0).encode(), socket.MSG_NOSIGNAL)
    finally:
        os._exit(0)


def _make_user_namespace(caller: Owner, container: int | None) -> None:  # pragma: no cover - as above
    """Enter a new one in the container's, in which that one's root is the caller, and nobody else is anybody.

    Who makes one may map just itself, without anybody's help (user_namespaces(7)).
    """
    if container is not None:
        namespaces.setns(container, namespaces.CLONE_NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    mount_calls.unshare(mount_calls.CLONE_NEWUSER)
    # Else these files are the host's root's, who this process is no more; those who are the same see no pid of it.
    namespaces.set_dumpable()
    # In bytes: a codec could not be loaded any more, nor anything else that only root of the host may read.
    for name, text in (
        ("setgroups", b"deny"),
        ("uid_map", b"%d 0 1" % caller.uid),
        ("gid_map", b"%d 0 1" % caller.gid),
    ):
        with open(f"/proc/self/{name}", "wb", buffering=0) as file:
            file.write(text)
    namespaces.set_undumpable()


def _receive(sock: socket.socket, expected: bytes) -> list[int]:
    """Take the other process's word, which has to be *expected*, and the descriptor beside it."""
    word, fds, _, _ = socket.recv_fds(sock, 16, 1, socket.MSG_CMSG_CLOEXEC)
    if word == expected:
        return fds
    if word[:1] != _FAILED:
        raise Refusal(errno.EIO, "the process that prepares it was killed: has the container no memory left?")
    number = int(word[1:])
    raise OSError(number, os.strerror(number))


def _find_or_make(destination: bytes, *, directory: bool) -> int:
    """Open *destination*; missing directories, and in the end it itself, are made."""
    with contextlib.suppress(FileNotFoundError):
        return os.open(destination, os.O_PATH | os.O_CLOEXEC)
    destination = destination.rstrip(b"/")
    if os.path.basename(destination) in (b".", b".."):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    place = trees.find_place(destination, b"", parents=True)
    try:
        if directory:
            os.mkdir(place.name, 0o755, dir_fd=place.directory)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(place.name, flags, 0o644, dir_fd=place.directory))
        return os.open(place.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.directory)
    finally:
        os.close(place.directory)


@contextlib.contextmanager
def _about(destination: bytes) -> Iterator[None]:
    """Let every error name *destination*."""
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, destination) from None


def _line(mountinfo: bytes, number: int) -> list[bytes] | None:
    """Return the fields of the mount *number*; None if it is not in *mountinfo*.

    Only blanks and newlines separate: in a mount point, which a user may have named, just those are escaped (proc(5)).
    """
    for line in mountinfo.split(b"\n"):
        fields = line.split(b" ")
        if fields[0] == b"%d" % number:
            return fields
    return None
