"""Wait for what happens in other processes."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator

PATIENCE = 60.0
"""Seconds: a guess, many times what anything here takes; the machine may be loaded, and who waits no longer than needed
loses nothing by a long limit."""


def eventually(condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
    """Wait until *condition* is true, where nothing tells when it has become so."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def pidfd(pid: int) -> Iterator[int]:
    """Hold on to a process."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def ends(descriptor: int, timeout: float = PATIENCE) -> bool:
    """Wait for the end of a process by its pidfd; return whether it came."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
