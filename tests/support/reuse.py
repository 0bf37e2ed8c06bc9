"""Give a pid that has just come free to another process: what happens to pids in days, at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Iterator

_CLONE3 = 435
"""The same on all architectures. Source: Linux include/uapi/asm-generic/unistd.h."""

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def occupied(pid: int) -> Iterator[None]:
    """Have a process that sleeps, with just this pid; it must live until the end of the block, and is killed then.

    Source: clone3(2), set_tid.
    """
    wanted = (ctypes.c_int * 1)(pid)
    # flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
    arguments = struct.pack("11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
    child = _libc.syscall(_CLONE3, arguments, len(arguments))
    if child == 0:
        try:
            os.execvp("sleep", ["sleep", "1000"])  # noqa: S606  # what a forked child does
        finally:
            os._exit(1)
    if child < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"clone3 with pid {pid}")
    assert child == pid
    try:
        yield
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the process that has the pid now was killed for the other"
    finally:
        with contextlib.suppress(ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
