"""Mounts into a container.

 this process opens the path (O_PATH) ── descriptor ──► service ──► a process that mounts it (`execution.mounting`)
                                         ◄── pipe: DONE, or why not ──┘

What can't be opened here can't be mounted: the service takes no paths of the host.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import time
from collections.abc import Callable

from lxc_pool.client.caller import CALL_TIMEOUT
from lxc_pool.client.files import Path
from lxc_pool.client.inside import Inside, Late, Launch
from lxc_pool.errors import ExecFailed, LxcPoolError
from lxc_pool.execution import mounting
from lxc_pool.execution.frames import DONE, FAILED, FrameError, FrameReader, StreamEnd, read_failure
from lxc_pool.execution.protocol import MOUNT, ExecRequest

SendMount = Callable[[bytes, bool, tuple[int, int, int]], None]
"""Sends destination, readonly, and the descriptors of the source, a pipe and a control socket."""


def mount(send: SendMount, host_path: Path, dst: Path, *, readonly: bool) -> None:
    """Mount *host_path* on *dst*; see `Container.mount`."""
    if not isinstance(readonly, bool):
        raise TypeError(f"readonly must be True or False, not {readonly!r}")
    destination = _destination(dst)
    source = os.open(host_path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(source).st_mode
        try:
            mounting.check_type(mode)
        except mounting.Refusal as exc:
            raise ValueError(f"{os.fsdecode(host_path)!r} can't be mounted: {exc.text}") from None
        if not stat.S_ISDIR(mode) and destination.endswith(b"/"):
            raise NotADirectoryError(errno.ENOTDIR, "a file can't be mounted on a directory", os.fsdecode(dst))

        def launch(_request: ExecRequest, descriptors: tuple[int, int, int, int]) -> None:
            _stdin, stdout, _stderr, control = descriptors
            send(destination, readonly, (source, stdout, control))

        _perform(launch, ExecRequest.for_operation(MOUNT, destination), os.fsdecode(host_path))
    finally:
        os.close(source)


def unmount(launch: Launch, dst: Path) -> None:
    """Undo `mount`; see `Container.unmount`."""
    destination = _destination(dst)
    _perform(launch, ExecRequest.for_operation("unmount", destination), os.fsdecode(destination))


def _perform(launch: Launch, request: ExecRequest, path: str) -> None:
    """Have an operation performed; *path* is what an error is about that names none."""
    inside = None
    try:
        inside = Inside(launch, request, time.monotonic() + CALL_TIMEOUT)
        kind, body = FrameReader(inside.read).next()
        if kind == FAILED:
            raise read_failure(body)
        if kind != DONE:
            raise FrameError(f"a frame of kind {kind} as an answer")
        inside.finish()
    except Late:
        raise TimeoutError(errno.ETIMEDOUT, f"not done within {CALL_TIMEOUT:g} s", path) from None
    except StreamEnd:
        assert inside is not None, "it is read from once it is there"
        raise _why_it_ended(inside) from None
    except FrameError as exc:
        raise ExecFailed(f"what the container answered makes no sense: {exc}") from None
    except OSError as exc:
        if exc.filename is None and not isinstance(exc, LxcPoolError):
            exc.filename = path
        raise
    finally:
        if inside is not None:
            inside.close()


def _why_it_ended(inside: Inside) -> Exception:
    error = inside.why_it_ended()
    if inside.returncode == -signal.SIGALRM:
        return TimeoutError(errno.ETIMEDOUT, f"not done within {mounting.TIMEOUT} s: does the file system hang?")
    return error


def _destination(dst: Path) -> bytes:
    """Return an absolute path of the container: there, all begins at the root.

    Raises:
        TypeError, ValueError: It is no path.
    """
    encoded = os.fsencode(dst)
    if not encoded or b"\0" in encoded:
        raise ValueError(f"dst must be a path of the container, not {dst!r}")
    return encoded if encoded.startswith(b"/") else b"/" + encoded
