"""Notice the end of a process: by its pidfd, or by looking again and again where the kernel gives none.

```
 open_end ─┬─► a pidfd
           └─► pidfd_open is refused: the reading end of a pipe, which becomes readable as a pidfd does
                    ▲ at a process's end
               the poller's thread ── looks every INTERVAL, with psutil and /proc/PID/stat
```

pidfd_open(2) is missing before Linux 5.3, and refused by older seccomp policies of container engines: a service in one
of their containers would see no owner die. Nothing is polled, and there is no such thread, where there are pidfds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import threading

import psutil

from lxc_pool.host.processes import MISSING, ProcessIdentity, identify, open_pidfd

INTERVAL = 0.05
"""Seconds between two looks: how much later a death may be noticed than by a pidfd. A look at 1000 takes 0.05 s."""


def open_end(identity: ProcessIdentity) -> int:
    """Return a descriptor that becomes readable when the process has ended; to be closed by the caller, at any time.

    Raises:
        ProcessLookupError: It has ended, whether or not its pid has been given to another; or it is a mere thread.
    """
    try:
        return open_pidfd(identity)
    except OSError as error:
        if error.errno not in MISSING:
            raise
    if not lives(identity):
        raise ProcessLookupError(f"process {identity.pid} has ended")
    return _poller.watch(identity)


def is_pidfd(descriptor: int) -> bool:
    """Return whether what `open_end` has returned is a pidfd, which serves for more than waiting."""
    return not stat.S_ISFIFO(os.fstat(descriptor).st_mode)


def send(number: signal.Signals, identity: ProcessIdentity, descriptor: int) -> None:
    """Send a signal to a process, whose *descriptor* `open_end` has returned; not an error if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        if is_pidfd(descriptor):
            signal.pidfd_send_signal(descriptor, number)
        elif lives(identity):
            os.kill(identity.pid, number)


def lives(identity: ProcessIdentity) -> bool:
    """Return whether the process has not ended; a zombie has.

    psutil's own idea of who has a pid follows steps of the clock; the start time in ticks since boot does not.
    """
    try:
        # It knows threads from processes, which kill(2) and /proc do not.
        return psutil.pid_exists(identity.pid) and identify(identity.pid) == identity
    except ProcessLookupError:
        return False


class _Poller:
    """Looks whether processes live, for as long as somebody waits for their end.

    Threads: any. `_lock` guards `_watched`, which has the writing end of the pipe for each, and `_thread`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, ProcessIdentity] = {}
        self._thread: threading.Thread | None = None

    def watch(self, identity: ProcessIdentity) -> int:
        """Return the reading end of a pipe; once that is closed, the process is no longer looked at."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with self._lock:
            self._watched[writer] = identity
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ends", daemon=True)
                self._thread.start()
        return reader

    def _run(self) -> None:
        while watched := self._still_watched():
            poll = select.poll()
            for writer in watched:
                poll.register(writer, 0)  # tells nothing but that the other end is closed
            over = {writer for writer, _event in poll.poll(INTERVAL * 1000)}
            over |= {writer for writer, identity in watched.items() if writer not in over and not lives(identity)}
            with self._lock:
                for writer in over:
                    del self._watched[writer]
            for writer in over:
                with contextlib.suppress(OSError):  # nobody waits any more
                    os.write(writer, b"\0")
                os.close(writer)

    def _still_watched(self) -> dict[int, ProcessIdentity]:
        """Return what is watched; with nothing, the thread is over, and the next `watch` starts another."""
        with self._lock:
            if not self._watched:
                self._thread = None
            return dict(self._watched)


_poller = _Poller()
