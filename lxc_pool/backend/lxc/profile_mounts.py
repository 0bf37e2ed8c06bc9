"""What of the host each container of a profile has mounted, by its administrator's word.

It is put into the root file system before the container starts. The container's user namespace then locks all of it:
it can't be made writable, nor taken away. A privileged container has none, so there it is locked by hand, and may be
taken away.

A read-only one is as the host has it: whoever reads it is nobody there, and reads what everybody may. Of a writable
one, the owner of `host_path` is root in the container; all others are nobody (see `execution.mounting`). That must not
be root: a set-uid file, made there by anybody who may have such a container, would be root's on the host.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from lxc_pool.config import MountConfig
from lxc_pool.errors import StartFailed
from lxc_pool.host import mount_calls, mounts

_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def put(wanted: Sequence[MountConfig], rootfs: Path, owner: int, *, lock: bool) -> None:
    """Mount them; they go with what *rootfs* is mounted in.

    Args:
        wanted: Which.
        rootfs: The container's root file system, mounted, with nothing running in it.
        owner: The host's id of the container's root.
        lock: Whether they have to be locked here.

    Raises:
        StartFailed: One can't be mounted; the message says why.
    """
    for mount in wanted:
        try:
            _put(mount, rootfs, owner, lock=lock)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            hint = "; links of the image are not followed" if error.errno in (errno.ENOTDIR, errno.ELOOP) else ""
            raise StartFailed(
                f"the profile's mount of {mount.host_path} on {mount.dst} failed: {error.strerror}{where}{hint}"
            ) from error


def _put(mount: MountConfig, rootfs: Path, owner: int, *, lock: bool) -> None:
    opened: list[int] = []
    try:
        opened.append(source := os.open(mount.host_path, os.O_PATH | os.O_CLOEXEC))
        status = os.fstat(source)
        directory = stat.S_ISDIR(status.st_mode)
        if not directory and not stat.S_ISREG(status.st_mode):
            raise StartFailed(f"the profile's mount of {mount.host_path}: it is neither a directory nor a regular file")
        opened.append(tree := mount_calls.clone_tree(directory=source))
        attributes = mount_calls.NOSUID | mount_calls.NODEV
        if mount.readonly:
            mount_calls.set_attributes(tree, attributes | mount_calls.RDONLY, propagation=mount_calls.PRIVATE)
        else:
            opened.append(users := _owners_namespace(mount, status, owner))
            mount_calls.set_attributes(tree, attributes, propagation=mount_calls.PRIVATE, user_namespace=users)
        if lock:
            opened.append(tree := mounts.locked(tree, directory=directory))
        opened.append(place := _find_or_make(rootfs, mount.dst, owner, directory=directory))
        mount_calls.attach_tree(tree, directory=place)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _owners_namespace(mount: MountConfig, status: os.stat_result, owner: int) -> int:
    if status.st_uid == 0:
        raise StartFailed(
            f"the profile's mount of {mount.host_path} is writable and root's: code in containers could make root's "
            "set-uid programs there; chown it to a user made for it, or let it be read-only"
        )
    return mounts.make_user_namespace(owner, 1, (status.st_uid, status.st_gid))


def _find_or_make(rootfs: Path, path: str, owner: int, *, directory: bool) -> int:
    """Return a descriptor (O_PATH) of a place in a root file system; what is missing is made, for the container's root.

    No link of the image's is followed: it may lead to the host's files.
    """
    *parents, name = path.strip("/").split("/")
    above = os.open(rootfs, _STEP)
    try:
        for parent in parents:
            below = _step(parent, above, owner)
            os.close(above)
            above = below
        if directory:
            return _step(name, above, owner)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=above))
            os.chown(name, owner, owner, dir_fd=above, follow_symlinks=False)
        except FileExistsError:
            pass
        place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        if not stat.S_ISREG(os.fstat(place).st_mode):
            os.close(place)
            raise OSError(errno.EISDIR, "in the image that is no regular file", name)
        return place
    finally:
        os.close(above)


def _step(name: str, above: int, owner: int) -> int:
    try:
        os.mkdir(name, 0o755, dir_fd=above)
        os.chown(name, owner, owner, dir_fd=above, follow_symlinks=False)
    except FileExistsError:
        pass
    return os.open(name, _STEP, dir_fd=above)
