"""The two directories that a service has for itself: the host dir, where clients meet it, and the state dir."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from lxc_pool import hostdir
from lxc_pool.errors import HostDirError
from lxc_pool.host import locks

_INSTANCE_BYTES = 3


@contextlib.contextmanager
def host_dir(path: Path, group: int, key: bytes) -> Iterator[None]:
    """Own the host dir: make it if need be, check it, lock it, and put the key into it.

    At the end the key is removed and the lock given up.

    Args:
        path: The host dir.
        group: Gid that may enter it and read the key.
        key: What clients have to know.

    Raises:
        HostDirError: It is not a directory of the service's user, others may write to it or replace it, or another
            service has it.
    """
    _make(path, 0o750, group)
    with _locked(path / "service.lock", f"host dir {path}"):
        for left in hostdir.fork_sockets(path):
            left.unlink(missing_ok=True)
        target = hostdir.key_path(path)
        partial = path / f".authkey.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        # Created with its final mode, and in place at once: a reader sees the old key or the new one, whole.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            os.fchown(descriptor, -1, group)
            os.fchmod(descriptor, 0o640)
            file.write(key)
        partial.rename(target)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                target.unlink()


@contextlib.contextmanager
def state_dir(path: Path) -> Iterator[str]:
    """Own the state dir: make it if need be, check it, lock it; yield its instance id.

    The id is made once and stays: every name that the service gives on this machine carries it.

    Raises:
        HostDirError: As for `host_dir`.
    """
    # A container's root goes through on its way to its own directory; nobody looks around.
    _make(path, 0o711, None)
    with _locked(path / "service.lock", f"state dir {path}"):
        _make(path / "containers", 0o711, None)
        # An image's set-uid programs are the host's root's here, and of any age.
        _make(path / "images", 0o700, None)
        yield _instance(path)


def read_instance(state_dir: Path) -> str | None:
    """Return the instance id of a state dir; None if no service has ever used it.

    Raises:
        HostDirError: The file does not hold one.
    """
    path = state_dir / "instance"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        text = path.read_text(encoding="ascii", errors="replace").strip()
        if len(text) != 2 * _INSTANCE_BYTES or set(text) - set("0123456789abcdef"):
            raise HostDirError(
                f"{path} does not hold an instance id but {text[:40]!r}; restore it, or use a new state dir"
            )
        return text
    return None


def name_prefix(instance: str) -> str:
    """Return what the names of this instance's containers, and no others, begin with."""
    return f"lxp-{instance}-"


def running_service(directory: Path) -> int | None:
    """Return the pid of the service that has a host dir or state dir; 0 if it is only starting, None if none has it.

    Raises:
        OSError: Its lock file can't be opened.
    """
    path = directory / "service.lock"
    if not locks.is_held(path):
        return None
    text = path.read_text(encoding="ascii", errors="replace").strip()
    return int(text) if text.isdecimal() else 0


def _instance(state_dir: Path) -> str:
    text = read_instance(state_dir)
    if text is not None:
        return text
    path = state_dir / "instance"
    text = secrets.token_hex(_INSTANCE_BYTES)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="ascii")
    partial.rename(path)
    return text


def _make(path: Path, mode: int, group: int | None) -> None:
    if not path.is_absolute():
        raise HostDirError(f"{path} must be an absolute path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_safe_way(path)
        path.mkdir(mode=mode, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise HostDirError(f"can't make {path}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise HostDirError(f"{path} is not a directory (a link is not followed); remove it, or choose another")
    if status.st_uid != os.geteuid():
        raise HostDirError(
            f"{path} belongs to uid {status.st_uid}; it has to be the service's own: `chown {os.geteuid()} {path}`"
        )
    if status.st_mode & 0o022:
        raise HostDirError(
            f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):04o}): `chmod {mode:04o} {path}`"
        )
    if group is not None:
        os.chown(path, -1, group)
    if stat.S_IMODE(status.st_mode) != mode or group is not None:
        os.chmod(path, mode)


def _require_safe_way(path: Path) -> None:
    """Refuse a directory that somebody else could put another one in the place of: whoever owns what it is in.

    Raises:
        HostDirError: The message says which, and what to do.
        OSError: A directory on the way can't be looked at.
    """
    trusted = (0, os.geteuid())
    for directory in dict.fromkeys((*path.parents, *(path.parent.resolve() / path.name).parents)):
        status = os.lstat(directory)
        if status.st_uid not in trusted:
            raise HostDirError(
                f"{directory} belongs to uid {status.st_uid}, who could replace {path} in it: "
                f"`chown root {directory}`, or choose another place"
            )
        open_to_others = not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o022
        if open_to_others and not status.st_mode & stat.S_ISVTX:
            raise HostDirError(
                f"others may write to {directory} (mode {stat.S_IMODE(status.st_mode):04o}), and so replace {path} in "
                f"it: `chmod go-w {directory}`, or choose another place"
            )


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file *path*, with our pid in it; it stays when the lock goes."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise HostDirError(f"can't open the lock file {path}: {error.strerror}") from error
    with open(descriptor, "r+", encoding="ascii", errors="replace") as file:
        try:
            ours = locks.take(descriptor)
            if ours:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            raise HostDirError(f"can't use the lock file {path}: {error.strerror}") from error
        if not ours:
            raise HostDirError(
                f"the {what} is in use by the service with pid {file.read().strip() or '(starting)'}; "
                "stop it (`lxc-pool stop`), or use another directory"
            )
        yield
