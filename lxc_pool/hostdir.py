"""The host dir: the directory where the service leaves its socket and key, and what each may look like."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lxc_pool.config import DEFAULT_HOST_DIR
from lxc_pool.errors import AccessDenied, HostDirError

HOST_DIR_VARIABLE = "LXC_POOL_HOST_DIR"
MAX_SOCKET_PATH = 107 - len(".new")
"""Bytes in the path of the socket, which is made under a longer name. Source: unix(7), sun_path."""

MAX_KEY = 4096


def default_host_dir() -> Path:
    """Return the directory that `$LXC_POOL_HOST_DIR` names, else `/run/lxc-pool`."""
    return Path(os.environ.get(HOST_DIR_VARIABLE) or DEFAULT_HOST_DIR)


def socket_path(host_dir: Path) -> Path:
    """Return where the service of *host_dir* listens.

    Raises:
        HostDirError: The path is longer than a Unix socket's may be.
    """
    path = host_dir / "pool.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise HostDirError(f"the path {path} is longer than {MAX_SOCKET_PATH} bytes; choose a shorter host dir")
    return path


def key_path(host_dir: Path) -> Path:
    """Return where the service of *host_dir* keeps its key."""
    return host_dir / "authkey"


def left_by_a_killed_service(host_dir: Path) -> tuple[Path, ...]:
    """Return the paths of what a service has in *host_dir* while it runs, whether or not there is something.

    Its socket and key; both half made; and the socket of the process that its workers are forked from.
    """
    names = ("pool.sock", "pool.sock.new", "authkey")
    return (*(host_dir / name for name in names), *sorted(host_dir.glob(".authkey.*")), *fork_sockets(host_dir))


def fork_sockets(host_dir: Path) -> tuple[Path, ...]:
    """Return the sockets of processes that workers are forked from. Their names are `multiprocessing`'s."""
    return tuple(sorted(host_dir.glob("listener-*")))


def read_key(host_dir: Path) -> bytes:
    """Read the key, without following a link.

    Raises:
        FileNotFoundError: There is none (yet).
        AccessDenied: The caller may not read it.
        HostDirError: It is a link, not a regular file, empty, or far too long.
    """
    path = key_path(host_dir)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise AccessDenied(_unreadable(path)) from error
    except OSError as error:
        raise HostDirError(f"{path} can't be opened as a key: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise HostDirError(f"{path} is not a regular file; is {host_dir} the service's host dir?")
        key = os.read(descriptor, MAX_KEY + 1)
    finally:
        os.close(descriptor)
    if not key or len(key) > MAX_KEY:
        raise HostDirError(f"{path} does not hold a key: it has {'no' if not key else 'too many'} bytes")
    return key


def _unreadable(path: Path) -> str:
    try:
        group = path.stat().st_gid
    except OSError:
        return f"not allowed to read {path}: ask the administrator to put you into the service's group (see its README)"
    return f"not allowed to read {path}: it belongs to group {group}; ask the administrator to put you into that group"
