"""Tell a container whom to ask for names: an `/etc/resolv.conf` of its own, in place of whatever its image has."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def write(rootfs: Path, owner: int, resolvers: Sequence[str]) -> None:
    """Make `/etc/resolv.conf` a file that names *resolvers*, where the image has a link, a file or nothing.

    No link of the image's is followed: it may lead to the host's files. If its `/etc` is one, nothing is done.

    Args:
        rootfs: The container's root file system, mounted.
        owner: The host's id of the container's root.
        resolvers: Addresses; none is an empty file.

    Raises:
        OSError: The file can't be written.
    """
    with _opened(rootfs) as root, contextlib.suppress(NotADirectoryError):
        with contextlib.suppress(FileExistsError):
            os.mkdir("etc", 0o755, dir_fd=root)
            os.chown("etc", owner, owner, dir_fd=root, follow_symlinks=False)
        with _opened("etc", root) as etc:
            # By rename: what was there goes, link or not, and is not looked at.
            partial = f".resolv.conf.{secrets.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(partial, flags, 0o644, dir_fd=etc), "w", encoding="ascii") as file:
                os.fchown(file.fileno(), owner, owner)
                os.fchmod(file.fileno(), 0o644)
                file.writelines(f"nameserver {address}\n" for address in resolvers)
            os.rename(partial, "resolv.conf", src_dir_fd=etc, dst_dir_fd=etc)


@contextlib.contextmanager
def _opened(path: str | Path, directory: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, _DIRECTORY, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
