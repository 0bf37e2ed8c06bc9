"""Do what the removal of containers has put off: in a process of its own, so that no lane is held up by it.

```
 lanes' threads ── wake() ──► pipe ──► sweeper: Backend.sweep       begun when there is something to do, then kept
 attendant      ── waits for its end, and has another one if that was not ordered
```

The kernel kills the process when the service ends, as it does lanes' workers; what is left then, the next service does.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from lxc_pool.backend.protocol import Backend
from lxc_pool.errors import DestroyFailed
from lxc_pool.host.processes import die_at_end_of
from lxc_pool.service.worker import LOG_FORMAT, start_fork_server

log = logging.getLogger(__name__)

_MORE, _END = b"+", b"."

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 60.0
"""Seconds until what could not be done is tried again: the kernel may count files for a moment longer. Guesses."""

_PATIENCE = 5.0
"""Seconds that the last attempts may go on when the service ends and something can't be removed, and that a killed
process has to end. A guess."""

_RESTART_PAUSE = 1.0
"""Seconds until a process that has ended by itself has a successor. A guess."""

_NICENESS = 10
"""Containers come first."""


class Sweeper:
    """The process, and the thread that looks after it. `_lock` guards all attributes but the backend."""

    def __init__(self, backend: Backend) -> None:
        """Name the backend; nothing happens yet."""
        self._backend = backend
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._orders: Connection | None = None
        self._attendant: threading.Thread | None = None
        self._closing = threading.Event()

    def wake(self) -> None:
        """See whether there is something to do, and have it done; returns at once."""
        if not self._closing.is_set() and self._backend.leftovers():
            self._order()

    def close(self, timeout: float) -> None:
        """Have the rest done and end the process; after *timeout* seconds it is killed."""
        self._closing.set()
        if self._attendant is not None or self._backend.leftovers():
            self._order()
        if self._attendant is not None:
            self._attendant.join(timeout)
            with self._lock:
                if self._process is not None:
                    self._process.kill()
            self._attendant.join(_PATIENCE)  # one that hangs in the kernel does not end
        if self._backend.leftovers():
            log.error("not all upper layers could be removed: the next service, or `lxc-pool cleanup`, will try again")

    def _order(self) -> None:
        """Tell the process what to do; have one first if there is none."""
        with self._lock:
            if self._attendant is None:
                self._attendant = threading.Thread(target=self._attend, name="sweeper", daemon=True)
                self._attendant.start()
            elif self._orders is not None:
                self._send(self._orders)

    def _send(self, orders: Connection) -> None:
        # Full: it has more than enough to read. Broken: its end is being noticed, and its successor looks anyway.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            orders.send_bytes(_END if self._closing.is_set() else _MORE)

    def _attend(self) -> None:
        """Have a process until the end; runs on the thread."""
        while True:
            try:
                status = self._have_process()
            except (OSError, EOFError) as error:
                status = None
                log.warning("the sweeper can't be started: %s; it is tried again", error)
            if self._closing.is_set():
                return
            if status is not None:
                log.error("the sweeper has ended by itself, with status %s; another one takes its place", status)
            self._closing.wait(_RESTART_PAUSE)

    def _have_process(self) -> int | None:
        """Start a process, and return its exit status when it has ended.

        Raises:
            OSError, EOFError: It can't be started.
        """
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        theirs, orders = context.Pipe(duplex=False)
        with theirs:
            os.set_blocking(orders.fileno(), False)
            process = context.Process(target=_work, args=(self._backend, theirs), name="sweeper", daemon=True)
            process.start()
        with self._lock:
            self._process, self._orders = process, orders
            self._send(orders)
        process.join()
        with self._lock:
            self._process = self._orders = None
        orders.close()
        return process.exitcode


def _work(backend: Backend, orders: Connection) -> None:
    """Sweep whenever told to; runs in the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a lane's worker
    service = multiprocessing.parent_process()
    if service is not None:
        die_at_end_of(service.sentinel)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    os.nice(_NICENESS)
    pause: float | None = None
    last: float | None = None
    while True:
        if _hear(orders, pause):
            last = last or time.monotonic() + _PATIENCE
        try:
            backend.sweep()
            pause = None
        except DestroyFailed as error:
            if pause is None or last is not None or pause >= 1:
                log.warning("%s", error)
            pause = min(2 * pause, _LONGEST_PAUSE) if pause else _FIRST_PAUSE
        if last is not None and (pause is None or time.monotonic() > last):
            return


def _hear(orders: Connection, pause: float | None) -> bool:
    """Wait for orders, at most for *pause* seconds (None: for ever); return whether the end is one of them."""
    heard = set()
    if orders.poll(pause):
        while orders.poll(0):
            heard.add(orders.recv_bytes())
    return _END in heard
