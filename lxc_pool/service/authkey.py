"""The key that clients prove to know: a new one at each start, or an administrator's."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from lxc_pool.errors import ConfigError

LENGTH = 32
"""Bytes of a key; of a configured one, at least. Origin: the public contract."""

_MOST = 4096


def new() -> bytes:
    """Return a key that nobody has had before."""
    return secrets.token_bytes(LENGTH)


def read(path: Path) -> bytes:
    """Return the key that the administrator has put into a file.

    Raises:
        ConfigError: It can't be read, others may read or change it, or it is too short or too long.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"key_file: {path} can't be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"key_file: {path} is not a regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ConfigError(
                f"key_file: others have a hand in {path} (uid {status.st_uid}, mode "
                f"{stat.S_IMODE(status.st_mode):04o}): `chown {os.geteuid()} {path}; chmod 0600 {path}`; clients read "
                "the copy in the host dir"
            )
        key = os.read(descriptor, _MOST + 1)
    finally:
        os.close(descriptor)
    if not LENGTH <= len(key) <= _MOST:
        raise ConfigError(
            f"key_file: {path} has to hold {LENGTH} to {_MOST} bytes: `head -c {LENGTH} /dev/urandom > {path}`"
        )
    return key
