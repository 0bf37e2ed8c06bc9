"""Run a profile's probe until it succeeds, or its time is up; and tell what it said.

The probe is a program of the image, so anybody's: it may hang, say more than anybody wants to keep, or leave children
that hold its output open. It is given nothing but pipes.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Sequence

_PAUSE = 0.05
"""Seconds between two tries. A guess: short beside the second that services take to come up."""

_BRIEF = 1.0
"""Seconds; a try that is cut short after less says less than the one before it. A guess: probes are quick."""

_TAIL = 512
"""Bytes of the end of what it says that are kept. A guess: more than anybody reads."""

_CHUNK = 1 << 16


def run_until_success(argv: Sequence[str], deadline: float) -> str | None:
    """Run a command again and again until it ends with 0.

    Args:
        argv: The command, as the host is to run it.
        deadline: Monotonic time by which it has to have succeeded; one that runs longer is killed.

    Returns:
        None once it has succeeded; else how the last try ended that had a fair chance to, with the end of what it
        said, in words.
    """
    failure = ""
    while True:
        began = time.monotonic()
        status, said = _run(argv, deadline)
        if status == 0:
            return None
        if status is not None:
            failure = f"still ends with {status}: {said or 'it says nothing'}"
        elif not failure or time.monotonic() - began > _BRIEF:
            failure = f"has not ended in time: {said or 'it says nothing'}"
        if status is None or time.monotonic() + _PAUSE > deadline:
            return failure
        time.sleep(_PAUSE)  # readiness of a foreign program has no event; see _PAUSE


def _run(argv: Sequence[str], deadline: float) -> tuple[int | None, str]:
    """Run a command once; return its status (None: its time was up), and the end of what it said."""
    output, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.set_blocking(theirs, True)
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            theirs = -1
            try:
                said = _listen(process, output, deadline)
                status = process.poll()
            finally:
                process.kill()
        return status, said.decode(errors="replace").strip()
    finally:
        os.close(output)
        if theirs >= 0:
            os.close(theirs)


def _listen(process: subprocess.Popen[bytes], output: int, deadline: float) -> bytes:
    """Read what a process says until it ends, or its time is up; children of its that say more are not waited for."""
    said = b""
    ended = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(output, select.POLLIN)
    try:
        while True:
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if output in ready:
                chunk = b""
                with contextlib.suppress(BlockingIOError):
                    chunk = os.read(output, _CHUNK)
                said = (said + chunk)[-_TAIL:]
                if not chunk:
                    poll.unregister(output)
            if ended in ready or not ready:
                return said
            if time.monotonic() >= deadline:
                return said
    finally:
        os.close(ended)
