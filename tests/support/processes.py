"""Real processes for tests: something that lives until told to end, and somebody else to be."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

NOBODY = 65534
"""A uid and gid that nothing of the tests belongs to."""


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that lives until it is killed, or the block ends."""
    process = subprocess.Popen(["sleep", "infinity"], stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def open_descriptors() -> set[str]:
    """Return this process's open descriptors, but for the one that it takes to look."""
    return {number for number in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{number}")}


def in_child(action: Callable[[], Any], uid: int | None = None) -> Any:
    """Call *action* in a forked child, as *uid* unless None; return its result, or the (type, words) it raised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            try:
                answer = action()
            except BaseException as error:  # noqa: BLE001  # whatever it is, the parent judges it
                answer = (type(error), str(error))
            with open(writer, "wb") as file:
                file.write(pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        body = file.read()
    os.waitpid(pid, 0)
    return pickle.loads(body)  # noqa: S301  # our own child wrote it


def as_nobody(action: Callable[[], Any]) -> Any:
    """Call *action* in a forked child of another user; see `in_child`."""
    return in_child(action, NOBODY)
